/* What AVX2 and AVX-512 have in common: a float32 f8 is one 256-bit register. */
#ifndef BNFAST_SIMD_M256_H
#define BNFAST_SIMD_M256_H

#include <immintrin.h>
#include <stddef.h>

#include "bnfast.h"
#include "simd_m128i.h"

/* Traits, see lanes.h. */
#define ISA_UNROLL_ROWS _Pragma("GCC unroll 8")
#define ISA_FEW_LOOPS false
#define ISA_INLINE static inline __attribute__((always_inline))

typedef __m256 f8;

/* After streaming stores, before another thread may read what they wrote. */
static inline void stream_end(void) { _mm_sfence(); }

static inline f8 f8_set1(double a) { return _mm256_set1_ps((float)a); }
static inline f8 f8_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void f8_store(float *p, f8 a) { _mm256_storeu_ps(p, a); }
/* In quarters of a line: NumPy aligns its arrays to 16 bytes only.  A wider store
 * would have to skip a part of the first and last line, which would then be read
 * from memory. */
static inline void f8_stream(float *p, f8 a)
{
    _mm_stream_ps(p, _mm256_castps256_ps128(a));
    _mm_stream_ps(p + 4, _mm256_extractf128_ps(a, 1));
}
/* The first n lanes, n a multiple of 16 bytes. */
static inline void f8_stream_part(float *p, ptrdiff_t n, f8 a)
{
    if (n == 4)
        _mm_stream_ps(p, _mm256_castps256_ps128(a));
}
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
static inline __m128i bf16_narrow(f8 a); /* defined by each set */
static inline f8 bf16_load(const bnf_bf16 *p) { return bf16_widen(halves_load(&p->bits)); }
static inline void bf16_store(bnf_bf16 *p, f8 a) { halves_store(&p->bits, bf16_narrow(a)); }
static inline void bf16_stream(bnf_bf16 *p, f8 a) { halves_stream(&p->bits, bf16_narrow(a)); }

#endif
