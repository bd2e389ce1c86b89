/* Sixteen lanes of float32 or eight of float64 on AVX-512 (F, VL, DQ, BW): one register each, and
 * masks for tails. */
#ifndef BNFAST_SIMD_AVX512_H
#define BNFAST_SIMD_AVX512_H

#include <immintrin.h>
#include <stddef.h>

#include "bnfast.h"

/* Traits, see lanes.h. */
#define ISA_UNROLL _Pragma("GCC unroll 8")
#define ISA_FEW_LOOPS false
#define ISA_INLINE static inline __attribute__((always_inline))

typedef __m512 f32x16;
typedef __m512d d8;

/* After streaming stores, before another thread may read what they wrote. */
static inline void stream_end(void) { _mm_sfence(); }

static inline __mmask16 first_of_16(ptrdiff_t n) { return (__mmask16)((1u << n) - 1); }
static inline __mmask8 first_of_8(ptrdiff_t n) { return (__mmask8)((1u << n) - 1); }

static inline f32x16 f32x16_set1(double a) { return _mm512_set1_ps((float)a); }
static inline f32x16 f32x16_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void f32x16_store(float *p, f32x16 a) { _mm512_storeu_ps(p, a); }
static inline void f32x16_stream(float *p, f32x16 a) { _mm512_stream_ps(p, a); }
/* The first n (1 to 15) lanes from memory, the others from fill. */
static inline f32x16 f32x16_load_part(const float *p, ptrdiff_t n, f32x16 fill)
{
    return _mm512_mask_loadu_ps(fill, first_of_16(n), p);
}
static inline void f32x16_store_part(float *p, ptrdiff_t n, f32x16 a)
{
    _mm512_mask_storeu_ps(p, first_of_16(n), a);
}
static inline f32x16 f32x16_add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
static inline f32x16 f32x16_sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
static inline f32x16 f32x16_mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
static inline f32x16 f32x16_div(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
static inline f32x16 f32x16_fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
/* a > b ? a : b and a < b ? a : b: b if either is NaN. */
static inline f32x16 f32x16_max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
static inline f32x16 f32x16_min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
/* a <= b ? yes : no */
static inline f32x16 f32x16_select_le(f32x16 a, f32x16 b, f32x16 yes, f32x16 no)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), no, yes);
}
/* 2^n for an integer n from -126 to 127: the sum's last bits are n + 127. */
static inline f32x16 f32x16_pow2(f32x16 n)
{
    const __m512 sum = _mm512_add_ps(n, _mm512_set1_ps(0x1.8p23f + 127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(sum), 23));
}
/* The first n (0 to 16) lanes of a, the others of b. */
static inline f32x16 f32x16_select_first(ptrdiff_t n, f32x16 a, f32x16 b)
{
    return _mm512_mask_blend_ps(first_of_16(n), b, a);
}

static inline d8 d8_set1(double a) { return _mm512_set1_pd(a); }
static inline d8 d8_load(const double *p) { return _mm512_loadu_pd(p); }
static inline void d8_store(double *p, d8 a) { _mm512_storeu_pd(p, a); }
static inline void d8_stream(double *p, d8 a) { _mm512_stream_pd(p, a); }
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
/* 2^n for an integer n from -1022 to 1023, as f32x16_pow2. */
static inline d8 d8_pow2(d8 n)
{
    const __m512d sum = _mm512_add_pd(n, _mm512_set1_pd(0x1.8p52 + 1023));
    return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(sum), 52));
}
static inline d8 d8_select_first(ptrdiff_t n, d8 a, d8 b)
{
    return _mm512_mask_blend_pd(first_of_8(n), b, a);
}
static inline d8 d8_load_part(const double *p, ptrdiff_t n, d8 fill)
{
    return _mm512_mask_loadu_pd(fill, first_of_8(n), p);
}
static inline void d8_store_part(double *p, ptrdiff_t n, d8 a)
{
    _mm512_mask_storeu_pd(p, first_of_8(n), a);
}
/* Lanes 0+4, 1+5, 2+6, 3+7; then 0+2, 1+3; then 0+1. */
static inline double d8_sum(d8 a)
{
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

/* The lower and the upper eight lanes, widened. */
static inline d8 f32x16_low(f32x16 a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a)); }
static inline d8 f32x16_high(f32x16 a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)); }

/* Eight elements as float64, or the first n (1 to 7) and lanes from fill. */
static inline d8 f32_load_wide(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
static inline d8 f32_load_wide_part(const float *p, ptrdiff_t n, d8 fill)
{
    const __mmask8 first = first_of_8(n);
    return _mm512_mask_cvtps_pd(fill, first, _mm256_maskz_loadu_ps(first, p));
}

/* float16, by the processor's own conversion. */
static inline f32x16 f16x16_load(const bnf_f16 *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline f32x16 f16x16_load_part(const bnf_f16 *p, ptrdiff_t n, f32x16 fill)
{
    const __mmask16 first = first_of_16(n);
    return _mm512_mask_cvtph_ps(fill, first, _mm256_maskz_loadu_epi16(first, p));
}
static inline __m256i f16x16_narrow(f32x16 a)
{
    return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline void f16x16_store(bnf_f16 *p, f32x16 a)
{
    _mm256_storeu_si256((__m256i *)p, f16x16_narrow(a));
}
static inline void f16x16_store_part(bnf_f16 *p, ptrdiff_t n, f32x16 a)
{
    _mm256_mask_storeu_epi16(p, first_of_16(n), f16x16_narrow(a));
}
static inline void f16x16_stream(bnf_f16 *p, f32x16 a)
{
    _mm256_stream_si256((__m256i *)p, f16x16_narrow(a));
}
static inline d8 f16_load_wide(const bnf_f16 *p)
{
    return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)));
}
static inline d8 f16_load_wide_part(const bnf_f16 *p, ptrdiff_t n, d8 fill)
{
    const __mmask8 first = first_of_8(n);
    return _mm512_mask_cvtps_pd(fill, first, _mm256_cvtph_ps(_mm_maskz_loadu_epi16(first, p)));
}

/* bfloat16, with integer operations: the instruction that some processors have
 * treats denormals as zeros. */
static inline f32x16 bf16x16_widen(__m256i a)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
}
static inline f32x16 bf16x16_load(const bnf_bf16 *p)
{
    return bf16x16_widen(_mm256_loadu_si256((const __m256i *)p));
}
static inline f32x16 bf16x16_load_part(const bnf_bf16 *p, ptrdiff_t n, f32x16 fill)
{
    const __mmask16 first = first_of_16(n);
    return _mm512_mask_blend_ps(first, fill, bf16x16_widen(_mm256_maskz_loadu_epi16(first, p)));
}
/* Rounded to nearest even: 0x7fff, plus 1 if the upper half is odd, carries into
 * the upper half exactly if it must be rounded up.  A NaN keeps its upper half,
 * made quiet. */
static inline __m256i bf16x16_narrow(f32x16 a)
{
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd);
    const __m512i rounded = _mm512_add_epi32(bits, half);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i wide = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(wide, 16));
}
static inline void bf16x16_store(bnf_bf16 *p, f32x16 a)
{
    _mm256_storeu_si256((__m256i *)p, bf16x16_narrow(a));
}
static inline void bf16x16_store_part(bnf_bf16 *p, ptrdiff_t n, f32x16 a)
{
    _mm256_mask_storeu_epi16(p, first_of_16(n), bf16x16_narrow(a));
}
static inline void bf16x16_stream(bnf_bf16 *p, f32x16 a)
{
    _mm256_stream_si256((__m256i *)p, bf16x16_narrow(a));
}
static inline d8 bf16_widen_eight(__m128i a)
{
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16);
    return _mm512_cvtps_pd(_mm256_castsi256_ps(bits));
}
static inline d8 bf16_load_wide(const bnf_bf16 *p)
{
    return bf16_widen_eight(_mm_loadu_si128((const __m128i *)p));
}
static inline d8 bf16_load_wide_part(const bnf_bf16 *p, ptrdiff_t n, d8 fill)
{
    const __mmask8 first = first_of_8(n);
    return _mm512_mask_blend_pd(first, fill, bf16_widen_eight(_mm_maskz_loadu_epi16(first, p)));
}

#endif
