/* The C contract of bnfast: shapes, tiles, the operands of the seven kernels
 * and the table of them that each instruction set fills.
 *
 * Every tensor is (outer, channels, inner), C-contiguous: NCHW is (N, C, H*W),
 * NHWC is (N*H*W, C, 1), a dense (N, C) is (N, C, 1).  inner > 1 is the planar
 * layout, inner == 1 the interleaved one.  Per-channel numbers are float64 for
 * every data type; a kernel rounds them to its own type once. */
#ifndef BNFAST_H
#define BNFAST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* setup.py turns such flags off; other builds must not set them. */
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error "bnfast needs exact arithmetic: build it without -ffast-math and its parts"
#endif

/* float16 (IEEE 754's binary16) and bfloat16 (the upper half of a float32) as they
 * are in memory: structs, so that _Generic can select by them and arithmetic on
 * them does not compile.  They are computed in float32 and rounded once, to
 * nearest even. */
typedef struct {
    uint16_t bits;
} bnf_f16;
typedef struct {
    uint16_t bits;
} bnf_bf16;

typedef enum {
#define TYPE(CODE, ...) BNF_##CODE,
#include "types.inc"
    BNF_TYPES
} bnf_type;

typedef enum { BNF_PLANAR, BNF_INTERLEAVED, BNF_LAYOUTS } bnf_layout;

typedef enum {
    BNF_LINEAR, /* none */
#define ACTIVATION(CODE, ...) BNF_##CODE,
#include "activations.inc"
    BNF_ACTIVATIONS
} bnf_activation;

static inline const char *bnf_type_name(bnf_type type)
{
    switch (type) {
#define TYPE(CODE, name, ...) \
    case BNF_##CODE:          \
        return #name;
#include "types.inc"
    default:
        return NULL;
    }
}

static inline ptrdiff_t bnf_type_size(bnf_type type)
{
    static const ptrdiff_t SIZES[BNF_TYPES] = {
#define TYPE(CODE, name, element, ...) [BNF_##CODE] = sizeof(element),
#include "types.inc"
    };
    return SIZES[type];
}

/* NULL for BNF_LINEAR */
static inline const char *bnf_activation_name(bnf_activation activation)
{
    switch (activation) {
#define ACTIVATION(CODE, name, ...) \
    case BNF_##CODE:                \
        return #name;
#include "activations.inc"
    default:
        return NULL;
    }
}

static inline bool bnf_is_from_output(bnf_activation activation)
{
    switch (activation) {
#define ACTIVATION(CODE, name, from_output, ...) \
    case BNF_##CODE:                             \
        return from_output;
#include "activations.inc"
    default:
        return true;
    }
}

/* Whether it shares its loops (activations.inc). */
static inline bool bnf_is_smooth(bnf_activation activation)
{
    switch (activation) {
#define ACTIVATION(...)
#define SMOOTH(CODE, ...) \
    case BNF_##CODE:      \
        return true;
#include "activations.inc"
    default:
        return false;
    }
}

static inline double bnf_default_slope(bnf_activation activation)
{
    switch (activation) {
#define ACTIVATION(CODE, name, from_output, slope) \
    case BNF_##CODE:                               \
        return slope;
#include "activations.inc"
    default:
        return 0;
    }
}

/* Where the backward gets the pre-activation z, at which it computes the activation's derivative:
 * nowhere (there is no activation), recomputed from x, recomputed from x and the residual, or the
 * output y instead of z. */
typedef enum { BNF_NO_Z, BNF_Z_FROM_X, BNF_Z_FROM_X_RESIDUAL, BNF_Z_FROM_Y } bnf_z_source;

/* The most channels of a tile that is summed: its sums are on the stack and stay
 * in L1 while the data are read.  A planar channel has 16 lanes of them. */
#define BNF_MAX_PLANAR 64
#define BNF_MAX_INTERLEAVED 512
/* The most channels of any tile: their parameters, rounded, are on the stack. */
#define BNF_MAX_CHANNELS 2048

typedef struct {
    ptrdiff_t outer, channels, inner;
} bnf_shape;

/* Half-open ranges of the three axes. */
typedef struct {
    ptrdiff_t outer0, outer1, channel0, channel1, inner0, inner1;
} bnf_tile;

/* What a call reads and writes.
 *
 *     y = act((x - mean) * scale + shift (+ residual))
 *     g = dy * act'(pre-activation);  the residual's gradient is g
 *     dx = dy_factor*g + x_factor*(x - mean) + constant, or dy_factor*g if the statistics are
 *     constants */
typedef struct {
    bnf_shape shape;
    const void *x, *residual, *dy; /* residual may be NULL */
    const void *weights;  /* a mask: how much each position of (outer, inner) counts, in the type of
                             parameters; NULL: all count as one */
    void *y;              /* written by apply; read by a backward with BNF_Z_FROM_Y */
    void *dx, *dresidual; /* dresidual may be NULL */
    const double *mean, *scale, *shift;
    const double *dy_factor, *x_factor, *constant;
    bnf_activation activation;
    double slope; /* of an activation that takes one */
    bnf_z_source z_source;
    bool through_moments;
    bool stream;     /* write y or dx with streaming stores, which bypass the caches */
    ptrdiff_t ahead; /* sums fetch what lies so many values ahead; 0: they do not */
} bnf_operands;

/* Interleaved rows of few channels are taken several at a time, as one long row with a
 * copy of the channels for each of them: alone, a row of three channels would use three
 * lanes of eight, in a loop of one step.  How many are taken depends on the channels
 * alone, since sums depend on it.  A tile that is summed has all channels if they are
 * so few. */
#define BNF_FEW_CHANNELS 16
#define BNF_ROW_OF_COPIES 128

static inline ptrdiff_t bnf_rows_at_once(bnf_shape shape)
{
    ptrdiff_t rows = 1;
    if (shape.inner == 1 && 0 < shape.channels && shape.channels <= BNF_FEW_CHANNELS)
        while (2 * rows * shape.channels <= BNF_ROW_OF_COPIES)
            rows *= 2;
    return rows;
}

/* Each writes one entry per channel of the tile, indexed by the channel's
 * number in the whole tensor. */
typedef void bnf_sum_kernel(const bnf_operands *operands, bnf_tile tile, double *a, double *b);
typedef void bnf_write_kernel(const bnf_operands *operands, bnf_tile tile);
typedef void bnf_both_kernel(const bnf_operands *operands, bnf_tile summed, bnf_tile written,
                             double *a, double *b);
/* count: the sum of the tile's weights. */
typedef void bnf_masked_kernel(const bnf_operands *operands, bnf_tile tile, double count, double *a,
                               double *b);

typedef struct {
    bnf_sum_kernel *moments;       /* mean, M2, for any data */
    bnf_sum_kernel *batch_moments; /* mean, M2, within the error that a training call may have */
    bnf_masked_kernel *masked_moments;  /* mean, M2 of what a mask counts */
    bnf_write_kernel *apply;            /* y */
    bnf_sum_kernel *grad_sums;          /* sum of g, sum of g * (x - mean) */
    bnf_write_kernel *grad_input;       /* dx, dresidual */
    bnf_both_kernel *moments_and_apply; /* batch_moments of one tile and apply of another,
                                           of the same images; planar */
} bnf_kernels;

typedef struct {
    const char *name;
    const bnf_kernels *const *kernels; /* by bnf_type, then by bnf_layout */
} bnf_table;

/* dispatch.c */
int bnf_isa_count(void);                   /* instruction sets built in, best last */
const bnf_table *bnf_isa_table(int index); /* NULL if this processor cannot run it */
const char *bnf_isa_name(int index);

/* caches.c */
typedef struct {
    ptrdiff_t l1d, l2, l3; /* bytes; l2 of one core, l3 of one shared instance (0: none) */
    bool measured;         /* read from the system, not the fallback */
} bnf_caches;
bnf_caches bnf_read_caches(void);

/* caches_<system>.c: the bytes of the data caches that it lists, by level; the rest stay as they
 * are. */
#define BNF_CACHE_LEVELS 3
void bnf_find_caches(ptrdiff_t bytes[BNF_CACHE_LEVELS]);

/* tiling.c */
typedef struct {
    ptrdiff_t count;    /* blocks a channel is cut into */
    ptrdiff_t outers;   /* images (or rows) a block spans */
    ptrdiff_t segments; /* pieces a plane is cut into; 1 unless planes are long */
    ptrdiff_t length;   /* values of a plane in one piece */
} bnf_blocks;

typedef struct {
    bnf_layout layout;
    bnf_blocks blocks;
    bnf_blocks write_blocks; /* how the tiles that are written are cut: any way, for speed */
    ptrdiff_t group, groups; /* channels of a tile that is summed, such tiles across all */
    ptrdiff_t width, widths; /* the same for a tile that is written */
    bool fused;              /* a group is summed and written while the caches hold it */
    ptrdiff_t chains;        /* groups are shared out in so many chains, of neighbours */
    bool stream;
    ptrdiff_t ahead; /* how many values ahead sums fetch; 0: they do not */
    int threads;
} bnf_plan;

bnf_layout bnf_shape_layout(bnf_shape shape);
bnf_blocks bnf_cut_blocks(bnf_shape shape);
ptrdiff_t bnf_values_before(bnf_shape shape, bnf_blocks blocks, ptrdiff_t block);
int bnf_useful_threads(ptrdiff_t bytes);
bnf_plan bnf_make_plan(bnf_shape shape, ptrdiff_t itemsize, bool gathers, int reads, int writes,
                       bnf_caches caches, int max_threads);
ptrdiff_t bnf_chains_in_turn(bnf_shape shape, bnf_plan plan);
bnf_tile bnf_block_tile(bnf_shape shape, bnf_blocks blocks, ptrdiff_t block, ptrdiff_t channel0,
                        ptrdiff_t channels);

#endif
