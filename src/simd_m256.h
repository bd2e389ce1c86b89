/* What AVX2 and AVX-512 have in common: a float32 f8 is one 256-bit register. */
#ifndef BNFAST_SIMD_M256_H
#define BNFAST_SIMD_M256_H

#include <immintrin.h>
#include <stddef.h>

typedef __m256 f8;

/* After streaming stores, before another thread may read what they wrote. */
static inline void stream_end(void) { _mm_sfence(); }

static inline f8 f8_set1(double a) { return _mm256_set1_ps((float)a); }
static inline f8 f8_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void f8_store(float *p, f8 a) { _mm256_storeu_ps(p, a); }
/* In quarters of a line: NumPy aligns its arrays to 16 bytes and no more, and
 * the halves of a line that a wider store had to skip would be read back. */
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
static inline f8 f8_fma(f8 a, f8 b, f8 c) { return _mm256_fmadd_ps(a, b, c); }
/* a > b ? a : b and a < b ? a : b: b where either is NaN. */
static inline f8 f8_max(f8 a, f8 b) { return _mm256_max_ps(a, b); }
static inline f8 f8_min(f8 a, f8 b) { return _mm256_min_ps(a, b); }

#endif
