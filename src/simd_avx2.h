/* Eight lanes of float32 or float64 on AVX2, FMA and F16C.
 *
 * Every instruction set has the same dozen operations on the same types, f32x16 and d8, for any
 * width of its registers.  A kernel written on sixteen lanes adds in the same order on all of them,
 * so results have the same bits on all sets that have a fused multiply-add (as YNNPACK's
 * fixed-width accumulators). */
#ifndef BNFAST_SIMD_AVX2_H
#define BNFAST_SIMD_AVX2_H

#include <immintrin.h>
#include <stddef.h>

#include "bnfast.h"
#include "simd_m128i.h"

/* Traits, see lanes.h. */
#define ISA_UNROLL _Pragma("GCC unroll 8")
#define ISA_FEW_LOOPS false
#define ISA_INLINE static inline __attribute__((always_inline))

typedef __m256 f8;
typedef struct {
    __m256d lo, hi;
} d8;

/* After streaming stores, before another thread may read what they wrote. */
static inline void stream_end(void) { _mm_sfence(); }

static inline f8 f8_set1(double a) { return _mm256_set1_ps((float)a); }
static inline f8 f8_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void f8_store(float *p, f8 a) { _mm256_storeu_ps(p, a); }
static inline void f8_stream(float *p, f8 a) { _mm256_stream_ps(p, a); }
static inline f8 f8_add(f8 a, f8 b) { return _mm256_add_ps(a, b); }
static inline f8 f8_sub(f8 a, f8 b) { return _mm256_sub_ps(a, b); }
static inline f8 f8_mul(f8 a, f8 b) { return _mm256_mul_ps(a, b); }
static inline f8 f8_div(f8 a, f8 b) { return _mm256_div_ps(a, b); }
static inline f8 f8_fma(f8 a, f8 b, f8 c) { return _mm256_fmadd_ps(a, b, c); }
/* a > b ? a : b and a < b ? a : b: b if either is NaN. */
static inline f8 f8_max(f8 a, f8 b) { return _mm256_max_ps(a, b); }
static inline f8 f8_min(f8 a, f8 b) { return _mm256_min_ps(a, b); }

/* 2^n for an integer n from -126 to 127: the sum's last bits are n + 127. */
static inline f8 f8_pow2(f8 n)
{
    const __m256 sum = _mm256_add_ps(n, _mm256_set1_ps(0x1.8p23f + 127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(sum), 23));
}

/* float16, by the processor's own conversion. */
static inline f8 f16_widen(__m128i a) { return _mm256_cvtph_ps(a); }
static inline __m128i f16_narrow(f8 a)
{
    return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline f8 f16_load(const bnf_f16 *p) { return f16_widen(halves_load(&p->bits)); }
static inline void f16_store(bnf_f16 *p, f8 a) { halves_store(&p->bits, f16_narrow(a)); }
static inline void f16_stream(bnf_f16 *p, f8 a) { halves_stream(&p->bits, f16_narrow(a)); }

/* bfloat16, with integer operations: the instruction that some processors have
 * treats denormals as zeros. */
static inline f8 bf16_widen(__m128i a)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}
static inline __m128i bf16_narrow(f8 a);
static inline f8 bf16_load(const bnf_bf16 *p) { return bf16_widen(halves_load(&p->bits)); }
static inline void bf16_store(bnf_bf16 *p, f8 a) { halves_store(&p->bits, bf16_narrow(a)); }
static inline void bf16_stream(bnf_bf16 *p, f8 a) { halves_stream(&p->bits, bf16_narrow(a)); }

/* a <= b ? yes : no */
static inline f8 f8_select_le(f8 a, f8 b, f8 yes, f8 no)
{
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LE_OQ));
}

static inline __m256i f8_first(ptrdiff_t n)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane);
}

/* The first n lanes of a, the others of b. */
static inline f8 f8_select_first(ptrdiff_t n, f8 a, f8 b)
{
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(f8_first(n)));
}
/* The first n (1 to 7) lanes from memory, the others from fill. */
static inline f8 f8_load_part(const float *p, ptrdiff_t n, f8 fill)
{
    const __m256i first = f8_first(n);
    return _mm256_blendv_ps(fill, _mm256_maskload_ps(p, first), _mm256_castsi256_ps(first));
}

/* In halves, since a masked store is microcoded (slow) on AMD. */
static inline void f8_store_part(float *p, ptrdiff_t n, f8 a)
{
    __m128 rest = _mm256_castps256_ps128(a);
    if (n & 4) {
        _mm_storeu_ps(p, rest);
        rest = _mm256_extractf128_ps(a, 1);
        p += 4;
    }
    if (n & 2) {
        _mm_storel_pi((__m64 *)p, rest);
        rest = _mm_movehl_ps(rest, rest);
        p += 2;
    }
    if (n & 1)
        _mm_store_ss(p, rest);
}

static inline d8 d8_set1(double a) { return (d8){_mm256_set1_pd(a), _mm256_set1_pd(a)}; }
static inline d8 d8_load(const double *p)
{
    return (d8){_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)};
}
static inline void d8_store(double *p, d8 a)
{
    _mm256_storeu_pd(p, a.lo);
    _mm256_storeu_pd(p + 4, a.hi);
}
static inline void d8_stream(double *p, d8 a)
{
    _mm256_stream_pd(p, a.lo);
    _mm256_stream_pd(p + 4, a.hi);
}
static inline d8 d8_add(d8 a, d8 b)
{
    return (d8){_mm256_add_pd(a.lo, b.lo), _mm256_add_pd(a.hi, b.hi)};
}
static inline d8 d8_sub(d8 a, d8 b)
{
    return (d8){_mm256_sub_pd(a.lo, b.lo), _mm256_sub_pd(a.hi, b.hi)};
}
static inline d8 d8_mul(d8 a, d8 b)
{
    return (d8){_mm256_mul_pd(a.lo, b.lo), _mm256_mul_pd(a.hi, b.hi)};
}
static inline d8 d8_div(d8 a, d8 b)
{
    return (d8){_mm256_div_pd(a.lo, b.lo), _mm256_div_pd(a.hi, b.hi)};
}
static inline d8 d8_fma(d8 a, d8 b, d8 c)
{
    return (d8){_mm256_fmadd_pd(a.lo, b.lo, c.lo), _mm256_fmadd_pd(a.hi, b.hi, c.hi)};
}
static inline d8 d8_max(d8 a, d8 b)
{
    return (d8){_mm256_max_pd(a.lo, b.lo), _mm256_max_pd(a.hi, b.hi)};
}
static inline d8 d8_min(d8 a, d8 b)
{
    return (d8){_mm256_min_pd(a.lo, b.lo), _mm256_min_pd(a.hi, b.hi)};
}
static inline d8 d8_select_le(d8 a, d8 b, d8 yes, d8 no)
{
    return (d8){_mm256_blendv_pd(no.lo, yes.lo, _mm256_cmp_pd(a.lo, b.lo, _CMP_LE_OQ)),
                _mm256_blendv_pd(no.hi, yes.hi, _mm256_cmp_pd(a.hi, b.hi, _CMP_LE_OQ))};
}
static inline __m256d d8_half_pow2(__m256d n)
{
    const __m256d sum = _mm256_add_pd(n, _mm256_set1_pd(0x1.8p52 + 1023));
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(sum), 52));
}
/* 2^n for an integer n from -1022 to 1023, as f8_pow2. */
static inline d8 d8_pow2(d8 n) { return (d8){d8_half_pow2(n.lo), d8_half_pow2(n.hi)}; }

static inline __m256i d4_first(ptrdiff_t n)
{
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane);
}
static inline d8 d8_select_first(ptrdiff_t n, d8 a, d8 b)
{
    return (d8){_mm256_blendv_pd(b.lo, a.lo, _mm256_castsi256_pd(d4_first(n))),
                _mm256_blendv_pd(b.hi, a.hi, _mm256_castsi256_pd(d4_first(n - 4)))};
}
static inline __m256d d8_half_part(const double *p, ptrdiff_t n, __m256d fill)
{
    const __m256i first = d4_first(n);
    return _mm256_blendv_pd(fill, _mm256_maskload_pd(p, first), _mm256_castsi256_pd(first));
}
static inline d8 d8_load_part(const double *p, ptrdiff_t n, d8 fill)
{
    if (n <= 4)
        return (d8){d8_half_part(p, n, fill.lo), fill.hi};
    return (d8){_mm256_loadu_pd(p), d8_half_part(p + 4, n - 4, fill.hi)};
}
static inline void d8_store_part(double *p, ptrdiff_t n, d8 a)
{
    __m256d half = a.lo;
    if (n & 4) {
        _mm256_storeu_pd(p, half);
        half = a.hi;
        p += 4;
    }
    __m128d rest = _mm256_castpd256_pd128(half);
    if (n & 2) {
        _mm_storeu_pd(p, rest);
        rest = _mm256_extractf128_pd(half, 1);
        p += 2;
    }
    if (n & 1)
        _mm_store_sd(p, rest);
}

/* Lanes 0+4, 1+5, 2+6, 3+7; then 0+2, 1+3; then 0+1. */
static inline double d8_sum(d8 a)
{
    const __m256d four = _mm256_add_pd(a.lo, a.hi);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

static inline d8 f8_widen(f8 a)
{
    return (d8){_mm256_cvtps_pd(_mm256_castps256_ps128(a)),
                _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))};
}
/* Not f8_widen(f8_load(p)): a conversion that reads memory saves a shuffle. */
static inline d8 f32_load_wide(const float *p)
{
    return (d8){_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
}

static inline f8 f16_load_part(const bnf_f16 *p, ptrdiff_t n, f8 fill)
{
    return _mm256_blendv_ps(fill, f16_widen(halves_load_part(&p->bits, n)),
                            _mm256_castsi256_ps(f8_first(n)));
}
static inline void f16_store_part(bnf_f16 *p, ptrdiff_t n, f8 a)
{
    halves_store_part(&p->bits, n, f16_narrow(a));
}
static inline d8 f16_load_wide(const bnf_f16 *p) { return f8_widen(f16_load(p)); }

/* Rounded to nearest even: 0x7fff, plus 1 if the upper half is odd, carries into
 * the upper half exactly if it must be rounded up.  A NaN keeps its upper half,
 * made quiet. */
static inline __m128i bf16_narrow(f8 a)
{
    const __m256i bits = _mm256_castps_si256(a), upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd);
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i wide = _mm256_blendv_epi8(rounded, quiet, is_nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
static inline f8 bf16_load_part(const bnf_bf16 *p, ptrdiff_t n, f8 fill)
{
    return _mm256_blendv_ps(fill, bf16_widen(halves_load_part(&p->bits, n)),
                            _mm256_castsi256_ps(f8_first(n)));
}
static inline void bf16_store_part(bnf_bf16 *p, ptrdiff_t n, f8 a)
{
    halves_store_part(&p->bits, n, bf16_narrow(a));
}
static inline d8 bf16_load_wide(const bnf_bf16 *p) { return f8_widen(bf16_load(p)); }

#include "simd_pairs.h"

#endif
