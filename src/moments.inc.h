/* 1. moments: tile -> mean, M2 per channel */

INLINE double NAME(finite_or_zero)(T value)
{
    return value - value == 0 ? (double)value : 0.0; /* so that an infinity stays one in the mean */
}

INLINE void NAME(moments_step)(d8 x, d8 pivot, d8 *sum, d8 *square)
{
    const d8 d = sub(x, pivot);
    *sum = add(*sum, d);
    *square = fmadd(d, d, *square);
}

/* Lanes past the end are filled with the pivot, and add nothing. */
INLINE d8 NAME(widen_some)(const T *x, ptrdiff_t n, double pivot)
{
    return n < LANES ? widen(load_part(x, n, set1(pivot))) : load_wide(x);
}

INLINE void NAME(moments_run)(const T *x, ptrdiff_t n, double pivot, lane_sums *sums)
{
    const d8 p = d8_set1(pivot);
    lane_sums s = *sums;
    for (; n >= 2 * LANES; n -= 2 * LANES, x += 2 * LANES) {
        NAME(moments_step)(load_wide(x), p, &s.first[0], &s.second[0]);
        NAME(moments_step)(load_wide(x + LANES), p, &s.first[1], &s.second[1]);
    }
    if (n > 0)
        NAME(moments_step)(NAME(widen_some)(x, n, pivot), p, &s.first[0], &s.second[0]);
    if (n > LANES)
        NAME(moments_step)(NAME(widen_some)(x + LANES, n - LANES, pivot), p, &s.first[1],
                           &s.second[1]);
    *sums = s;
}

/* From the sums of d = x - pivot and of d^2 over n values.  A sum of squares is
 * not negative, though its rounding may be; NaN is left alone. */
INLINE double NAME(mean_of)(double pivot, double sum, double n) { return pivot + sum / n; }

INLINE double NAME(m2_of)(double sum, double square, double n)
{
    const double m2 = square - sum * (sum / n);
    return m2 < 0 ? 0.0 : m2;
}

/* x (outer, channels, inner): image after image, since a tile's channels are
 * one contiguous run in each. */
static void NAME(moments_planar)(const void *data, bnf_shape shape, bnf_tile tile, double *mean,
                                 double *m2)
{
    const ptrdiff_t image = shape.channels * shape.inner, length = tile.inner1 - tile.inner0;
    const ptrdiff_t channels = tile.channel1 - tile.channel0;
    const double n = (double)((tile.outer1 - tile.outer0) * length);
    const T *x = (const T *)data + tile.channel0 * shape.inner + tile.inner0;
    double pivot[BNF_MAX_PLANAR];
    lane_sums sums[BNF_MAX_PLANAR];

    for (ptrdiff_t c = 0; c < channels; c++)
        pivot[c] = NAME(finite_or_zero)(x[tile.outer0 * image + c * shape.inner]);
    for (size_t sweep = 0; sweep < SWEEPS; sweep++) {
        for (ptrdiff_t c = 0; c < channels; c++)
            sums[c] = no_sums();
        for (ptrdiff_t o = tile.outer0; o < tile.outer1; o++)
            for (ptrdiff_t c = 0; c < channels; c++)
                NAME(moments_run)(x + o * image + c * shape.inner, length, pivot[c], &sums[c]);
        for (ptrdiff_t c = 0; c < channels; c++) {
            const double sum = total(sums[c].first);
            mean[tile.channel0 + c] = NAME(mean_of)(pivot[c], sum, n);
            m2[tile.channel0 + c] = NAME(m2_of)(sum, total(sums[c].second), n);
            pivot[c] = NAME(finite_or_zero)((T)mean[tile.channel0 + c]);
        }
    }
}

INLINE void NAME(moments_strip)(const T *x, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t n,
                                const double *pivot, double *sum, double *square)
{
    const d8 p = load(pivot);
    d8 s = load(sum), q = load(square);
    for (ptrdiff_t r = 0; r < rows; r++, x += stride) {
        const d8 wide = n < LANES ? widen(NAME(load_some)(x, n)) : load_wide(x);
        NAME(moments_step)(wide, p, &s, &q);
    }
    store(sum, s);
    store(square, q);
}

/* x (outer, channels): a few rows at a time, the sums of the tile's channels in L1. */
static void NAME(moments_interleaved)(const void *data, bnf_shape shape, bnf_tile tile,
                                      double *mean, double *m2)
{
    const ptrdiff_t stride = shape.channels, channels = tile.channel1 - tile.channel0;
    const double n = (double)(tile.outer1 - tile.outer0);
    const T *x = (const T *)data + tile.channel0;
    double pivot[BNF_MAX_INTERLEAVED + LANES] = {0};
    double sum[BNF_MAX_INTERLEAVED + LANES], square[BNF_MAX_INTERLEAVED + LANES];

    for (ptrdiff_t c = 0; c < channels; c++)
        pivot[c] = NAME(finite_or_zero)(x[tile.outer0 * stride + c]);
    for (size_t sweep = 0; sweep < SWEEPS; sweep++) {
        for (ptrdiff_t c = 0; c < channels + LANES; c++)
            sum[c] = square[c] = 0.0;
        for (ptrdiff_t o = tile.outer0; o < tile.outer1; o += MOMENTS_ROWS) {
            const ptrdiff_t rows = at_most(MOMENTS_ROWS, tile.outer1 - o);
            ptrdiff_t c = 0;
            for (; c + LANES <= channels; c += LANES)
                NAME(moments_strip)(x + o * stride + c, stride, rows, LANES, pivot + c, sum + c,
                                    square + c);
            if (c < channels)
                NAME(moments_strip)(x + o * stride + c, stride, rows, channels - c, pivot + c,
                                    sum + c, square + c);
        }
        for (ptrdiff_t c = 0; c < channels; c++) {
            mean[tile.channel0 + c] = NAME(mean_of)(pivot[c], sum[c], n);
            m2[tile.channel0 + c] = NAME(m2_of)(sum[c], square[c], n);
            pivot[c] = NAME(finite_or_zero)((T)mean[tile.channel0 + c]);
        }
    }
}
