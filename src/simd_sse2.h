/* Eight lanes of float32 or float64 on SSE2, the x86-64 baseline: the
 * operations of simd_avx2.h, with two or four registers per vector.  There is no
 * fused multiply-add: fma rounds twice, so results differ from those of the FMA
 * sets in the last bit. */
#ifndef BNFAST_SIMD_SSE2_H
#define BNFAST_SIMD_SSE2_H

#include <emmintrin.h>
#include <stddef.h>

#include "bnfast.h"
#include "simd_m128i.h"

/* Traits, see lanes.h. */
#define ISA_UNROLL
#define ISA_FEW_LOOPS true
#define ISA_INLINE static inline __attribute__((always_inline))

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
static inline f8 f8_add(f8 a, f8 b) { return (f8){_mm_add_ps(a.lo, b.lo), _mm_add_ps(a.hi, b.hi)}; }
static inline f8 f8_sub(f8 a, f8 b) { return (f8){_mm_sub_ps(a.lo, b.lo), _mm_sub_ps(a.hi, b.hi)}; }
static inline f8 f8_mul(f8 a, f8 b) { return (f8){_mm_mul_ps(a.lo, b.lo), _mm_mul_ps(a.hi, b.hi)}; }
static inline f8 f8_div(f8 a, f8 b) { return (f8){_mm_div_ps(a.lo, b.lo), _mm_div_ps(a.hi, b.hi)}; }
static inline f8 f8_fma(f8 a, f8 b, f8 c) { return f8_add(f8_mul(a, b), c); }
/* a > b ? a : b and a < b ? a : b: b if either is NaN. */
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
/* 2^n for an integer n from -126 to 127: the sum's last bits are n + 127. */
static inline __m128 f8_half_pow2(__m128 n)
{
    const __m128 sum = _mm_add_ps(n, _mm_set1_ps(0x1.8p23f + 127));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_castps_si128(sum), 23));
}
static inline f8 f8_pow2(f8 n) { return (f8){f8_half_pow2(n.lo), f8_half_pow2(n.hi)}; }

/* The first n lanes of a, the others of b. */
static inline f8 f8_select_first(ptrdiff_t n, f8 a, f8 b)
{
    const __m128i end = _mm_set1_epi32((int)n);
    const __m128i lo = _mm_cmpgt_epi32(end, _mm_setr_epi32(0, 1, 2, 3));
    const __m128i hi = _mm_cmpgt_epi32(end, _mm_setr_epi32(4, 5, 6, 7));
    return (f8){f8_blend(_mm_castsi128_ps(lo), a.lo, b.lo),
                f8_blend(_mm_castsi128_ps(hi), a.hi, b.hi)};
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
static inline d8 d8_div(d8 x, d8 y)
{
    return (d8){_mm_div_pd(x.a, y.a), _mm_div_pd(x.b, y.b), _mm_div_pd(x.c, y.c),
                _mm_div_pd(x.d, y.d)};
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
static inline __m128d d8_quarter_pow2(__m128d n)
{
    const __m128d sum = _mm_add_pd(n, _mm_set1_pd(0x1.8p52 + 1023));
    return _mm_castsi128_pd(_mm_slli_epi64(_mm_castpd_si128(sum), 52));
}
/* 2^n for an integer n from -1022 to 1023, as f8_pow2. */
static inline d8 d8_pow2(d8 n)
{
    return (d8){d8_quarter_pow2(n.a), d8_quarter_pow2(n.b), d8_quarter_pow2(n.c),
                d8_quarter_pow2(n.d)};
}

static inline __m128d d2_select_first(ptrdiff_t n, __m128d a, __m128d b)
{
    const __m128d either = n >= 2 ? a : b;
    return n == 1 ? _mm_move_sd(b, a) : either;
}
static inline d8 d8_select_first(ptrdiff_t n, d8 x, d8 y)
{
    return (d8){d2_select_first(n, x.a, y.a), d2_select_first(n - 2, x.b, y.b),
                d2_select_first(n - 4, x.c, y.c), d2_select_first(n - 6, x.d, y.d)};
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
static inline d8 f32_load_wide(const float *p) { return f8_widen(f8_load(p)); }

/* --- float16 and bfloat16, four in the lower halves of 32-bit lanes, by integer operations --- */

static inline __m128i i4_pick(__m128i mask, __m128i yes, __m128i no)
{
    return _mm_or_si128(_mm_and_si128(mask, yes), _mm_andnot_si128(mask, no));
}

/* Exponents are biased by 15, those of float32 by 127: 112 are added, and twice
 * that for infinities and NaNs.  A denormal is read as the fraction of a number
 * above 2^-14, and 2^-14 is subtracted. */
static inline __m128 f16_widen_four(__m128i a)
{
    const __m128i rebias = _mm_set1_epi32(112 << 23), one = _mm_set1_epi32(1 << 23);
    const __m128i sign = _mm_slli_epi32(_mm_and_si128(a, _mm_set1_epi32(0x8000)), 16);
    const __m128i size = _mm_slli_epi32(_mm_and_si128(a, _mm_set1_epi32(0x7fff)), 13);
    const __m128i not_finite = _mm_cmpgt_epi32(size, _mm_set1_epi32((31 << 23) - 1));
    const __m128i above = _mm_add_epi32(size, rebias);
    const __m128i normal = _mm_add_epi32(above, _mm_and_si128(not_finite, rebias));
    const __m128 sum = _mm_castsi128_ps(_mm_add_epi32(above, one));
    const __m128i denormal = _mm_castps_si128(_mm_sub_ps(sum, _mm_set1_ps(0x1p-14f)));
    const __m128i bits = i4_pick(_mm_cmpgt_epi32(one, size), denormal, normal);
    return _mm_castsi128_ps(_mm_or_si128(bits, sign));
}

/* Rounded to nearest even.  The last place of a float16 denormal is 2^-24, and so
 * is that of 0.5 in float32: adding 0.5 rounds to it. */
static inline __m128i f16_narrow_four(__m128 a)
{
    const __m128i bits = _mm_castps_si128(a);
    const __m128i sign = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(0x8000));
    const __m128i size = _mm_and_si128(bits, _mm_set1_epi32(0x7fffffff));
    const __m128i odd = _mm_and_si128(_mm_srli_epi32(size, 13), _mm_set1_epi32(1));
    const __m128i half = _mm_add_epi32(odd, _mm_set1_epi32(0xfff - (112 << 23)));
    const __m128i normal = _mm_srli_epi32(_mm_add_epi32(size, half), 13);
    const __m128 sum = _mm_add_ps(_mm_castsi128_ps(size), _mm_set1_ps(0.5f));
    const __m128i denormal = _mm_sub_epi32(_mm_castps_si128(sum), _mm_set1_epi32(126 << 23));
    const __m128i infinity = _mm_set1_epi32(0x7c00);
    const __m128i payload = _mm_and_si128(_mm_srli_epi32(size, 13), _mm_set1_epi32(0x3ff));
    const __m128i nan = _mm_or_si128(payload, _mm_set1_epi32(0x7e00));

    __m128i narrow = i4_pick(_mm_cmpgt_epi32(_mm_set1_epi32(113 << 23), size), denormal, normal);
    narrow = i4_pick(_mm_cmpgt_epi32(size, _mm_set1_epi32(0x477fefff)), infinity, narrow);
    narrow = i4_pick(_mm_cmpgt_epi32(size, _mm_set1_epi32(0x7f800000)), nan, narrow);
    return _mm_or_si128(narrow, sign);
}

/* Rounded to nearest even: 0x7fff, plus 1 if the upper half is odd, carries into
 * the upper half exactly if it must be rounded up.  A NaN keeps its upper half,
 * made quiet. */
static inline __m128i bf16_narrow_four(__m128 a)
{
    const __m128i bits = _mm_castps_si128(a), upper = _mm_srli_epi32(bits, 16);
    const __m128i odd = _mm_and_si128(upper, _mm_set1_epi32(1));
    const __m128i half = _mm_add_epi32(odd, _mm_set1_epi32(0x7fff));
    const __m128i rounded = _mm_srli_epi32(_mm_add_epi32(bits, half), 16);
    const __m128i quiet = _mm_or_si128(upper, _mm_set1_epi32(0x40));
    return i4_pick(_mm_castps_si128(_mm_cmpunord_ps(a, a)), quiet, rounded);
}

/* As signed numbers: SSE2's only packing saturates to those. */
static inline __m128i halves_pack(__m128i lo, __m128i hi)
{
    return _mm_packs_epi32(_mm_srai_epi32(_mm_slli_epi32(lo, 16), 16),
                           _mm_srai_epi32(_mm_slli_epi32(hi, 16), 16));
}

static inline f8 f16_widen(__m128i a)
{
    const __m128i zero = _mm_setzero_si128();
    return (f8){f16_widen_four(_mm_unpacklo_epi16(a, zero)),
                f16_widen_four(_mm_unpackhi_epi16(a, zero))};
}
static inline __m128i f16_narrow(f8 a)
{
    return halves_pack(f16_narrow_four(a.lo), f16_narrow_four(a.hi));
}
static inline f8 bf16_widen(__m128i a)
{
    const __m128i zero = _mm_setzero_si128();
    return (f8){_mm_castsi128_ps(_mm_unpacklo_epi16(zero, a)),
                _mm_castsi128_ps(_mm_unpackhi_epi16(zero, a))};
}
static inline __m128i bf16_narrow(f8 a)
{
    return halves_pack(bf16_narrow_four(a.lo), bf16_narrow_four(a.hi));
}

static inline f8 f16_load(const bnf_f16 *p) { return f16_widen(halves_load(&p->bits)); }
static inline f8 f16_load_part(const bnf_f16 *p, ptrdiff_t n, f8 fill)
{
    return f8_select_first(n, f16_widen(halves_load_part(&p->bits, n)), fill);
}
static inline d8 f16_load_wide(const bnf_f16 *p) { return f8_widen(f16_load(p)); }
static inline void f16_store(bnf_f16 *p, f8 a) { halves_store(&p->bits, f16_narrow(a)); }
static inline void f16_store_part(bnf_f16 *p, ptrdiff_t n, f8 a)
{
    halves_store_part(&p->bits, n, f16_narrow(a));
}
static inline void f16_stream(bnf_f16 *p, f8 a) { halves_stream(&p->bits, f16_narrow(a)); }

static inline f8 bf16_load(const bnf_bf16 *p) { return bf16_widen(halves_load(&p->bits)); }
static inline f8 bf16_load_part(const bnf_bf16 *p, ptrdiff_t n, f8 fill)
{
    return f8_select_first(n, bf16_widen(halves_load_part(&p->bits, n)), fill);
}
static inline d8 bf16_load_wide(const bnf_bf16 *p) { return f8_widen(bf16_load(p)); }
static inline void bf16_store(bnf_bf16 *p, f8 a) { halves_store(&p->bits, bf16_narrow(a)); }
static inline void bf16_store_part(bnf_bf16 *p, ptrdiff_t n, f8 a)
{
    halves_store_part(&p->bits, n, bf16_narrow(a));
}
static inline void bf16_stream(bnf_bf16 *p, f8 a) { halves_stream(&p->bits, bf16_narrow(a)); }

#include "simd_pairs.h"

#endif
