/* 5. grad_sums: tile -> sum of g, sum of g * (x - mean) per channel, where g is
 * the gradient with respect to the pre-activation. */

/* Smaller sums, of n products, may be of denormals. */
#define LEAST_PRODUCT 1e-30

/* Whether the products neither overflowed nor became denormal.  All are 0 in a channel without
 * gradients. */
INLINE bool NAME(is_normal)(double sum, double dot, double n)
{
    const double size = fabs(dot);
    return (size >= n * LEAST_PRODUCT && size < INFINITY) || (sum == 0 && dot == 0);
}

/* Adds n values, of the channels of p and mean, to sums in float64. */
INLINE NAME(sums)
    NAME(with_wide)(NAME(work) w, ptrdiff_t i, ptrdiff_t n, NAME(lanes) p, wide mean, NAME(sums) s)
{
    const vec d = NAME(centered)(w.o, i, n, p);
    const vec g = NAME(before_activation)(w.o, i, n, d, p, w.slope, w.v);
    const vec x = NAME(load_some)((const T *)w.o->x + i, n, p.high);
    const wide f = sub(widen(w.v.masked ? NAME(where_not_zero)(g, x, p.high) : x), mean);
    return (NAME(sums)){add(s.first, widen(g)), fmadd(widen(g), f, s.second)};
}

/* One planar channel in float64, for products that the type of a lane does not hold. */
APART void NAME(grad_sums_of_channel)(const NAME(work) * w, bnf_tile tile, ptrdiff_t c,
                                      const NAME(lanes) * p, double *sum, double *dot)
{
    const bnf_shape shape = w->o->shape;
    const wide mean = wide_set1(w->o->mean[c]), zero = wide_set1(0.0);
    NAME(sums) s = {zero, zero};
    for (ptrdiff_t o = tile.outer0; o < tile.outer1; o++) {
        const ptrdiff_t plane = (o * shape.channels + c) * shape.inner;
        for (ptrdiff_t i = tile.inner0; i < tile.inner1; i += LANES)
            s = NAME(with_wide)(*w, plane + i, at_most(LANES, tile.inner1 - i), *p, mean, s);
    }
    sum[c] = wide_sum(s.first);
    dot[c] = wide_sum(s.second);
}

/* The same for those of n channels side by side that are marked. */
APART void NAME(grad_sums_of_strip)(const NAME(work) * w, bnf_tile tile, ptrdiff_t c, ptrdiff_t n,
                                    const NAME(lanes) * p, const bool *again, double *sum,
                                    double *dot)
{
    double first[LANES] = {0}, second[LANES] = {0};
    for (ptrdiff_t i = 0; i < n; i++)
        first[i] = w->o->mean[c + i];
    const wide mean = wide_load(first), zero = wide_set1(0.0);
    NAME(sums) s = {zero, zero};
    for (ptrdiff_t o = tile.outer0; o < tile.outer1; o++)
        s = NAME(with_wide)(*w, o * w->o->shape.channels + c, n, *p, mean, s);
    wide_store(first, s.first);
    wide_store(second, s.second);
    for (ptrdiff_t i = 0; i < n; i++)
        if (again[i])
            sum[c + i] = first[i], dot[c + i] = second[i];
}

/* Rounded parameters of the channels of a tile that is summed, and room to load a whole vector of
 * the last ones. */
typedef struct {
    P high[BNF_MAX_INTERLEAVED + LANES], scale[BNF_MAX_INTERLEAVED + LANES],
        shift[BNF_MAX_INTERLEAVED + LANES];
} NAME(centers);

INLINE void NAME(grad_sums_checked)(NAME(work) w, bnf_tile tile, NAME(params) params, double *sum,
                                    double *dot)
{
    const ptrdiff_t step = w.v.layout == BNF_PLANAR ? 1 : LANES;
    const double n = (double)((tile.outer1 - tile.outer0) * (tile.inner1 - tile.inner0));
    for (ptrdiff_t c = tile.channel0; c < tile.channel1; c += step) {
        const ptrdiff_t i = c - tile.channel0, count = at_most(step, tile.channel1 - c);
        bool again[LANES], any = false;
        for (ptrdiff_t k = 0; k < count; k++) {
            dot[c + k] -= (w.o->mean[c + k] - (double)params.high[i + k]) * sum[c + k];
            again[k] = !NAME(is_normal)(sum[c + k], dot[c + k], n);
            any |= again[k];
        }
        if (!any)
            continue;
        const NAME(lanes) p =
            w.v.layout == BNF_PLANAR ? NAME(broadcast)(params, i) : NAME(side_by_side)(params, i);
        if (w.v.layout == BNF_PLANAR)
            NAME(grad_sums_of_channel)(&w, tile, c, &p, sum, dot);
        else
            NAME(grad_sums_of_strip)(&w, tile, c, count, &p, again, sum, dot);
    }
}

INLINE void NAME(grad_sums_as)(const bnf_operands *operands, bnf_tile tile, double *sum,
                               double *dot, variant v)
{
    /* A local copy: no store can change it, so the compiler keeps it in registers. */
    const bnf_operands own = *operands;
    NAME(centers) centers;
    const NAME(params)
        params = {.high = centers.high, .scale = centers.scale, .shift = centers.shift};
    const ptrdiff_t channels = tile.channel1 - tile.channel0;
    NAME(round_params)(&own, tile, 0, params);
    NAME(repeat)(params.high, channels, channels);
    NAME(repeat)(params.scale, channels, channels);
    NAME(repeat)(params.shift, channels, channels);
    v.backward = true;
    const NAME(work) w = {.o = &own, .slope = set1(own.slope), .v = v};
    NAME(sum_tile)(w, tile, params, sum, dot);
    NAME(grad_sums_checked)(w, tile, params, sum, dot);
}

INLINE void NAME(grad_sums_activated)(const bnf_operands *o, bnf_tile tile, double *sum,
                                      double *dot, variant v)
{
    if (o->z_source == BNF_Z_FROM_X_RESIDUAL)
        NAME(grad_sums_as)(o, tile, sum, dot, (v.z_source = BNF_Z_FROM_X_RESIDUAL, v));
    else if (o->z_source == BNF_Z_FROM_Y && !v.smooth && bnf_is_from_output(v.activation))
        NAME(grad_sums_as)(o, tile, sum, dot, (v.z_source = BNF_Z_FROM_Y, v));
    else
        NAME(grad_sums_as)(o, tile, sum, dot, (v.z_source = BNF_Z_FROM_X, v));
}

/* One loop for all. */
INLINE void NAME(grad_sums_of_any)(const bnf_operands *o, bnf_tile tile, double *sum, double *dot,
                                   variant v)
{
    v.activation = o->activation, v.smooth = bnf_is_smooth(o->activation);
    v.z_source = o->z_source;
    NAME(grad_sums_as)(o, tile, sum, dot, v);
}

INLINE void NAME(grad_sums)(const bnf_operands *o, bnf_tile tile, double *sum, double *dot,
                            bnf_layout layout)
{
    variant v = {.layout = layout};
    if (FEW_LOOPS) {
        NAME(grad_sums_of_any)(o, tile, sum, dot, (v.masked = o->weights != NULL, v));
        return;
    }
    if (o->weights) {
        NAME(grad_sums_of_any)(o, tile, sum, dot, (v.masked = true, v));
        return;
    }
    if (bnf_is_smooth(o->activation)) {
        v.activation = o->activation, v.smooth = true;
        NAME(grad_sums_activated)(o, tile, sum, dot, v);
        return;
    }
    switch (o->activation) {
#define SMOOTH(...)
#define ACTIVATION(CODE, ...)                                                         \
    case BNF_##CODE:                                                                  \
        NAME(grad_sums_activated)(o, tile, sum, dot, (v.activation = BNF_##CODE, v)); \
        break;
#include "activations.inc"
    default:
        NAME(grad_sums_as)(o, tile, sum, dot, v);
    }
}

static void NAME(grad_sums_planar)(const bnf_operands *o, bnf_tile tile, double *sum, double *dot)
{
    NAME(grad_sums)(o, tile, sum, dot, BNF_PLANAR);
}

static void NAME(grad_sums_interleaved)(const bnf_operands *o, bnf_tile tile, double *sum,
                                        double *dot)
{
    NAME(grad_sums)(o, tile, sum, dot, BNF_INTERLEAVED);
}
