/* The four kernels, each in a planar and an interleaved form, written once.
 *
 * types.inc.h includes this file once per data type, and defines around it
 *   T        the element type in memory,
 *   vec      the vector that eight of them are computed in (f8 or d8),
 *   P        one lane of it, the type of parameters: float, or double for double,
 *   NAME(f)  the name of f for this type,
 *   VEC(f)   the name of f for this vector (activations.inc.h).
 *
 * Statistics are summed in float64 around a pivot that is itself one of the
 * values.  For float32 data one pass is then exact enough.  Proof: let x_j be
 * the pivot and S the sum of (x - x_j)^2 over n values.  Then
 * M2 = S - n (mean - x_j)^2.  M2 contains x_j's own term, so
 * M2 >= (mean - x_j)^2 and S <= (n + 1) M2.  The subtraction therefore
 * magnifies the rounding error of S, at most n/16 units of 2^-53, by at most
 * n + 1: 2e-9 for a block of 16384 planar values, 3e-8 for 16384 rows of one
 * lane, for any data in any order.  (A float32 sum has no such spare bits:
 * with a guessed pivot it loses digits.)  float16 and bfloat16 data are float32
 * data with fewer digits.  float64 data have no spare bits either, so a block
 * is read twice while the caches hold it: the mean of the first pass is the
 * pivot of the second.
 *
 * Models: llm.c's layernorm for shapes and roles stated at the line, YNNPACK's
 * reductions for fixed-width accumulators. */

#define SWEEPS (sizeof(T) < sizeof(double) ? 1 : 2)
/* Whether the backward has one loop for all activations, sources of z and residuals, which branches
 * inside, instead of one loop for each combination.  True for halves: a loop for each would double
 * the size of the library, and a branch that always goes the same way costs little beside their
 * conversions. */
#define FEW_LOOPS (ISA_FEW_LOOPS || sizeof(T) < sizeof(P))
/* Functions are inlined into the table's entries, so that each variant has a loop of its own. */
#define INLINE ISA_INLINE

/* --- n values in memory, n up to LANES -------------------------------------- */

INLINE vec NAME(load_some)(const T *p, ptrdiff_t n)
{
    return n < LANES ? load_part(p, n, set1(0.0)) : load(p);
}

INLINE void NAME(store_some)(T *p, ptrdiff_t n, vec a, bool stream_it)
{
    if (n < LANES && stream_it && n * sizeof(T) % STREAM_ALIGNMENT == 0)
        stream_part(p, n, a); /* a line with streamed and normal stores is slow */
    else if (n < LANES)
        store_part(p, n, a);
    else if (stream_it)
        stream(p, a);
    else
        store(p, a);
}

/* --- Parameters of a tile's channels, rounded to the type of a lane --------- */

/* The mean is kept as a high and a low part: x - high is exact near the mean,
 * so a constant channel gives exactly its bias and a mean of 1e6 loses no digits. */
typedef struct {
    P high[BNF_MAX_CHANNELS], low[BNF_MAX_CHANNELS];
    P scale[BNF_MAX_CHANNELS], shift[BNF_MAX_CHANNELS];
} NAME(affine);

typedef struct {
    P dy_factor[BNF_MAX_CHANNELS], x_factor[BNF_MAX_CHANNELS], constant[BNF_MAX_CHANNELS];
} NAME(slopes);

typedef struct {
    vec high, low, scale, shift;
} NAME(affine_vec);

typedef struct {
    vec dy_factor, x_factor, constant;
} NAME(slopes_vec);

static __attribute__((noinline)) void NAME(round_affine)(const double *mean, const double *scale,
                                                         const double *shift, bnf_tile tile,
                                                         ptrdiff_t copies, NAME(affine) * to)
{
    for (ptrdiff_t copy = 0, i = 0; copy < copies; copy++)
        for (ptrdiff_t c = tile.channel0; c < tile.channel1; c++, i++) {
            to->high[i] = (P)mean[c];
            to->low[i] = (P)(mean[c] - (double)to->high[i]);
            to->scale[i] = (P)scale[c];
            to->shift[i] = (P)shift[c];
        }
}

static __attribute__((noinline)) void NAME(round_slopes)(const bnf_backward *b, bnf_tile tile,
                                                         ptrdiff_t copies, NAME(slopes) * to)
{
    for (ptrdiff_t copy = 0, i = 0; copy < copies; copy++)
        for (ptrdiff_t c = tile.channel0; c < tile.channel1; c++, i++) {
            to->dy_factor[i] = (P)b->dy_factor[c];
            to->x_factor[i] = (P)b->x_factor[c];
            to->constant[i] = (P)b->constant[c];
        }
}

/* Planar: one channel in every lane. */
INLINE NAME(affine_vec) NAME(broadcast_affine)(const NAME(affine) * a, ptrdiff_t i)
{
    return (NAME(affine_vec)){.high = set1(a->high[i]),
                              .low = set1(a->low[i]),
                              .scale = set1(a->scale[i]),
                              .shift = set1(a->shift[i])};
}

INLINE NAME(slopes_vec) NAME(broadcast_slopes)(const NAME(slopes) * s, ptrdiff_t i)
{
    return (NAME(slopes_vec)){.dy_factor = set1(s->dy_factor[i]),
                              .x_factor = set1(s->x_factor[i]),
                              .constant = set1(s->constant[i])};
}

/* Interleaved: n channels side by side. */
INLINE vec NAME(load_lanes)(const P *p, ptrdiff_t n)
{
    return n < LANES ? load_part(p, n, set1(0.0)) : load(p);
}

INLINE NAME(affine_vec) NAME(load_affine)(const NAME(affine) * a, ptrdiff_t i, ptrdiff_t n)
{
    return (NAME(affine_vec)){NAME(load_lanes)(a->high + i, n), NAME(load_lanes)(a->low + i, n),
                              NAME(load_lanes)(a->scale + i, n), NAME(load_lanes)(a->shift + i, n)};
}

INLINE NAME(slopes_vec) NAME(load_slopes)(const NAME(slopes) * s, ptrdiff_t i, ptrdiff_t n)
{
    return (NAME(slopes_vec)){NAME(load_lanes)(s->dy_factor + i, n),
                              NAME(load_lanes)(s->x_factor + i, n),
                              NAME(load_lanes)(s->constant + i, n)};
}

/* --- Eight values ----------------------------------------------------------- */

INLINE vec NAME(center)(vec x, NAME(affine_vec) a) { return sub(sub(x, a.high), a.low); }

/* z rounded to the type of y.  A half near a kink may round to the kink.  The gradient is then that
 * of the kink, both from y and from a recomputed z. */
INLINE vec NAME(as_written)(vec z)
{
    if (sizeof(T) == sizeof(P))
        return z;
    T written[LANES];
    store(written, z);
    return load(written);
}

/* The pre-activation of the n values at offset i, recomputed. */
INLINE vec NAME(recomputed)(const bnf_backward *b, ptrdiff_t i, ptrdiff_t n, NAME(affine_vec) a,
                            variant v)
{
    const vec d = NAME(center)(NAME(load_some)((const T *)b->x + i, n), a);
    vec z = fmadd(d, a.scale, a.shift);
    if (v.z_source == BNF_Z_FROM_X_RESIDUAL)
        z = add(z, NAME(load_some)((const T *)b->residual + i, n));
    return bnf_is_from_output(v.activation) ? NAME(as_written)(z) : z;
}

/* g, the gradient with respect to the pre-activation, of the n values at offset i. */
INLINE vec NAME(before_activation)(const bnf_backward *b, ptrdiff_t i, ptrdiff_t n,
                                   NAME(affine_vec) a, vec slope, variant v)
{
    const vec dy = NAME(load_some)((const T *)b->dy + i, n);
    if (v.z_source == BNF_NO_Z)
        return dy;
    const vec z = v.z_source == BNF_Z_FROM_Y ? NAME(load_some)((const T *)b->y + i, n)
                                             : NAME(recomputed)(b, i, n, a, v);
    return VEC(activate_gradient)(dy, z, slope, v);
}

/* How many of n values come before the first address that streaming stores accept. */
INLINE ptrdiff_t NAME(lead)(const T *p, ptrdiff_t n)
{
    return at_most(n, (ptrdiff_t)(-(size_t)p % STREAM_ALIGNMENT / sizeof(T)));
}

#include "moments.inc.h"
#include "apply.inc.h"
#include "grad_sums.inc.h"
#include "grad_input.inc.h"

/* This type's part of the table. */
static const bnf_kernels NAME(kernels)[BNF_LAYOUTS] = {
    [BNF_PLANAR] = {NAME(moments_planar), NAME(apply_planar), NAME(grad_sums_planar),
                    NAME(grad_input_planar)},
    [BNF_INTERLEAVED] = {NAME(moments_interleaved), NAME(apply_interleaved),
                         NAME(grad_sums_interleaved), NAME(grad_input_interleaved)},
};

#undef SWEEPS
#undef FEW_LOOPS
#undef INLINE
