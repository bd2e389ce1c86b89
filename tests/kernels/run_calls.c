/* Runs whole calls of src/driver.c on one instruction set, without an interpreter:
 *
 *     run_calls ISA      every call, in every way that must not change a bit
 *     run_calls          lists the sets that can run here
 *
 * Each call is forward, backward, inference and moments of one shape, type and variant. It is made
 * on one thread first. Then it is made on several threads, from several threads at the same time,
 * for other caches, in another floating-point environment and in a forked child. Its bits must be
 * the same each time. Prints a hash of all results. Made for ThreadSanitizer, valgrind and qemu. */
#define _GNU_SOURCE
#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "driver.h"
#include "float_env.h"
#include "threads.h"

enum { CALLERS = 3, THREADS = 4 };

typedef struct {
    bnf_type type;
    size_t itemsize;
    bnf_shape shape;
    bnf_activation activation;
    bool residual, masked;
} problem;

static const bnf_shape SHAPES[] = {
    {6, 24, 196}, {3, 5, 20000}, {4000, 33, 1}, {20000, 3, 1}, {2, 3, 7},
    {9, 5, 1},    {0, 4, 3},     {7, 6, 49},    {300, 40, 1},
};
_Static_assert(sizeof SHAPES / sizeof *SHAPES >= BNF_ACTIVATIONS, "each activation has a shape");
static const size_t ITEMSIZE[BNF_TYPES] = {4, 8, 2, 2};
static const bnf_caches MACHINES[] = {{32 << 10, 512 << 10, 8 << 20, true},
                                      {16 << 10, 64 << 10, 0, true}};

static void fail(const char *what, const problem *p)
{
    fprintf(stderr, "%s: type %d, shape (%td, %td, %td), activation %d, residual %d\n", what,
            p->type, p->shape.outer, p->shape.channels, p->shape.inner, p->activation, p->residual);
    exit(1);
}

/* ---- Data */

static uint64_t next(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return *seed >> 40;
}

/* From -2 to 2, including denormals, which another floating-point environment changes. */
static float value(uint64_t *seed)
{
    const double a = (double)next(seed) / (1 << 22) - 2;
    return (float)(next(seed) % 7 ? a : a * 1e-39);
}

static void *tensor(const problem *p, uint64_t seed)
{
    const size_t n = (size_t)(p->shape.outer * p->shape.channels * p->shape.inner);
    char *data = malloc(n * p->itemsize + 1);
    if (!data)
        fail("no memory", p);
    const bnf_float_env found = bnf_enter_float_env(); /* data are the same in every one */
    for (size_t i = 0; i < n; i++) {
        const float narrow = value(&seed);
        const double wide = narrow;
        uint32_t bits;
        memcpy(&bits, &narrow, sizeof bits);
        /* bfloat16 is the upper half of a float32. float16 is random bits with two bits of the
         * exponent cleared, so it is below 1 and never NaN. */
        const uint16_t half = (uint16_t)(p->type == BNF_BF16 ? bits >> 16 : bits >> 13 & 0xbbff);
        const void *from = p->type == BNF_F32   ? (const void *)&narrow
                           : p->type == BNF_F64 ? (const void *)&wide
                                                : (const void *)&half;
        memcpy(data + i * p->itemsize, from, p->itemsize);
    }
    bnf_leave_float_env(found);
    return data;
}

/* 0 or more, some of them 0; whole quarters, so that sums are exact. */
static void *mask(const problem *p)
{
    const size_t n = (size_t)(p->shape.outer * p->shape.inner);
    const size_t size = p->type == BNF_F64 ? sizeof(double) : sizeof(float);
    char *weights = malloc(n * size + 1);
    if (!weights)
        fail("no memory", p);
    for (size_t i = 0; i < n; i++) {
        const double wide = (double)(i * 7 % 5) / 4;
        const float narrow = (float)wide;
        memcpy(weights + i * size, size == sizeof wide ? (const void *)&wide : &narrow, size);
    }
    return weights;
}

static void fill(double *numbers, ptrdiff_t n, uint64_t seed)
{
    const bnf_float_env found = bnf_enter_float_env();
    for (ptrdiff_t c = 0; c < n; c++)
        numbers[c] = value(&seed);
    bnf_leave_float_env(found);
}

static uint64_t mix(uint64_t hash, const void *data, size_t bytes)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ p[i]) * 1099511628211u;
    return hash;
}

/* ---- One call of each direction */

typedef struct {
    const problem *p;
    size_t bytes, row;
    void *x, *dy, *residual, *y, *dx, *dresidual, *weights;
    int threads;
    uint64_t hash;
} state;

static bnf_call begin(const state *s, bnf_direction direction)
{
    return (bnf_call){
        .direction = direction,
        .type = s->p->type,
        .shape = s->p->shape,
        .activation = s->p->activation,
        .slope = 0.25,
        .eps = 1e-5,
        .x = s->x,
        .residual = direction == BNF_MOMENTS ? NULL : s->residual,
        .weights = s->weights,
    };
}

static void prepare(const state *s, bnf_call *call)
{
    bnf_call_plan(call, s->threads);
    if (!bnf_call_reserve(call))
        fail("no memory", s->p);
}

static void keep(state *s, const void *data, size_t bytes) { s->hash = mix(s->hash, data, bytes); }

static void run_moments(state *s)
{
    bnf_call call = begin(s, BNF_MOMENTS);
    prepare(s, &call);
    bnf_call_run(&call);
    if (s->bytes) {
        keep(s, call.mean, s->row);
        keep(s, call.m2, s->row);
    }
    bnf_call_release(&call);
}

static void run_inference(state *s)
{
    bnf_call call = begin(s, BNF_INFERENCE);
    call.y = s->y;
    call.has_var = true;
    prepare(s, &call);
    fill(call.mean, s->p->shape.channels, 3);
    fill(call.scale, s->p->shape.channels, 4);
    fill(call.shift, s->p->shape.channels, 5);
    for (ptrdiff_t c = 0; c < s->p->shape.channels; c++)
        call.var[c] = 1.0 + (double)c; /* exact in any environment */
    bnf_call_run(&call);
    keep(s, s->y, s->bytes);
    bnf_call_release(&call);
}

static void run_backward(state *s, const bnf_call *forward, bool from_output)
{
    bnf_call call = begin(s, BNF_BACKWARD);
    call.dy = s->dy;
    call.output = from_output ? s->y : NULL;
    call.dx = s->dx;
    call.dresidual = s->dresidual;
    call.gathers = true;
    call.count = forward->count;
    prepare(s, &call);
    memcpy(call.mean, forward->mean, s->row);
    memcpy(call.inv_std, forward->inv_std, s->row);
    fill(call.weight, s->p->shape.channels, 1);
    fill(call.shift, s->p->shape.channels, 2);
    bnf_call_run(&call);
    keep(s, s->dx, s->bytes);
    if (s->dresidual)
        keep(s, s->dresidual, s->bytes);
    keep(s, call.dweight, s->row);
    keep(s, call.dbias, s->row);
    bnf_call_release(&call);
}

static void run_training(state *s)
{
    bnf_call call = begin(s, BNF_FORWARD);
    call.y = s->y;
    prepare(s, &call);
    fill(call.weight, s->p->shape.channels, 1);
    fill(call.shift, s->p->shape.channels, 2);
    bnf_call_run(&call);
    keep(s, s->y, s->bytes);
    if (s->bytes) {
        float mean[64] = {0};
        double var[64] = {0};
        bnf_move_running(&call, (bnf_running){mean, var, false, true}, 0.1, 1);
        keep(s, call.inv_std, s->row);
        keep(s, mean, sizeof mean);
        keep(s, var, sizeof var);
        run_backward(s, &call, false);
        run_backward(s, &call, true);
    }
    bnf_call_release(&call);
}

enum { RUNS = 5 };

/* As virtual batches: runs of rows, in one parallel region.  Masks are left out. */
static void run_runs(state *s)
{
    const bnf_shape shape = s->p->shape;
    const ptrdiff_t rows = shape.outer / RUNS;
    const size_t bytes = (size_t)(rows * shape.channels * shape.inner) * s->p->itemsize;
    bnf_call calls[RUNS];
    for (size_t i = 0; i < RUNS; i++) {
        calls[i] = begin(s, BNF_FORWARD);
        calls[i].shape.outer = rows;
        calls[i].weights = NULL;
        calls[i].x = (char *)s->x + i * bytes;
        calls[i].residual = s->residual ? (char *)s->residual + i * bytes : NULL;
        calls[i].y = (char *)s->y + i * bytes;
        bnf_call_plan(&calls[i], 1);
        if (!bnf_call_reserve(&calls[i]))
            fail("no memory", s->p);
        fill(calls[i].weight, shape.channels, 1);
    }
    bnf_calls_run(calls, RUNS, s->threads);
    keep(s, s->y, RUNS * bytes);
    for (size_t i = 0; i < RUNS; i++) {
        keep(s, calls[i].inv_std, s->row);
        bnf_call_release(&calls[i]);
    }
}

static uint64_t run_calls(const problem *p, int threads)
{
    const size_t values = (size_t)(p->shape.outer * p->shape.channels * p->shape.inner);
    state s = {.p = p, .threads = threads, .hash = 14695981039346656037u};
    s.bytes = values * p->itemsize;
    s.row = (size_t)p->shape.channels * sizeof(double);
    s.x = tensor(p, 11), s.dy = tensor(p, 12), s.residual = p->residual ? tensor(p, 13) : NULL;
    s.y = tensor(p, 0), s.dx = tensor(p, 0), s.dresidual = p->residual ? tensor(p, 0) : NULL;
    s.weights = p->masked ? mask(p) : NULL;
    run_moments(&s);
    run_inference(&s);
    run_training(&s);
    if (p->shape.outer >= 2 * RUNS)
        run_runs(&s);
    void *made[] = {s.x, s.dy, s.residual, s.y, s.dx, s.dresidual, s.weights};
    for (size_t i = 0; i < sizeof made / sizeof *made; i++)
        free(made[i]);
    return s.hash;
}

/* ---- Every way that must not change a bit */

typedef struct {
    const problem *p;
    uint64_t hash;
} caller;

static void *run_in_caller(void *context)
{
    caller *c = context;
    c->hash = run_calls(c->p, THREADS);
    return NULL;
}

static void from_several_threads(const problem *p, uint64_t want)
{
    pthread_t threads[CALLERS];
    caller callers[CALLERS];
    for (int i = 0; i < CALLERS; i++) {
        callers[i].p = p;
        if (pthread_create(&threads[i], NULL, run_in_caller, &callers[i]))
            fail("no thread", p);
    }
    for (int i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < CALLERS; i++)
        if (callers[i].hash != want)
            fail("calls at the same time", p);
    int calls, at_work;
    bnf_at_work(&calls, &at_work);
    if (calls || at_work)
        fail("calls at work when all are over", p);
}

static void for_other_caches(const problem *p, uint64_t want)
{
    bnf_use_caches(MACHINES[1]);
    if (run_calls(p, 1) != want || run_calls(p, THREADS) != want)
        fail("other caches", p);
    bnf_use_caches(MACHINES[0]);
}

static void in_another_environment(const problem *p, uint64_t want)
{
    fesetround(FE_UPWARD);
#ifdef __SSE2__
    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040); /* denormals are zero */
    const unsigned mine = __builtin_ia32_stmxcsr() & ~0x3fu;
#endif
    const uint64_t one = run_calls(p, 1), several = run_calls(p, THREADS);
    bool kept = fegetround() == FE_UPWARD;
#ifdef __SSE2__
    kept = kept && (__builtin_ia32_stmxcsr() & ~0x3fu) == mine;
#endif
    fesetenv(FE_DFL_ENV);
    if (one != want || several != want)
        fail("another floating-point environment", p);
    if (!kept)
        fail("the caller's floating-point environment is not what it was", p);
}

#ifdef _WIN32
static void in_a_forked_child(const problem *p, uint64_t want) { (void)p, (void)want; }
#else
/* By fork(2), which Python's hooks do not see, after this thread has had a pool. */
static void in_a_forked_child(const problem *p, uint64_t want)
{
    const pid_t child = fork();
    if (child == 0) {
        alarm(60); /* ends a child that waits for threads it does not have */
        _exit(bnf_threads_lost() && run_calls(p, THREADS) == want ? 0 : 1);
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
        fail("a forked child", p);
    if (bnf_threads_lost() || run_calls(p, THREADS) != want)
        fail("the parent of a forked child", p);
}
#endif

static uint64_t check(const problem *p, bool forks)
{
    bnf_use_caches(MACHINES[0]);
    const uint64_t want = run_calls(p, 1);
    if (run_calls(p, THREADS) != want)
        fail("several threads", p);
    from_several_threads(p, want);
    for_other_caches(p, want);
    in_another_environment(p, want);
    if (forks)
        in_a_forked_child(p, want);
    return want;
}

static uint64_t check_all(void)
{
    uint64_t hash = 0;
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++)
        for (int type = 0; type < BNF_TYPES; type++) {
            /* Another activation each time; all of them with every type. */
            problem p = {(bnf_type)type, ITEMSIZE[type],
                         SHAPES[i],      (bnf_activation)((i + (size_t)type) % BNF_ACTIVATIONS),
                         i % 2 == 0,     false};
            const uint64_t found = check(&p, i == 0);
            hash = mix(hash, &found, sizeof found);
            p.masked = true;
            const uint64_t masked = run_calls(&p, 1);
            if (run_calls(&p, THREADS) != masked)
                fail("several threads, masked", &p);
            hash = mix(hash, &masked, sizeof masked);
        }
    return hash;
}

int main(int argc, char **argv)
{
    bnf_threads_setup();
    for (int i = 0; i < bnf_isa_count(); i++) {
        if (argc < 2 && bnf_isa_table(i))
            puts(bnf_isa_name(i));
        if (argc < 2 || strcmp(argv[1], bnf_isa_name(i)) || !bnf_isa_table(i))
            continue;
        bnf_use_isa(i);
        printf("%016llx\n", (unsigned long long)check_all());
        return bnf_threads_started() ? 0 : 3;
    }
    return argc < 2 ? 0 : 2;
}
