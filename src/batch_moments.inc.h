/* 2. batch_moments: tile -> mean, M2 per channel of a training call, in trees of float32 around a
 * pivot: the mean of values at fixed places of the tile.  A pivot may be a bad one, so it is tested
 * afterwards.  If it is, the channel is summed again by moments.inc.h.  float64 data have no spare
 * type to be widened into, and take moments.inc.h at once.
 *
 * How exact that is.  u is 2^-24; a block has n values x of mean m and deviation s, and the pivot
 * p; r = |m - p| / s, k = sqrt(1 + r^2).  The trees take d = x - p rounded, that is, the exact
 * differences of some x' with |x' - x| <= u |x - p|.  Let M2 be that of the whole call, W the part
 * of it within blocks, B that between them, W + B = M2.
 *
 * - The root of M2 is a norm of centred data.  Taking x' for x moves it by at most u k sqrt(W),
 *   and M2 by 2 u k sqrt(W M2).
 * - A square is rounded a = 4 times: as a product, by the fma that adds its neighbour's, and by two
 *   additions.
 *   All squares of a block sum to n s^2 k^2, so M2 is off by at most a u k^2 W.
 * - A difference is rounded b = 3 times by additions, so a block's sum is off by at most
 *   b u n s k.  The sum enters M2 through the block's mean and the merge: by 2 |p - mean of the
 *   call| times its error, in all 2 b u k sqrt(W) (sqrt(B) + r sqrt(W)).
 *
 * With W = c^2 M2 that is u [a k^2 c^2 + 2 b k c (sqrt(1 - c^2) + r c) + 2 k c].  For r^2 <= 1/2 it
 * is largest at 14.65 u.  What follows is in float64: 0.06 u at a mean of 1e6 deviations, at most
 * 1.4 u at 1e7 and 65536 blocks.  So the variance is within 16.05 u, less than 1e-6, for any data
 * in any order.  (Beyond 1e7 deviations d is a small whole number of last places of x, exact like
 * its sums, which leaves more to the merge: up to 1e8 deviations and 512 blocks.)
 *
 * The test measures r by the sums themselves; their errors move it by 3e-6 of its limit.  Squares
 * that overflow make m2 infinite, NaN passes no comparison, and denormal squares, off by 2^-150
 * each, are too small against LEAST_VARIANCE to matter.
 *
 * tests/test_batch_variance.py tries to break it. */

/* (m - p)^2 is at most this share of the variance. */
#define MOST_OFF 0.5
#define LEAST_VARIANCE 1e-30

/* Whether sums of d = x - pivot and of d^2 over n values are as exact as is proven above. */
INLINE bool NAME(is_exact)(double sum, double square, double n)
{
    const double off = sum * (sum / n), m2 = square - off;
    return off <= MOST_OFF * m2 && m2 > n * LEAST_VARIANCE && m2 < INFINITY;
}

/* Puts mean and M2 in place of those sums, and returns whether they are exact. */
INLINE bool NAME(settle)(P pivot, double n, double *mean, double *m2)
{
    const double sum = *mean, square = *m2;
    *mean = NAME(mean_of)((double)pivot, sum, n);
    *m2 = NAME(m2_of)(sum, square, n);
    return NAME(is_exact)(sum, square, n);
}

INLINE P NAME(pivot_of)(double sum, ptrdiff_t n)
{
    const P pivot = (P)(sum / (double)n);
    return pivot - pivot == 0 ? pivot : 0;
}

#define MOST_PLACES 64
/* In shorter blocks a pivot and its test take longer than float32 saves: they are moments.inc.h's.
 */
#define SHORT_CHANNEL 256
#define SHORT_ROWS 64

/* A sum of eight vectors, exact if all are equal. */
INLINE vec NAME(sum_of_eight)(const T *x, const ptrdiff_t *at, ptrdiff_t n)
{
    const vec zero = set1(0.0);
    vec sum[8];
    ISA_UNROLL
    for (int k = 0; k < 8; k++)
        sum[k] = NAME(load_some)(x + at[k], n, zero);
    return add(add(add(sum[0], sum[1]), add(sum[2], sum[3])),
               add(add(sum[4], sum[5]), add(sum[6], sum[7])));
}

/* Planar: a power of two of values at each place, LANES if a plane has so many. */
APART void NAME(pivots_planar)(const bnf_operands *o, bnf_tile tile, P *pivot)
{
    const ptrdiff_t length = tile.inner1 - tile.inner0;
    const ptrdiff_t values = (tile.outer1 - tile.outer0) * length;
    const ptrdiff_t places = values < 4096 ? 8 : 16;
    const ptrdiff_t image = o->shape.channels * o->shape.inner;
    ptrdiff_t n = LANES, at[16];
    while (n > length)
        n /= 2;
    for (ptrdiff_t k = 0; k < places; k++) {
        const ptrdiff_t i = place(k, places, values);
        at[k] = i / length * image + at_most(length - n, i % length);
    }
    const T *x = (const T *)o->x + tile.outer0 * image + tile.inner0;
    for (ptrdiff_t c = tile.channel0; c < tile.channel1; c++) {
        vec sum = NAME(sum_of_eight)(x + c * o->shape.inner, at, n);
        if (places == 16)
            sum = add(sum, NAME(sum_of_eight)(x + c * o->shape.inner, at + 8, n));
        pivot[c - tile.channel0] = NAME(pivot_of)(wide_sum(widen(sum)), places * n);
    }
}

INLINE ptrdiff_t NAME(values_of_channel)(bnf_tile tile)
{
    return (tile.outer1 - tile.outer0) * (tile.inner1 - tile.inner0);
}

INLINE void NAME(moments_about_pivots)(const bnf_operands *o, bnf_tile tile, double *mean,
                                       double *m2, NAME(writer) * writer)
{
    const double n = (double)NAME(values_of_channel)(tile);
    P pivot[BNF_MAX_PLANAR];
    NAME(pivots_planar)(o, tile, pivot);
    const NAME(params) params = {.high = pivot};
    const NAME(work) w = {.o = o, .v = {.layout = BNF_PLANAR}};
    NAME(sum_planar)(w, tile, params, mean, m2, writer);
    for (ptrdiff_t c = tile.channel0; c < tile.channel1; c++) {
        if (NAME(settle)(pivot[c - tile.channel0], n, &mean[c], &m2[c]))
            continue;
        bnf_tile one = tile;
        one.channel0 = c, one.channel1 = c + 1;
        NAME(moments_planar)(o, one, mean, m2);
    }
}

static void NAME(batch_moments_planar)(const bnf_operands *o, bnf_tile tile, double *mean,
                                       double *m2)
{
    if (sizeof(T) == sizeof(double) || NAME(values_of_channel)(tile) < SHORT_CHANNEL)
        NAME(moments_planar)(o, tile, mean, m2);
    else
        NAME(moments_about_pivots)(o, tile, mean, m2, NULL);
}

/* Interleaved: one row at each place.  Eight rows at a time are read along their whole length, as
 * the hardware prefetches them. */
APART void NAME(pivots_interleaved)(const bnf_operands *o, bnf_tile tile, P *pivot)
{
    const ptrdiff_t rows = tile.outer1 - tile.outer0, stride = o->shape.channels;
    const ptrdiff_t channels = tile.channel1 - tile.channel0;
    const ptrdiff_t places = rows <= 192 ? 32 : MOST_PLACES;
    P sums[MOST_PLACES / 8][BNF_MAX_INTERLEAVED];
    for (ptrdiff_t k = 0; k < places; k += 8) {
        ptrdiff_t at[8];
        for (ptrdiff_t r = 0; r < 8; r++)
            at[r] = (tile.outer0 + place(k + r, places, rows)) * stride + tile.channel0;
        for (ptrdiff_t c = 0; c < channels; c += LANES) {
            const ptrdiff_t n = at_most(LANES, channels - c);
            const vec sum = NAME(sum_of_eight)((const T *)o->x + c, at, n);
            P lanes[LANES];
            store(lanes, sum);
            memcpy(sums[k / 8] + c, lanes, (size_t)n * sizeof(P));
        }
    }
    for (ptrdiff_t half = places / 16; half > 0; half /= 2)
        for (ptrdiff_t g = 0; g < half; g++)
            for (ptrdiff_t c = 0; c < channels; c++)
                sums[g][c] += sums[g + half][c];
    for (ptrdiff_t c = 0; c < channels; c++)
        pivot[c] = NAME(pivot_of)((double)sums[0][c], places);
}

/* Those of a strip's channels that are marked are summed again, all at once. */
APART void NAME(moments_again)(const bnf_operands *o, bnf_tile tile, const bool *again,
                               double *mean, double *m2)
{
    double kept[2][LANES];
    const ptrdiff_t c = tile.channel0, n = tile.channel1 - c;
    for (ptrdiff_t i = 0; i < n; i++)
        kept[0][i] = mean[c + i], kept[1][i] = m2[c + i];
    NAME(moments_interleaved)(o, tile, mean, m2);
    for (ptrdiff_t i = 0; i < n; i++)
        if (!again[i])
            mean[c + i] = kept[0][i], m2[c + i] = kept[1][i];
}

static void NAME(batch_moments_interleaved)(const bnf_operands *o, bnf_tile tile, double *mean,
                                            double *m2)
{
    const double n = (double)(tile.outer1 - tile.outer0);
    if (sizeof(T) == sizeof(double) || n < SHORT_ROWS) {
        NAME(moments_interleaved)(o, tile, mean, m2);
        return;
    }
    P pivot[BNF_MAX_INTERLEAVED];
    NAME(pivots_interleaved)(o, tile, pivot);
    const NAME(params) params = {.high = pivot};
    const NAME(work) w = {.o = o, .v = {.layout = BNF_INTERLEAVED}};
    NAME(sum_interleaved)(w, tile, params, mean, m2);
    for (ptrdiff_t c = tile.channel0; c < tile.channel1; c += LANES) {
        bnf_tile strip = tile;
        strip.channel0 = c, strip.channel1 = at_most(tile.channel1, c + LANES);
        bool again[LANES], any = false;
        for (ptrdiff_t i = 0; c + i < strip.channel1; i++) {
            again[i] = !NAME(settle)(pivot[c - tile.channel0 + i], n, &mean[c + i], &m2[c + i]);
            any |= again[i];
        }
        if (any)
            NAME(moments_again)(o, strip, again, mean, m2);
    }
}
