/* 3. grad_sums: tile -> sum of g, sum of g * (x - mean) per channel, where g is
 * the gradient with respect to the pre-activation. */

INLINE void NAME(grad_sums_step)(const bnf_backward *b, ptrdiff_t i, ptrdiff_t n, d8 mean,
                                 NAME(affine_vec) a, vec slope, variant v, d8 *sum, d8 *dot)
{
    const T *x = (const T *)b->x + i, *dy = (const T *)b->dy + i;
    const d8 wide_x = n < LANES ? widen(NAME(load_some)(x, n)) : load_wide(x);
    const d8 g = n < LANES || v.z_source != BNF_NO_Z
                     ? widen(NAME(before_activation)(b, i, n, a, slope, v))
                     : load_wide(dy);
    *sum = add(*sum, g);
    *dot = fmadd(g, sub(wide_x, mean), *dot);
}

INLINE void NAME(grad_sums_run)(const bnf_backward *b, ptrdiff_t i, ptrdiff_t end, double mean,
                                NAME(affine_vec) a, vec slope, variant v, lane_sums *sums)
{
    const d8 m = d8_set1(mean);
    lane_sums s = *sums;
    for (; i + 2 * LANES <= end; i += 2 * LANES) {
        fetch_ahead((const T *)b->x + i);
        fetch_ahead((const T *)b->dy + i);
        NAME(grad_sums_step)(b, i, LANES, m, a, slope, v, &s.first[0], &s.second[0]);
        NAME(grad_sums_step)(b, i + LANES, LANES, m, a, slope, v, &s.first[1], &s.second[1]);
    }
    if (i < end)
        NAME(grad_sums_step)(b, i, at_most(LANES, end - i), m, a, slope, v, &s.first[0],
                             &s.second[0]);
    if (i + LANES < end)
        NAME(grad_sums_step)(b, i + LANES, end - i - LANES, m, a, slope, v, &s.first[1],
                             &s.second[1]);
    *sums = s;
}

INLINE void NAME(grad_sums_planar_as)(const bnf_backward *operands, bnf_tile tile, double *sum,
                                      double *dot, variant v)
{
    const bnf_backward own = *operands, *b = &own; /* as in apply */
    NAME(affine) rounded;
    NAME(round_affine)(b->mean, b->scale, b->shift, tile, 1, &rounded);
    const vec slope = set1(b->slope);
    lane_sums sums[BNF_MAX_PLANAR];
    for (ptrdiff_t c = 0; c < tile.channel1 - tile.channel0; c++)
        sums[c] = no_sums();
    for (ptrdiff_t o = tile.outer0; o < tile.outer1; o++)
        for (ptrdiff_t c = tile.channel0; c < tile.channel1; c++) {
            const ptrdiff_t plane = (o * b->shape.channels + c) * b->shape.inner;
            NAME(grad_sums_run)(b, plane + tile.inner0, plane + tile.inner1, b->mean[c],
                                NAME(broadcast_affine)(&rounded, c - tile.channel0), slope, v,
                                &sums[c - tile.channel0]);
        }
    for (ptrdiff_t c = tile.channel0; c < tile.channel1; c++) {
        sum[c] = total(sums[c - tile.channel0].first);
        dot[c] = total(sums[c - tile.channel0].second);
    }
}

INLINE void NAME(grad_sums_strip)(const bnf_backward *b, ptrdiff_t i, ptrdiff_t stride,
                                  ptrdiff_t rows, ptrdiff_t n, NAME(affine_vec) a, vec slope,
                                  variant v, strip_sums *sums)
{
    const d8 mean = load(sums->about);
    d8 sum = load(sums->first), dot = load(sums->second);
    if (n < LANES) { /* at most one strip per row: not worth another unrolled loop */
        for (ptrdiff_t r = 0; r < rows; r++)
            NAME(grad_sums_step)(b, i + r * stride, n, mean, a, slope, v, &sum, &dot);
    } else {
        ISA_UNROLL_ROWS
        for (ptrdiff_t r = 0; r < rows; r++)
            NAME(grad_sums_step)(b, i + r * stride, LANES, mean, a, slope, v, &sum, &dot);
    }
    store(sums->first, sum);
    store(sums->second, dot);
}

INLINE void NAME(grad_sums_rows)(const bnf_backward *b, ptrdiff_t row, ptrdiff_t stride,
                                 ptrdiff_t rows, ptrdiff_t columns, const NAME(affine) * rounded,
                                 vec slope, variant v, strip_sums *sums)
{
    ptrdiff_t i = 0;
    for (; i + LANES <= columns; i += LANES, sums++)
        NAME(grad_sums_strip)(b, row + i, stride, rows, LANES, NAME(load_affine)(rounded, i, LANES),
                              slope, v, sums);
    if (i < columns)
        NAME(grad_sums_strip)(b, row + i, stride, rows, columns - i,
                              NAME(load_affine)(rounded, i, columns - i), slope, v, sums);
}

INLINE void NAME(grad_sums_interleaved_as)(const bnf_backward *operands, bnf_tile tile, double *sum,
                                           double *dot, variant v)
{
    const bnf_backward own = *operands, *b = &own; /* as in apply */
    ptrdiff_t at_once = rows_at_once(b->shape, tile);
    const ptrdiff_t channels = tile.channel1 - tile.channel0, columns = at_once * channels;
    NAME(affine) rounded;
    NAME(round_affine)(b->mean, b->scale, b->shift, tile, at_once, &rounded);
    const vec slope = set1(b->slope);
    const ptrdiff_t stride = b->shape.channels;
    strip_sums sums[BNF_MAX_STRIPS] = {0};
    for (ptrdiff_t c = 0; c < channels; c++)
        sums[c / LANES].about[c % LANES] = b->mean[tile.channel0 + c];
    copy_about(sums, columns, channels);
    ptrdiff_t o = tile.outer0;
    for (; o + ROWS * at_once <= tile.outer1; o += ROWS * at_once)
        NAME(grad_sums_rows)(b, o * stride + tile.channel0, at_once * stride, ROWS, columns,
                             &rounded, slope, v, sums);
    for (; o < tile.outer1; o += at_once) {
        if (o + at_once > tile.outer1)
            at_once = 1; /* the last rows go into the sums of the first copy */
        NAME(grad_sums_rows)(b, o * stride + tile.channel0, at_once * stride, 1, at_once * channels,
                             &rounded, slope, v, sums);
    }
    fold_copies(sums, columns, channels);
    for (ptrdiff_t c = 0; c < channels; c++) {
        sum[tile.channel0 + c] = sums[c / LANES].first[c % LANES];
        dot[tile.channel0 + c] = sums[c / LANES].second[c % LANES];
    }
}

INLINE void NAME(grad_sums_as)(const bnf_backward *b, bnf_tile tile, double *sum, double *dot,
                               variant v)
{
    if (v.layout == BNF_PLANAR)
        NAME(grad_sums_planar_as)(b, tile, sum, dot, v);
    else
        NAME(grad_sums_interleaved_as)(b, tile, sum, dot, v);
}

INLINE void NAME(grad_sums_activated)(const bnf_backward *b, bnf_tile tile, double *sum,
                                      double *dot, variant v)
{
    if (b->z_source == BNF_Z_FROM_X_RESIDUAL)
        NAME(grad_sums_as)(b, tile, sum, dot, (v.z_source = BNF_Z_FROM_X_RESIDUAL, v));
    else if (b->z_source == BNF_Z_FROM_Y && !v.smooth && bnf_is_from_output(v.activation))
        NAME(grad_sums_as)(b, tile, sum, dot, (v.z_source = BNF_Z_FROM_Y, v));
    else
        NAME(grad_sums_as)(b, tile, sum, dot, (v.z_source = BNF_Z_FROM_X, v));
}

INLINE void NAME(grad_sums)(const bnf_backward *b, bnf_tile tile, double *sum, double *dot,
                            bnf_layout layout)
{
    variant v = {.layout = layout};
    if (FEW_LOOPS) {
        if (b->activation == BNF_LINEAR)
            NAME(grad_sums_as)(b, tile, sum, dot, v);
        else
            NAME(grad_sums_as)(b, tile, sum, dot,
                               (v.activation = b->activation, v.z_source = b->z_source,
                                v.smooth = bnf_is_smooth(b->activation), v));
        return;
    }
    if (bnf_is_smooth(b->activation)) {
        v.activation = b->activation, v.smooth = true;
        NAME(grad_sums_activated)(b, tile, sum, dot, v);
        return;
    }
    switch (b->activation) {
#define SMOOTH(...)
#define ACTIVATION(CODE, ...)                                                         \
    case BNF_##CODE:                                                                  \
        NAME(grad_sums_activated)(b, tile, sum, dot, (v.activation = BNF_##CODE, v)); \
        break;
#include "activations.inc"
    default:
        NAME(grad_sums_as)(b, tile, sum, dot, v);
    }
}

static void NAME(grad_sums_planar)(const bnf_backward *b, bnf_tile tile, double *sum, double *dot)
{
    NAME(grad_sums)(b, tile, sum, dot, BNF_PLANAR);
}

static void NAME(grad_sums_interleaved)(const bnf_backward *b, bnf_tile tile, double *sum,
                                        double *dot)
{
    NAME(grad_sums)(b, tile, sum, dot, BNF_INTERLEAVED);
}
