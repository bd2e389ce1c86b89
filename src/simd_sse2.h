/* Eight lanes of float32 or float64 on SSE2, the x86-64 baseline: the
 * operations of simd_avx2.h, two or four registers to a vector.  Without a
 * fused multiply-add, fma rounds twice, so results differ from the FMA sets'
 * in the last bit. */
#ifndef BNFAST_SIMD_SSE2_H
#define BNFAST_SIMD_SSE2_H

#include <emmintrin.h>
#include <stddef.h>

typedef struct {
    __m128 lo, hi;
} f8;
typedef struct {
    __m128d a, b, c, d;
} d8;

/* After streaming stores, before another thread may read what they wrote. */
static inline void stream_end(void) { _mm_sfence(); }

static inline f8 f8_set1(double a) { return (f8){_mm_set1_ps((float)a), _mm_set1_ps((float)a)}; }
static inline f8 f8_load(const float *p) { return (f8){_mm_loadu_ps(p), _mm_loadu_ps(p + 4)}; }
static inline void f8_store(float *p, f8 a)
{
    _mm_storeu_ps(p, a.lo);
    _mm_storeu_ps(p + 4, a.hi);
}
static inline void f8_stream(float *p, f8 a)
{
    _mm_stream_ps(p, a.lo);
    _mm_stream_ps(p + 4, a.hi);
}
/* The first n lanes, n a multiple of 16 bytes. */
static inline void f8_stream_part(float *p, ptrdiff_t n, f8 a)
{
    if (n == 4)
        _mm_stream_ps(p, a.lo);
}
static inline f8 f8_add(f8 a, f8 b) { return (f8){_mm_add_ps(a.lo, b.lo), _mm_add_ps(a.hi, b.hi)}; }
static inline f8 f8_sub(f8 a, f8 b) { return (f8){_mm_sub_ps(a.lo, b.lo), _mm_sub_ps(a.hi, b.hi)}; }
static inline f8 f8_mul(f8 a, f8 b) { return (f8){_mm_mul_ps(a.lo, b.lo), _mm_mul_ps(a.hi, b.hi)}; }
static inline f8 f8_fma(f8 a, f8 b, f8 c) { return f8_add(f8_mul(a, b), c); }
/* a > b ? a : b and a < b ? a : b: b where either is NaN. */
static inline f8 f8_max(f8 a, f8 b) { return (f8){_mm_max_ps(a.lo, b.lo), _mm_max_ps(a.hi, b.hi)}; }
static inline f8 f8_min(f8 a, f8 b) { return (f8){_mm_min_ps(a.lo, b.lo), _mm_min_ps(a.hi, b.hi)}; }

static inline __m128 f8_blend(__m128 mask, __m128 yes, __m128 no)
{
    return _mm_or_ps(_mm_and_ps(mask, yes), _mm_andnot_ps(mask, no));
}
/* a <= b ? yes : no */
static inline f8 f8_select_le(f8 a, f8 b, f8 yes, f8 no)
{
    return (f8){f8_blend(_mm_cmple_ps(a.lo, b.lo), yes.lo, no.lo),
                f8_blend(_mm_cmple_ps(a.hi, b.hi), yes.hi, no.hi)};
}

/* The first n (1 to 7) lanes from memory, the others from fill. */
static inline f8 f8_load_part(const float *p, ptrdiff_t n, f8 fill)
{
    float lanes[8];
    f8_store(lanes, fill);
    for (ptrdiff_t i = 0; i < n; i++)
        lanes[i] = p[i];
    return f8_load(lanes);
}
static inline void f8_store_part(float *p, ptrdiff_t n, f8 a)
{
    float lanes[8];
    f8_store(lanes, a);
    for (ptrdiff_t i = 0; i < n; i++)
        p[i] = lanes[i];
}

static inline d8 d8_set1(double a)
{
    const __m128d two = _mm_set1_pd(a);
    return (d8){two, two, two, two};
}
static inline d8 d8_load(const double *p)
{
    return (d8){_mm_loadu_pd(p), _mm_loadu_pd(p + 2), _mm_loadu_pd(p + 4), _mm_loadu_pd(p + 6)};
}
static inline void d8_store(double *p, d8 a)
{
    _mm_storeu_pd(p, a.a);
    _mm_storeu_pd(p + 2, a.b);
    _mm_storeu_pd(p + 4, a.c);
    _mm_storeu_pd(p + 6, a.d);
}
static inline void d8_stream(double *p, d8 a)
{
    _mm_stream_pd(p, a.a);
    _mm_stream_pd(p + 2, a.b);
    _mm_stream_pd(p + 4, a.c);
    _mm_stream_pd(p + 6, a.d);
}
static inline void d8_stream_part(double *p, ptrdiff_t n, d8 a)
{
    double lanes[8];
    d8_store(lanes, a);
    for (ptrdiff_t i = 0; i < n; i += 2)
        _mm_stream_pd(p + i, _mm_loadu_pd(lanes + i));
}
static inline d8 d8_add(d8 x, d8 y)
{
    return (d8){_mm_add_pd(x.a, y.a), _mm_add_pd(x.b, y.b), _mm_add_pd(x.c, y.c),
                _mm_add_pd(x.d, y.d)};
}
static inline d8 d8_sub(d8 x, d8 y)
{
    return (d8){_mm_sub_pd(x.a, y.a), _mm_sub_pd(x.b, y.b), _mm_sub_pd(x.c, y.c),
                _mm_sub_pd(x.d, y.d)};
}
static inline d8 d8_mul(d8 x, d8 y)
{
    return (d8){_mm_mul_pd(x.a, y.a), _mm_mul_pd(x.b, y.b), _mm_mul_pd(x.c, y.c),
                _mm_mul_pd(x.d, y.d)};
}
static inline d8 d8_fma(d8 x, d8 y, d8 z) { return d8_add(d8_mul(x, y), z); }
static inline d8 d8_max(d8 x, d8 y)
{
    return (d8){_mm_max_pd(x.a, y.a), _mm_max_pd(x.b, y.b), _mm_max_pd(x.c, y.c),
                _mm_max_pd(x.d, y.d)};
}
static inline d8 d8_min(d8 x, d8 y)
{
    return (d8){_mm_min_pd(x.a, y.a), _mm_min_pd(x.b, y.b), _mm_min_pd(x.c, y.c),
                _mm_min_pd(x.d, y.d)};
}

static inline __m128d d8_pick_le(__m128d a, __m128d b, __m128d yes, __m128d no)
{
    const __m128d mask = _mm_cmple_pd(a, b);
    return _mm_or_pd(_mm_and_pd(mask, yes), _mm_andnot_pd(mask, no));
}
static inline d8 d8_select_le(d8 x, d8 y, d8 yes, d8 no)
{
    return (d8){d8_pick_le(x.a, y.a, yes.a, no.a), d8_pick_le(x.b, y.b, yes.b, no.b),
                d8_pick_le(x.c, y.c, yes.c, no.c), d8_pick_le(x.d, y.d, yes.d, no.d)};
}

static inline d8 d8_load_part(const double *p, ptrdiff_t n, d8 fill)
{
    double lanes[8];
    d8_store(lanes, fill);
    for (ptrdiff_t i = 0; i < n; i++)
        lanes[i] = p[i];
    return d8_load(lanes);
}
static inline void d8_store_part(double *p, ptrdiff_t n, d8 a)
{
    double lanes[8];
    d8_store(lanes, a);
    for (ptrdiff_t i = 0; i < n; i++)
        p[i] = lanes[i];
}

/* Lanes 0+4, 1+5, 2+6, 3+7; then 0+2, 1+3; then 0+1. */
static inline double d8_sum(d8 x)
{
    const __m128d two = _mm_add_pd(_mm_add_pd(x.a, x.c), _mm_add_pd(x.b, x.d));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

static inline d8 f8_widen(f8 a)
{
    return (d8){_mm_cvtps_pd(a.lo), _mm_cvtps_pd(_mm_movehl_ps(a.lo, a.lo)), _mm_cvtps_pd(a.hi),
                _mm_cvtps_pd(_mm_movehl_ps(a.hi, a.hi))};
}
static inline f8 f8_narrow(d8 x)
{
    return (f8){_mm_movelh_ps(_mm_cvtpd_ps(x.a), _mm_cvtpd_ps(x.b)),
                _mm_movelh_ps(_mm_cvtpd_ps(x.c), _mm_cvtpd_ps(x.d))};
}
static inline d8 f8_load_wide(const float *p) { return f8_widen(f8_load(p)); }

#endif
