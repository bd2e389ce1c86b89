/* The intrinsics of src/simd_avx512.h without AVX-512, for processors that have only AVX2:
 * SIMDe's where it has them (0.8.2 or later), two halves of AVX2 or loops where it lacks
 * them. Included before everything else, as in -include.
 *
 * Loads and stores of a part are loops over its lanes: SIMDe's own touch all 64 bytes, and
 * would not show accesses past a tail. An intrinsic that simd_avx512.h uses and this file
 * does not name is the compiler's own, which it refuses to inline without -mavx512*. */
#ifndef BNFAST_TESTS_AVX512_EMULATED_H
#define BNFAST_TESTS_AVX512_EMULATED_H

#ifdef __AVX512F__
#error "an emulation is to be compiled without the instructions it emulates"
#endif

#include <immintrin.h>
#include <string.h>

#include <simde/x86/avx512/add.h>
#include <simde/x86/avx512/blend.h>
#include <simde/x86/avx512/cast.h>
#include <simde/x86/avx512/cmp.h>
#include <simde/x86/avx512/div.h>
#include <simde/x86/avx512/extract.h>
#include <simde/x86/avx512/fmadd.h>
#include <simde/x86/avx512/loadu.h>
#include <simde/x86/avx512/max.h>
#include <simde/x86/avx512/min.h>
#include <simde/x86/avx512/mul.h>
#include <simde/x86/avx512/permutexvar.h>
#include <simde/x86/avx512/set1.h>
#include <simde/x86/avx512/slli.h>
#include <simde/x86/avx512/storeu.h>
#include <simde/x86/avx512/sub.h>

#define __m512d simde__m512d
#define __mmask8 simde__mmask8

#define _mm512_add_pd simde_mm512_add_pd
#define _mm512_sub_pd simde_mm512_sub_pd
#define _mm512_mul_pd simde_mm512_mul_pd
#define _mm512_div_pd simde_mm512_div_pd
#define _mm512_fmadd_pd simde_mm512_fmadd_pd
#define _mm512_max_pd simde_mm512_max_pd
#define _mm512_min_pd simde_mm512_min_pd
#define _mm512_set1_pd simde_mm512_set1_pd
#define _mm512_loadu_pd simde_mm512_loadu_pd
#define _mm512_storeu_pd simde_mm512_storeu_pd
#define _mm512_castpd_si512 simde_mm512_castpd_si512
#define _mm512_castsi512_pd simde_mm512_castsi512_pd
#define _mm512_slli_epi64 simde_mm512_slli_epi64
#define _mm512_castpd512_pd256 simde_mm512_castpd512_pd256
#undef _mm512_extractf64x4_pd
#define _mm512_extractf64x4_pd simde_mm512_extractf64x4_pd
#define _mm512_mask_blend_pd simde_mm512_mask_blend_pd
#define _mm256_mask_blend_ps simde_mm256_mask_blend_ps
#undef _mm512_cmp_pd_mask
#define _mm512_cmp_pd_mask simde_mm512_cmp_pd_mask
#undef _mm256_cmp_ps_mask
#define _mm256_cmp_ps_mask simde_mm256_cmp_ps_mask
#define _mm256_permutexvar_epi16 simde_mm256_permutexvar_epi16

#define _mm512_mask_loadu_pd emulated_mm512_mask_loadu_pd
#define _mm512_mask_storeu_pd emulated_mm512_mask_storeu_pd
#define _mm256_mask_loadu_ps emulated_mm256_mask_loadu_ps
#define _mm256_mask_storeu_ps emulated_mm256_mask_storeu_ps
#define _mm_maskz_loadu_epi16 emulated_mm_maskz_loadu_epi16
#define _mm_mask_storeu_epi16 emulated_mm_mask_storeu_epi16
#define _mm512_cvtps_pd emulated_mm512_cvtps_pd
#define _mm256_mask_or_epi32 emulated_mm256_mask_or_epi32

/* The lanes of a mask, with so many bytes each. */
static inline void copy_lanes(void *to, const void *from, unsigned mask, size_t bytes)
{
    for (size_t i = 0; i < 8; i++)
        if (mask >> i & 1)
            memcpy((char *)to + i * bytes, (const char *)from + i * bytes, bytes);
}

static inline __m512d emulated_mm512_mask_loadu_pd(__m512d fill, __mmask8 mask, const void *p)
{
    copy_lanes(&fill, p, mask, sizeof(double));
    return fill;
}

static inline void emulated_mm512_mask_storeu_pd(void *p, __mmask8 mask, __m512d a)
{
    copy_lanes(p, &a, mask, sizeof(double));
}

static inline __m256 emulated_mm256_mask_loadu_ps(__m256 fill, __mmask8 mask, const void *p)
{
    copy_lanes(&fill, p, mask, sizeof(float));
    return fill;
}

static inline void emulated_mm256_mask_storeu_ps(void *p, __mmask8 mask, __m256 a)
{
    copy_lanes(p, &a, mask, sizeof(float));
}

static inline __m128i emulated_mm_maskz_loadu_epi16(__mmask8 mask, const void *p)
{
    __m128i a = _mm_setzero_si128();
    copy_lanes(&a, p, mask, sizeof(short));
    return a;
}

static inline void emulated_mm_mask_storeu_epi16(void *p, __mmask8 mask, __m128i a)
{
    copy_lanes(p, &a, mask, sizeof(short));
}

static inline __m512d emulated_mm512_cvtps_pd(__m256 a)
{
    double lanes[8];
    _mm256_storeu_pd(lanes, _mm256_cvtps_pd(_mm256_castps256_ps128(a)));
    _mm256_storeu_pd(lanes + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
    return _mm512_loadu_pd(lanes);
}

static inline __m256i emulated_mm256_mask_or_epi32(__m256i otherwise, __mmask8 mask, __m256i a,
                                                   __m256i b)
{
    const __m256i either = _mm256_or_si256(a, b);
    copy_lanes(&otherwise, &either, mask, sizeof(int));
    return otherwise;
}

#endif
