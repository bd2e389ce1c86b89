/* The kernels, each in a planar and an interleaved form, written once.
 *
 * types.inc.h includes this file for a data type, and defines before it
 *   T        the element type in memory,
 *   vec      the vector that elements are computed in (f32x16 or d8),
 *   P        one lane of it, the type of parameters: float, or double for double,
 *   wide     the same number of float64 lanes (d16 or d8),
 *   NAME(f)  the name of f for this type,
 *   VEC(f)   the name of f for this vector (activations.inc.h),
 *   KERNELS  the name of the type's kernels in the instruction set's table.
 *
 * moments.inc.h sums in float64, and proves that it is exact for any data.  sums.inc.h sums in P,
 * which is faster, for a training call; batch_moments.inc.h proves how exact that is, and tests it.
 *
 * Models: llm.c's layernorm for shapes and roles stated at the line, YNNPACK's
 * reductions for fixed-width accumulators. */

#define LANES ((ptrdiff_t)(sizeof(vec) / sizeof(P)))
/* Whether a kernel has one loop for all activations, sources of z and residuals' gradients, which
 * branches inside, instead of one loop for each combination.  True for halves: a loop for each
 * would double the size of the library, and a branch that always goes the same way costs little
 * beside their conversions. */
#define FEW_LOOPS (ISA_FEW_LOOPS || sizeof(T) < sizeof(P))
/* Functions are inlined into the table's entries, so that each variant has a loop of its own. */
#define INLINE ISA_INLINE
#define APART static __attribute__((noinline))

/* --- n values in memory, n up to LANES -------------------------------------- */

INLINE vec NAME(load_some)(const T *p, ptrdiff_t n, vec fill)
{
    return n < LANES ? load_part(p, n, fill) : load(p);
}

INLINE void NAME(store_some)(T *p, ptrdiff_t n, vec a, bool stream_it)
{
    if (n < LANES)
        store_part(p, n, a);
    else if (stream_it)
        stream(p, a);
    else
        store(p, a);
}

/* How many of n values come before the first address that is a multiple of a vector. */
INLINE ptrdiff_t NAME(lead)(const T *p, ptrdiff_t n)
{
    return at_most(n, (ptrdiff_t)(-(size_t)p % (LANES * sizeof(T)) / sizeof(T)));
}

/* --- Parameters of a tile's channels, rounded to the type of a lane --------- */

/* y = act((x - high) * scale + shift (+ residual)), and
 * dx = x_factor * (x - high) + dy_factor * g + constant.
 *
 * high is the mean rounded.  The rest of the mean is in shift and constant: x - high is exact near
 * the mean, so a constant channel gives exactly its bias and a mean of 1e6 loses no digits. */
typedef struct {
    P *high, *scale, *shift, *x_factor, *dy_factor, *constant;
} NAME(params);

/* Those of y in vectors. */
typedef struct {
    vec high, scale, shift;
} NAME(lanes);

/* Those of the tile's channels, from entry i on. */
APART void NAME(round_params)(const bnf_operands *o, bnf_tile tile, ptrdiff_t i, NAME(params) to)
{
    for (ptrdiff_t c = tile.channel0; c < tile.channel1; c++, i++) {
        const double low = o->mean[c] - (double)(P)o->mean[c];
        to.high[i] = (P)o->mean[c];
        to.scale[i] = (P)o->scale[c];
        to.shift[i] = (P)without(o->shift[c], low, o->scale[c]);
    }
}

APART void NAME(round_slopes)(const bnf_operands *o, bnf_tile tile, ptrdiff_t i, NAME(params) to)
{
    for (ptrdiff_t c = tile.channel0; c < tile.channel1; c++, i++) {
        const double low = o->mean[c] - (double)(P)o->mean[c];
        to.x_factor[i] = (P)o->x_factor[c];
        to.dy_factor[i] = (P)o->dy_factor[c];
        to.constant[i] = (P)without(o->constant[c], low, o->x_factor[c]);
    }
}

/* Repeats the parameters of the channels behind them: for rows that are taken at once, and for
 * vectors that begin in the last column. */
INLINE void NAME(repeat)(P *row, ptrdiff_t channels, ptrdiff_t columns)
{
    for (ptrdiff_t i = channels; i < columns + LANES; i++)
        row[i] = row[i - channels];
}

/* Planar: one channel in every lane. */
INLINE NAME(lanes) NAME(broadcast)(NAME(params) p, ptrdiff_t i)
{
    return (NAME(lanes)){set1(p.high[i]), set1(p.scale[i]), set1(p.shift[i])};
}

/* Interleaved: channels side by side. */
INLINE NAME(lanes) NAME(side_by_side)(NAME(params) p, ptrdiff_t i)
{
    return (NAME(lanes)){load(p.high + i), load(p.scale + i), load(p.shift + i)};
}

/* --- The n values at offset i ------------------------------------------------ */

/* 0 in the lanes that are not in memory. */
INLINE vec NAME(centered)(const bnf_operands *o, ptrdiff_t i, ptrdiff_t n, NAME(lanes) p)
{
    return sub(NAME(load_some)((const T *)o->x + i, n, p.high), p.high);
}

/* The pre-activation of d = x - high. */
INLINE vec NAME(affine)(const bnf_operands *o, ptrdiff_t i, ptrdiff_t n, vec d, NAME(lanes) p,
                        bool residual)
{
    const vec z = fmadd(d, p.scale, p.shift);
    if (!residual)
        return z;
    return add(z, NAME(load_some)((const T *)o->residual + i, n, set1(0.0)));
}

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

/* a, but `instead` in the lanes where g is 0. */
INLINE vec NAME(where_not_zero)(vec g, vec a, vec instead)
{
    const vec zero = set1(0.0);
    return select_le(max(g, sub(zero, g)), zero, instead, a);
}

/* The gradient with respect to the pre-activation from that of the output. */
INLINE vec NAME(through_activation)(const bnf_operands *o, ptrdiff_t i, ptrdiff_t n, vec dy, vec d,
                                    NAME(lanes) p, vec slope, variant v)
{
    if (v.z_source == BNF_NO_Z)
        return dy;
    if (v.z_source == BNF_Z_FROM_Y)
        return VEC(activate_gradient)(dy, NAME(load_some)((const T *)o->y + i, n, set1(0.0)), slope,
                                      v);
    const vec z = NAME(affine)(o, i, n, d, p, v.z_source == BNF_Z_FROM_X_RESIDUAL);
    const vec at = bnf_is_from_output(v.activation) ? NAME(as_written)(z) : z;
    return VEC(activate_gradient)(dy, at, slope, v);
}

/* g, the gradient with respect to the pre-activation, 0 in the lanes that are not in memory.  What
 * a mask leaves out may be NaN, whose derivative is, too: there, a dy of 0 gives a g of 0. */
INLINE vec NAME(before_activation)(const bnf_operands *o, ptrdiff_t i, ptrdiff_t n, vec d,
                                   NAME(lanes) p, vec slope, variant v)
{
    const vec dy = NAME(load_some)((const T *)o->dy + i, n, set1(0.0));
    const vec g = NAME(through_activation)(o, i, n, dy, d, p, slope, v);
    return v.masked ? NAME(where_not_zero)(dy, g, dy) : g;
}

#include "moments.inc.h"
#include "sums.inc.h"
#include "batch_moments.inc.h"
#include "masked_moments.inc.h"
#include "grad_sums.inc.h"
#include "writes.inc.h"
#include "apply.inc.h"
#include "moments_and_apply.inc.h"
#include "grad_input.inc.h"

/* This type's part of the table (dispatch.c). */
const bnf_kernels KERNELS[BNF_LAYOUTS] = {
    [BNF_PLANAR] = {NAME(moments_planar), NAME(batch_moments_planar), NAME(masked_moments_planar),
                    NAME(apply_planar), NAME(grad_sums_planar), NAME(grad_input_planar),
                    NAME(moments_and_apply)},
    [BNF_INTERLEAVED] = {NAME(moments_interleaved), NAME(batch_moments_interleaved),
                         NAME(masked_moments_interleaved), NAME(apply_interleaved),
                         NAME(grad_sums_interleaved), NAME(grad_input_interleaved),
                         NULL /* for planes only */},
};
