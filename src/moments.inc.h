/* 1. moments: tile -> mean, M2 per channel, for any data.
 *
 * Sums are in float64, eight lanes for every type, around a pivot that is itself one of the values.
 * For float32 data one pass is then exact enough.  Proof: let x_j be the pivot and S the sum of
 * (x - x_j)^2 over n values.  Then M2 = S - n (mean - x_j)^2.  M2 contains x_j's own term, so
 * M2 >= (mean - x_j)^2 and S <= (n + 1) M2.  The subtraction therefore magnifies the rounding error
 * of S, at most n/16 units of 2^-53, by at most n + 1: 2e-9 for a block of 16384 planar values,
 * 3e-8 for 16384 rows of one lane, for any data in any order.  float16 and bfloat16 data are
 * float32 data with fewer digits.  float64 data have no spare bits, so a block is read twice while
 * the caches hold it: the mean of the first pass is the pivot of the second. */

#define FETCHED 16384 /* bytes ahead of rows that are summed */
#define SWEEPS (sizeof(T) < sizeof(double) ? 1 : 2)

/* The first n values as pivots.  0 replaces a value that is not finite, so that
 * an infinity in the data gives an infinite mean and not NaN. */
INLINE d8 NAME(pivots)(const T *x, ptrdiff_t n)
{
    const d8 zero = d8_set1(0.0);
    const d8 value = n < WIDE_LANES ? load_wide_part(x, n, zero) : load_wide(x);
    return d8_select_le(sub(value, value), zero, value, zero);
}

INLINE void NAME(moments_step)(d8 x, d8 pivot, d8 *sum, d8 *square)
{
    const d8 d = sub(x, pivot);
    *sum = add(*sum, d);
    *square = fmadd(d, d, *square);
}

/* Lanes past the end are filled with the pivot, so they add nothing. */
INLINE d8 NAME(widen_some)(const T *x, ptrdiff_t n, double pivot)
{
    return n < WIDE_LANES ? load_wide_part(x, n, d8_set1(pivot)) : load_wide(x);
}

INLINE void NAME(moments_run)(const T *x, ptrdiff_t n, double pivot, lane_sums *sums)
{
    const d8 p = d8_set1(pivot);
    lane_sums s = *sums;
    for (; n >= 2 * WIDE_LANES; n -= 2 * WIDE_LANES, x += 2 * WIDE_LANES) {
        fetch_ahead(x);
        NAME(moments_step)(load_wide(x), p, &s.first[0], &s.second[0]);
        NAME(moments_step)(load_wide(x + WIDE_LANES), p, &s.first[1], &s.second[1]);
    }
    if (n > 0)
        NAME(moments_step)(NAME(widen_some)(x, n, pivot), p, &s.first[0], &s.second[0]);
    if (n > WIDE_LANES)
        NAME(moments_step)(NAME(widen_some)(x + WIDE_LANES, n - WIDE_LANES, pivot), p, &s.first[1],
                           &s.second[1]);
    *sums = s;
}

/* Mean and M2 from the sums of d = x - pivot and of d^2 over n values.  Where
 * rounding makes M2 negative, it is set to 0; NaN stays NaN. */
INLINE double NAME(mean_of)(double pivot, double sum, double n) { return pivot + sum / n; }

INLINE double NAME(m2_of)(double sum, double square, double n)
{
    const double m2 = square - sum * (sum / n);
    return m2 < 0 ? 0.0 : m2;
}

/* x is (outer, channels, inner).  It is read image by image, since a tile's
 * channels are one contiguous run in each. */
static void NAME(moments_planar)(const bnf_operands *operands, bnf_tile tile, double *mean,
                                 double *m2)
{
    const bnf_shape shape = operands->shape;
    const ptrdiff_t image = shape.channels * shape.inner, length = tile.inner1 - tile.inner0;
    const ptrdiff_t channels = tile.channel1 - tile.channel0;
    const double n = (double)((tile.outer1 - tile.outer0) * length);
    const T *x = (const T *)operands->x + tile.channel0 * shape.inner + tile.inner0;
    double pivot[BNF_MAX_PLANAR];
    lane_sums sums[BNF_MAX_PLANAR];

    for (ptrdiff_t c = 0; c < channels; c++) {
        double first[WIDE_LANES];
        store(first, NAME(pivots)(x + tile.outer0 * image + c * shape.inner, 1));
        pivot[c] = first[0];
    }
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
            pivot[c] = finite_or_zero(mean[tile.channel0 + c]);
        }
    }
}

INLINE void NAME(moments_strip)(const T *x, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t n,
                                strip_sums *sums)
{
    const d8 pivot = load(sums->about);
    d8 sum = load(sums->first), square = load(sums->second);
    ISA_UNROLL
    for (ptrdiff_t r = 0; r < rows; r++) {
        const T *row = x + r * stride;
        const d8 wide = n < WIDE_LANES ? load_wide_part(row, n, d8_set1(0.0)) : load_wide(row);
        NAME(moments_step)(wide, pivot, &sum, &square);
    }
    store(sums->first, sum);
    store(sums->second, square);
}

/* Whole rows follow one another in memory, and are fetched in that order, from `later` on. */
INLINE void NAME(moments_rows)(const T *x, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t channels,
                               strip_sums *sums)
{
    const bool whole = channels == stride;
    const T *later = x + at_least(FETCHED / (ptrdiff_t)sizeof(T), whole ? rows * stride : 0);
    for (; channels >= WIDE_LANES; channels -= WIDE_LANES, x += WIDE_LANES, sums++) {
        ISA_UNROLL
        for (ptrdiff_t r = 0; r < rows; r++)
            fetch(whole ? later + r * WIDE_LANES : x + (rows + r) * stride);
        later += rows * WIDE_LANES;
        NAME(moments_strip)(x, stride, rows, WIDE_LANES, sums);
    }
    if (channels)
        NAME(moments_strip)(x, stride, rows, channels, sums);
}

/* One pass.  Rows left over when several are taken at once have a copy of the
 * channels of their own, after the others. */
static void NAME(moments_sweep)(const T *x, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t at_once,
                                ptrdiff_t channels, strip_sums *sums)
{
    const ptrdiff_t step = at_once * stride, columns = at_once * channels;
    for (; rows >= ROWS * at_once; rows -= ROWS * at_once, x += ROWS * step)
        NAME(moments_rows)(x, step, ROWS, columns, sums);
    for (; rows >= at_once; rows -= at_once, x += step)
        NAME(moments_rows)(x, step, 1, columns, sums);
    for (; rows > 0; rows--, x += stride)
        NAME(moments_rows)(x, stride, 1, channels, sums + columns / WIDE_LANES);
}

/* x is (outer, channels). */
static void NAME(moments_interleaved)(const bnf_operands *operands, bnf_tile tile, double *mean,
                                      double *m2)
{
    const bnf_shape shape = operands->shape;
    const ptrdiff_t rows = tile.outer1 - tile.outer0, channels = tile.channel1 - tile.channel0;
    const ptrdiff_t at_once = rows_at_once(shape, tile);
    const ptrdiff_t columns = channels * (at_once > 1 ? at_once + 1 : 1);
    const T *x = (const T *)operands->x + tile.outer0 * shape.channels + tile.channel0;
    strip_sums sums[BNF_MAX_STRIPS] = {0};

    for (ptrdiff_t i = 0; i < channels; i += WIDE_LANES)
        store(sums[i / WIDE_LANES].about, NAME(pivots)(x + i, at_most(WIDE_LANES, channels - i)));
    for (size_t sweep = 0; sweep < SWEEPS; sweep++) {
        copy_about(sums, columns, channels);
        NAME(moments_sweep)(x, shape.channels, rows, at_once, channels, sums);
        fold_copies(sums, columns, channels);
        for (ptrdiff_t c = tile.channel0, i = 0; c < tile.channel1; c++, i++) {
            strip_sums *s = &sums[i / WIDE_LANES];
            mean[c] =
                NAME(mean_of)(s->about[i % WIDE_LANES], s->first[i % WIDE_LANES], (double)rows);
            m2[c] = NAME(m2_of)(s->first[i % WIDE_LANES], s->second[i % WIDE_LANES], (double)rows);
            s->about[i % WIDE_LANES] = finite_or_zero(mean[c]);
            s->first[i % WIDE_LANES] = s->second[i % WIDE_LANES] = 0.0;
        }
    }
}
