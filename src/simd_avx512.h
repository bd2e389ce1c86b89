/* Eight lanes of float32 or float64 on AVX-512 (F, VL, DQ, BW): the operations
 * of simd_avx2.h, with a d8 in one register, and masks for tails. */
#ifndef BNFAST_SIMD_AVX512_H
#define BNFAST_SIMD_AVX512_H

#include "simd_m256.h"

typedef __m512d d8;

static inline __mmask8 first_lanes(ptrdiff_t n) { return (__mmask8)((1u << n) - 1); }

/* a <= b ? yes : no */
static inline f8 f8_select_le(f8 a, f8 b, f8 yes, f8 no)
{
    return _mm256_mask_blend_ps(_mm256_cmp_ps_mask(a, b, _CMP_LE_OQ), no, yes);
}
/* The first n (1 to 7) lanes from memory, the others from fill. */
static inline f8 f8_load_part(const float *p, ptrdiff_t n, f8 fill)
{
    return _mm256_mask_loadu_ps(fill, first_lanes(n), p);
}
static inline void f8_store_part(float *p, ptrdiff_t n, f8 a)
{
    _mm256_mask_storeu_ps(p, first_lanes(n), a);
}

static inline d8 d8_set1(double a) { return _mm512_set1_pd(a); }
static inline d8 d8_load(const double *p) { return _mm512_loadu_pd(p); }
static inline void d8_store(double *p, d8 a) { _mm512_storeu_pd(p, a); }
static inline void d8_stream(double *p, d8 a)
{
    f8_stream((float *)p, _mm256_castpd_ps(_mm512_castpd512_pd256(a)));
    f8_stream((float *)(p + 4), _mm256_castpd_ps(_mm512_extractf64x4_pd(a, 1)));
}
static inline void d8_stream_part(double *p, ptrdiff_t n, d8 a)
{
    double lanes[8];
    d8_store(lanes, a);
    for (ptrdiff_t i = 0; i < n; i += 2)
        _mm_stream_pd(p + i, _mm_loadu_pd(lanes + i));
}
static inline d8 d8_add(d8 a, d8 b) { return _mm512_add_pd(a, b); }
static inline d8 d8_sub(d8 a, d8 b) { return _mm512_sub_pd(a, b); }
static inline d8 d8_mul(d8 a, d8 b) { return _mm512_mul_pd(a, b); }
static inline d8 d8_div(d8 a, d8 b) { return _mm512_div_pd(a, b); }
static inline d8 d8_fma(d8 a, d8 b, d8 c) { return _mm512_fmadd_pd(a, b, c); }
static inline d8 d8_max(d8 a, d8 b) { return _mm512_max_pd(a, b); }
static inline d8 d8_min(d8 a, d8 b) { return _mm512_min_pd(a, b); }
static inline d8 d8_select_le(d8 a, d8 b, d8 yes, d8 no)
{
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LE_OQ), no, yes);
}
/* 2^n for an integer n from -1022 to 1023, as f8_pow2. */
static inline d8 d8_pow2(d8 n)
{
    const __m512d sum = _mm512_add_pd(n, _mm512_set1_pd(0x1.8p52 + 1023));
    return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(sum), 52));
}
static inline d8 d8_load_part(const double *p, ptrdiff_t n, d8 fill)
{
    return _mm512_mask_loadu_pd(fill, first_lanes(n), p);
}
static inline void d8_store_part(double *p, ptrdiff_t n, d8 a)
{
    _mm512_mask_storeu_pd(p, first_lanes(n), a);
}
/* Lanes 0+4, 1+5, 2+6, 3+7; then 0+2, 1+3; then 0+1. */
static inline double d8_sum(d8 a)
{
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

static inline d8 f8_widen(f8 a) { return _mm512_cvtps_pd(a); }
static inline d8 f8_load_wide(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }

static inline f8 f16_load_part(const bnf_f16 *p, ptrdiff_t n, f8 fill)
{
    const __mmask8 first = first_lanes(n);
    return _mm256_mask_blend_ps(first, fill, f16_widen(_mm_maskz_loadu_epi16(first, p)));
}
static inline void f16_store_part(bnf_f16 *p, ptrdiff_t n, f8 a)
{
    _mm_mask_storeu_epi16(p, first_lanes(n), f16_narrow(a));
}
static inline d8 f16_load_wide(const bnf_f16 *p) { return f8_widen(f16_load(p)); }

/* As in simd_avx2.h, but one permutation picks the upper halves. */
static inline __m128i bf16_narrow(f8 a)
{
    const __m256i upper_halves =
        _mm256_setr_epi16(1, 3, 5, 7, 9, 11, 13, 15, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd);
    const __m256i rounded = _mm256_add_epi32(bits, half);
    const __mmask8 is_nan = _mm256_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m256i wide = _mm256_mask_or_epi32(rounded, is_nan, bits, _mm256_set1_epi32(0x400000));
    return _mm256_castsi256_si128(_mm256_permutexvar_epi16(upper_halves, wide));
}
static inline f8 bf16_load_part(const bnf_bf16 *p, ptrdiff_t n, f8 fill)
{
    const __mmask8 first = first_lanes(n);
    return _mm256_mask_blend_ps(first, fill, bf16_widen(_mm_maskz_loadu_epi16(first, p)));
}
static inline void bf16_store_part(bnf_bf16 *p, ptrdiff_t n, f8 a)
{
    _mm_mask_storeu_epi16(p, first_lanes(n), bf16_narrow(a));
}
static inline d8 bf16_load_wide(const bnf_bf16 *p) { return f8_widen(bf16_load(p)); }

#endif
