/* One whole call over a tensor, without an interpreter: plan it, gather its sums, finish the
 * numbers per channel that follow from them, write the result.
 *
 *     bnf_call call = {.direction = BNF_FORWARD, .type = BNF_F32, .shape = {32, 64, 49}, ...};
 *     bnf_call_plan(&call, threads);        kernels and tiles; writes nothing
 *     if (!bnf_call_reserve(&call)) ...     numbers per channel; false: there is no memory
 *     call.weight[c] = ..., call.shift[c] = ...
 *     bnf_call_run(&call);
 *     ... call.mean[c], call.var[c] ...     and, in training, bnf_move_running(&call, ...)
 *     bnf_call_release(&call);
 */
#ifndef BNFAST_DRIVER_H
#define BNFAST_DRIVER_H

#include "bnfast.h"

typedef enum {
    BNF_MOMENTS,
    BNF_FORWARD,
    BNF_BACKWARD,
    BNF_INFERENCE,
    BNF_DIRECTIONS
} bnf_direction;

/* A call on fewer bytes runs on one thread and is not counted among the calls at work: it is over
 * before another one could begin. */
#define BNF_SMALL_BYTES 65536

typedef struct bnf_call bnf_call;
typedef void bnf_prepare_step(bnf_call *call);
typedef void bnf_gather_step(bnf_call *call, bnf_tile tile, ptrdiff_t block);
typedef void bnf_finish_step(bnf_call *call, ptrdiff_t channel0, ptrdiff_t channel1);
typedef void bnf_write_step(bnf_call *call, bnf_tile tile);

/* The steps of a direction; gather and finish, or write, are NULL if it has none. */
typedef struct {
    bnf_prepare_step *prepare;
    bnf_gather_step *gather;
    bnf_finish_step *finish;
    bnf_write_step *write;
} bnf_steps;

struct bnf_call {
    /* Set before bnf_call_plan; zero if it does not apply. */
    bnf_direction direction;
    bnf_type type;
    bnf_shape shape;
    bnf_activation activation;
    double slope;     /* of an activation that takes one */
    double eps;       /* forward, and the others with has_var */
    double count;     /* backward, and forward with has_moments: values per channel of the batch,
                         with a mask the sum of its weights; backward with 0: its statistics are
                         constants */
    bool has_moments; /* forward: mean and m2 are given, those of a batch that x is a part of */
    bool has_var;     /* inference, backward: var is given, and not yet in scale or inv_std */
    bool has_sums;    /* backward: dweight and dbias are given, those of the whole batch */
    bool gathers;     /* backward: dweight and dbias must be summed here */
    const void *x, *residual;
    const void *weights; /* a mask: how much each position (outer, inner) counts, 0 or more, float32
                            (float64 for float64 data); NULL: all count as one.  Not read by an
                            inference */
    const void *dy,
        *output;          /* backward; output: the forward's y, read if it tells the derivative */
    void *y;              /* forward, inference */
    void *dx, *dresidual; /* backward; NULL: not wanted */

    /* Numbers per channel, float64.  The caller sets those marked "in" after bnf_call_reserve (for
     * an inference it may point at arrays of its own instead of reserving), and reads those marked
     * "out" after bnf_call_run.
     *     moments                                        out: mean, m2
     *     forward     in: weight, shift (, mean, m2)     out: mean, m2, var, inv_std
     *     inference   in: mean, scale, shift (, var)
     *     backward    in: mean, inv_std or var, weight, shift (, dweight, dbias)
     *                                                    out: dweight, dbias */
    double *mean, *m2, *var, *inv_std, *weight, *scale, *shift, *dweight, *dbias;

    /* The driver's own. */
    bnf_plan plan;
    ptrdiff_t bytes;  /* of all tensors */
    int most_threads; /* that it may use if no other call is at work */
    const bnf_kernels *kernels;
    const bnf_steps *steps;
    bnf_operands operands;
    double *memory; /* of all numbers per channel, and of the slots */
    double *dy_factor, *x_factor, *constant, *ones;
    double *block_counts;    /* with a mask: the sum of each block's weights; else NULL */
    double *slot_a, *slot_b; /* a row per block: means and M2s, or sums of g and g*(x - mean) */
};

void bnf_call_plan(bnf_call *call, int threads);
bool bnf_call_reserve(bnf_call *call);
void bnf_call_run(bnf_call *call);
void bnf_call_release(bnf_call *call);

/* The sum of all weights of a reserved call's mask: a forward's count. */
double bnf_call_weight(const bnf_call *call);

/* Calls of one kind on parts of a batch, planned for one thread each: all in one parallel region on
 * so many threads at most. */
void bnf_calls_run(bnf_call *calls, ptrdiff_t count, int threads);

/* Adds the gradients of weight and bias of such backwards to those of the first. */
void bnf_add_gradients(bnf_call *calls, ptrdiff_t count);

/* Running statistics, float32 or float64 (wide), one value per channel. */
typedef struct {
    void *mean, *var;
    bool wide_mean, wide_var;
} bnf_running;

/* running = (1 - momentum) * running + momentum * batch, after a forward has run; the batch's
 * variance is over count - ddof.  Not a part of the call: it comes after everything that can fail.
 */
void bnf_move_running(bnf_call *call, bnf_running running, double momentum, double ddof);

/* The formula of bnf_move_running, for vectors of float64. */
void bnf_move_averages(double *running, const double *batch, double momentum, ptrdiff_t channels);

/* var becomes 1 / sqrt(var + eps). */
void bnf_invert_std(double *var, double eps, ptrdiff_t channels);

/* Whether the size in bytes of a call's numbers per channel fits in ptrdiff_t. */
bool bnf_is_countable(ptrdiff_t channels, ptrdiff_t blocks);

/* The instruction set and the caches that calls are planned for, for the whole process.  The set
 * must be chosen before the first call; only tests change it afterwards. */
void bnf_use_isa(int index);
int bnf_isa_in_use(void);
void bnf_use_caches(bnf_caches caches);
bnf_caches bnf_caches_in_use(void);

/* How many calls there were of one kind; the counts are exact for any number of threads. */
#define BNF_MOST_ISAS 8
typedef struct {
    bnf_direction direction;
    bnf_type type;
    bnf_layout layout;
    int isa;
    bnf_activation activation;
    bool residual;
} bnf_dispatch_key;
long long bnf_dispatches(bnf_dispatch_key kind);
void bnf_forget_dispatches(void);

/* The entry points as a table, for other extension modules of the same build. */
typedef struct {
    size_t call_size; /* sizeof(bnf_call); another size means another build */
    void (*plan)(bnf_call *call, int threads);
    bool (*reserve)(bnf_call *call);
    void (*run)(bnf_call *call);
    void (*release)(bnf_call *call);
    void (*move_running)(bnf_call *call, bnf_running running, double momentum, double ddof);
} bnf_driver;
extern const bnf_driver bnf_driver_table;

#endif
