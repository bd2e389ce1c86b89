/* Eight halves, float16 or bfloat16, are one 128-bit register on every x86 set. */
#ifndef BNFAST_SIMD_M128I_H
#define BNFAST_SIMD_M128I_H

#include <emmintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline __m128i halves_load(const uint16_t *p) { return _mm_loadu_si128((const __m128i *)p); }
static inline void halves_store(uint16_t *p, __m128i a) { _mm_storeu_si128((__m128i *)p, a); }
static inline void halves_stream(uint16_t *p, __m128i a) { _mm_stream_si128((__m128i *)p, a); }

/* The first n (1 to 7) from memory, zeros after them. */
static inline __m128i halves_load_part(const uint16_t *p, ptrdiff_t n)
{
    __m128i a = n & 1 ? _mm_cvtsi32_si128(p[n - 1]) : _mm_setzero_si128();
    if (n & 2) {
        int two;
        memcpy(&two, p + (n & 4), sizeof two);
        a = _mm_unpacklo_epi32(_mm_cvtsi32_si128(two), a);
    }
    if (n & 4)
        a = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *)p), a);
    return a;
}

static inline void halves_store_part(uint16_t *p, ptrdiff_t n, __m128i a)
{
    if (n & 4) {
        _mm_storel_epi64((__m128i *)p, a);
        a = _mm_srli_si128(a, 8);
        p += 4;
    }
    if (n & 2) {
        const int two = _mm_cvtsi128_si32(a);
        memcpy(p, &two, sizeof two);
        a = _mm_srli_si128(a, 4);
        p += 2;
    }
    if (n & 1)
        *p = (uint16_t)_mm_cvtsi128_si32(a);
}

#endif
