/* 3. masked_moments: tile -> mean, M2 per channel of the values that a mask counts, each as often
 * as its weight says.  What has weight 0 is not in the sums, whatever it holds.
 *
 * As in moments.inc.h, sums are in float64.  The pivot is a value x_j of the largest weight w_j, so
 * that with W the sum of the n weights, S <= (1 + W / w_j) M2 <= (n + 1) M2, as is proven there. */

#define SWEEPS (sizeof(T) < sizeof(double) ? 1 : 2)

INLINE void NAME(masked_step)(d8 x, d8 weight, d8 pivot, d8 *sum, d8 *square)
{
    const d8 zero = d8_set1(0.0), d = d8_select_le(weight, zero, zero, sub(x, pivot));
    const d8 weighted = mul(weight, d);
    *sum = add(*sum, weighted);
    *square = fmadd(weighted, d, *square);
}

INLINE d8 NAME(widen_weights)(const P *weights, ptrdiff_t n)
{
    return n < WIDE_LANES ? load_wide_part(weights, n, d8_set1(0.0)) : load_wide(weights);
}

INLINE void NAME(masked_run)(const T *x, const P *weights, ptrdiff_t n, double pivot,
                             lane_sums *sums)
{
    const d8 p = d8_set1(pivot);
    lane_sums s = *sums;
    for (; n > WIDE_LANES; n -= 2 * WIDE_LANES, x += 2 * WIDE_LANES, weights += 2 * WIDE_LANES) {
        fetch_ahead(x);
        NAME(masked_step)(load_wide(x), load_wide(weights), p, &s.first[0], &s.second[0]);
        NAME(masked_step)(NAME(widen_some)(x + WIDE_LANES, n - WIDE_LANES, 0.0),
                          NAME(widen_weights)(weights + WIDE_LANES, n - WIDE_LANES), p, &s.first[1],
                          &s.second[1]);
    }
    if (n > 0)
        NAME(masked_step)(NAME(widen_some)(x, n, 0.0), NAME(widen_weights)(weights, n), p,
                          &s.first[0], &s.second[0]);
    *sums = s;
}

/* What a mask counts of a plane's n values: none outside of a range, and in it each as one, if all
 * weights there are 1.  Padded sequences are such ranges. */
typedef struct {
    ptrdiff_t first, length;
    bool as_ones;
} NAME(range);

INLINE NAME(range) NAME(range_of)(const P *weights, ptrdiff_t n)
{
    NAME(range) range = {0, n, true};
    while (range.length > 0 && weights[range.length - 1] == 0)
        range.length--;
    while (range.first < range.length && weights[range.first] == 0)
        range.first++;
    range.length -= range.first;
    for (ptrdiff_t i = 0; i < range.length; i++)
        range.as_ones &= weights[range.first + i] == 1;
    return range;
}

/* Where in the rows o0 to o1 of `length` weights, `stride` apart, the largest one is. */
INLINE ptrdiff_t NAME(heaviest)(const P *weights, ptrdiff_t o0, ptrdiff_t o1, ptrdiff_t stride,
                                ptrdiff_t length, ptrdiff_t *inner)
{
    ptrdiff_t outer = o0;
    *inner = 0;
    for (ptrdiff_t o = o0; o < o1; o++)
        for (ptrdiff_t i = 0; i < length; i++)
            if (weights[o * stride + i] > weights[outer * stride + *inner])
                outer = o, *inner = i;
    return outer;
}

INLINE void NAME(no_moments)(bnf_tile tile, double *mean, double *m2)
{
    for (ptrdiff_t c = tile.channel0; c < tile.channel1; c++)
        mean[c] = m2[c] = 0.0;
}

static void NAME(masked_moments_planar)(const bnf_operands *operands, bnf_tile tile, double count,
                                        double *mean, double *m2)
{
    const bnf_shape shape = operands->shape;
    const ptrdiff_t image = shape.channels * shape.inner, length = tile.inner1 - tile.inner0;
    const ptrdiff_t channels = tile.channel1 - tile.channel0;
    const T *x = (const T *)operands->x + tile.channel0 * shape.inner + tile.inner0;
    const P *weights = (const P *)operands->weights + tile.inner0;
    double pivot[BNF_MAX_PLANAR], first[WIDE_LANES];
    lane_sums sums[BNF_MAX_PLANAR];

    if (count == 0) {
        NAME(no_moments)(tile, mean, m2);
        return;
    }
    ptrdiff_t inner;
    const ptrdiff_t outer =
        NAME(heaviest)(weights, tile.outer0, tile.outer1, shape.inner, length, &inner);
    for (ptrdiff_t c = 0; c < channels; c++) {
        store(first, NAME(pivots)(x + outer * image + c * shape.inner + inner, 1));
        pivot[c] = first[0];
    }
    for (size_t sweep = 0; sweep < SWEEPS; sweep++) {
        for (ptrdiff_t c = 0; c < channels; c++)
            sums[c] = no_sums();
        for (ptrdiff_t o = tile.outer0; o < tile.outer1; o++) {
            const NAME(range) range = NAME(range_of)(weights + o * shape.inner, length);
            const P *own = weights + o * shape.inner + range.first;
            const T *run = x + o * image + range.first;
            for (ptrdiff_t c = 0; c < channels; c++, run += shape.inner)
                if (range.as_ones)
                    NAME(moments_run)(run, range.length, pivot[c], &sums[c]);
                else
                    NAME(masked_run)(run, own, range.length, pivot[c], &sums[c]);
        }
        for (ptrdiff_t c = 0; c < channels; c++) {
            const double sum = total(sums[c].first);
            mean[tile.channel0 + c] = NAME(mean_of)(pivot[c], sum, count);
            m2[tile.channel0 + c] = NAME(m2_of)(sum, total(sums[c].second), count);
            pivot[c] = finite_or_zero(mean[tile.channel0 + c]);
        }
    }
}

INLINE void NAME(masked_strip)(const T *x, const counted_rows *rows, ptrdiff_t n, strip_sums *sums)
{
    const d8 pivot = load(sums->about);
    d8 sum = load(sums->first), square = load(sums->second);
    for (ptrdiff_t r = 0; r < rows->count; r++)
        NAME(masked_step)(NAME(widen_some)(x + rows->at[r], n, 0.0), d8_set1(rows->weight[r]),
                          pivot, &sum, &square);
    store(sums->first, sum);
    store(sums->second, square);
}

/* Rows of weight 0 are not read. */
static void NAME(masked_sweep)(const T *x, const P *weights, bnf_shape shape, bnf_tile tile,
                               strip_sums *sums)
{
    const ptrdiff_t channels = tile.channel1 - tile.channel0;
    for (ptrdiff_t o = tile.outer0; o < tile.outer1;) {
        counted_rows rows = {.count = 0};
        for (; o < tile.outer1 && rows.count < ROWS; o++) {
            if (weights[o] == 0)
                continue;
            rows.at[rows.count] = o * shape.channels;
            rows.weight[rows.count++] = (double)weights[o];
        }
        for (ptrdiff_t c = 0; c < channels; c += WIDE_LANES)
            NAME(masked_strip)(x + c, &rows, at_most(WIDE_LANES, channels - c),
                               &sums[c / WIDE_LANES]);
    }
}

static void NAME(masked_moments_interleaved)(const bnf_operands *operands, bnf_tile tile,
                                             double count, double *mean, double *m2)
{
    const bnf_shape shape = operands->shape;
    const ptrdiff_t channels = tile.channel1 - tile.channel0;
    const T *x = (const T *)operands->x + tile.channel0;
    const P *weights = operands->weights;
    strip_sums sums[BNF_MAX_STRIPS] = {0};

    if (count == 0) {
        NAME(no_moments)(tile, mean, m2);
        return;
    }
    ptrdiff_t none;
    const ptrdiff_t at = NAME(heaviest)(weights, tile.outer0, tile.outer1, 1, 1, &none);
    for (ptrdiff_t i = 0; i < channels; i += WIDE_LANES)
        store(sums[i / WIDE_LANES].about,
              NAME(pivots)(x + at * shape.channels + i, at_most(WIDE_LANES, channels - i)));
    for (size_t sweep = 0; sweep < SWEEPS; sweep++) {
        NAME(masked_sweep)(x, weights, shape, tile, sums);
        for (ptrdiff_t c = tile.channel0, i = 0; c < tile.channel1; c++, i++) {
            strip_sums *s = &sums[i / WIDE_LANES];
            const ptrdiff_t lane = i % WIDE_LANES;
            mean[c] = NAME(mean_of)(s->about[lane], s->first[lane], count);
            m2[c] = NAME(m2_of)(s->first[lane], s->second[lane], count);
            s->about[lane] = finite_or_zero(mean[c]);
            s->first[lane] = s->second[lane] = 0.0;
        }
    }
}
