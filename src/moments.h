/* What follows once a channel's blocks are gathered: the merge of Chan, Golub and
 * LeVeque (1979) and the last formulas of the forward and the backward, in float64.
 *
 * Slots are (blocks, channels) arrays, one row per block.  The fixed tree below
 * leaves the numbers of the whole batch in row 0, whichever thread gathered which
 * block. */
#ifndef BNFAST_MOMENTS_H
#define BNFAST_MOMENTS_H

#include <math.h>
#include <string.h>

#include "bnfast.h"

/* (n_a, mean_a, m2_a) += (n_b, mean_b, m2_b), channel by channel. */
static inline void bnf_merge(double n_a, double *mean_a, double *m2_a, double n_b,
                             const double *mean_b, const double *m2_b, ptrdiff_t channels)
{
    if (n_b == 0) /* a mask counts nothing there */
        return;
    if (n_a == 0) { /* the formula below has 0 * delta^2, which is NaN if delta^2 overflows */
        memcpy(mean_a, mean_b, (size_t)channels * sizeof(double));
        memcpy(m2_a, m2_b, (size_t)channels * sizeof(double));
        return;
    }
    const double share = n_b / (n_a + n_b), weight = n_a * share;
    for (ptrdiff_t c = 0; c < channels; c++) {
        const double delta = mean_b[c] - mean_a[c];
        mean_a[c] += delta * share;
        m2_a[c] += m2_b[c] + delta * delta * weight;
    }
}

/* The variance over count - ddof; NaN if count <= ddof. */
static inline double bnf_variance(double m2, double count, double ddof)
{
    return count > ddof ? m2 / (count - ddof) : NAN;
}

static inline double bnf_inv_std(double var, double eps) { return 1 / sqrt(var + eps); }

static inline double bnf_moved_average(double running, double batch, double momentum)
{
    return (1 - momentum) * running + momentum * batch;
}

/* How many values a channel has in the blocks from a to b.  With a mask, counts has the sum of each
 * block's weights. */
static inline double bnf_values_in(bnf_shape shape, bnf_blocks blocks, const double *counts,
                                   ptrdiff_t a, ptrdiff_t b)
{
    double values = 0;
    if (!counts)
        return (double)(bnf_values_before(shape, blocks, b) - bnf_values_before(shape, blocks, a));
    for (; a < b; a++)
        values += counts[a];
    return values;
}

/* Neighbouring blocks are merged in pairs, then the pairs in pairs, and so on. */
static inline void bnf_merge_blocks(bnf_shape shape, bnf_blocks blocks, const double *counts,
                                    ptrdiff_t c0, ptrdiff_t c1, double *mean, double *m2)
{
    for (ptrdiff_t step = 1; step < blocks.count; step *= 2)
        for (ptrdiff_t a = 0; a + step < blocks.count; a += 2 * step) {
            const ptrdiff_t b = a + step;
            const ptrdiff_t end = b + step < blocks.count ? b + step : blocks.count;
            const ptrdiff_t to = a * shape.channels + c0, from = b * shape.channels + c0;
            bnf_merge(bnf_values_in(shape, blocks, counts, a, b), mean + to, m2 + to,
                      bnf_values_in(shape, blocks, counts, b, end), mean + from, m2 + from,
                      c1 - c0);
        }
}

static inline void bnf_add_blocks(bnf_shape shape, bnf_blocks blocks, ptrdiff_t c0, ptrdiff_t c1,
                                  double *sum)
{
    for (ptrdiff_t step = 1; step < blocks.count; step *= 2)
        for (ptrdiff_t a = 0; a + step < blocks.count; a += 2 * step)
            for (ptrdiff_t c = c0; c < c1; c++)
                sum[a * shape.channels + c] += sum[(a + step) * shape.channels + c];
}

/* Algorithm 1 of the paper, after the sums: the numbers that x is normalised with. */
static inline void bnf_forward_numbers(double count, double eps, ptrdiff_t c0, ptrdiff_t c1,
                                       const double *m2, const double *weight, double *var,
                                       double *inv_std, double *scale)
{
    for (ptrdiff_t c = c0; c < c1; c++) {
        var[c] = bnf_variance(m2[c], count, 0);
        inv_std[c] = bnf_inv_std(var[c], eps);
        scale[c] = weight[c] * inv_std[c];
    }
}

/* The gradient of weight, from dot = sum of g * (x - mean).  That of bias is the sum of g. */
static inline void bnf_weight_gradient(ptrdiff_t c0, ptrdiff_t c1, const double *inv_std,
                                       const double *dot, double *dweight)
{
    for (ptrdiff_t c = c0; c < c1; c++)
        dweight[c] = inv_std[c] * dot[c];
}

/* The chain rule of the paper's section 3:
 *     dx = weight * inv_std * (g - dbias/m - (x - mean) * inv_std * dweight/m),
 * the last two terms through the batch's mean and variance. */
static inline void bnf_backward_numbers(const double *scale, double count, ptrdiff_t c0,
                                        ptrdiff_t c1, const double *inv_std, const double *dbias,
                                        const double *dweight, double *dy_factor, double *x_factor,
                                        double *constant)
{
    for (ptrdiff_t c = c0; c < c1; c++) {
        dy_factor[c] = scale[c];
        x_factor[c] = -scale[c] * inv_std[c] * (dweight[c] / count);
        constant[c] = -scale[c] * (dbias[c] / count);
    }
}

#endif
