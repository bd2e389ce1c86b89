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
#include <simde/x86/avx512/and.h>
#include <simde/x86/avx512/blend.h>
#include <simde/x86/avx512/cast.h>
#include <simde/x86/avx512/cmp.h>
#include <simde/x86/avx512/cvt.h>
#include <simde/x86/avx512/div.h>
#include <simde/x86/avx512/extract.h>
#include <simde/x86/avx512/fmadd.h>
#include <simde/x86/avx512/loadu.h>
#include <simde/x86/avx512/max.h>
#include <simde/x86/avx512/min.h>
#include <simde/x86/avx512/mul.h>
#include <simde/x86/avx512/or.h>
#include <simde/x86/avx512/set1.h>
#include <simde/x86/avx512/slli.h>
#include <simde/x86/avx512/srli.h>
#include <simde/x86/avx512/storeu.h>
#include <simde/x86/avx512/sub.h>

#define __m512 simde__m512
#define __m512d simde__m512d
#define __m512i simde__m512i
#define __mmask8 simde__mmask8
#define __mmask16 simde__mmask16

#define _mm512_add_ps simde_mm512_add_ps
#define _mm512_sub_ps simde_mm512_sub_ps
#define _mm512_mul_ps simde_mm512_mul_ps
#define _mm512_div_ps simde_mm512_div_ps
#define _mm512_fmadd_ps simde_mm512_fmadd_ps
#define _mm512_max_ps simde_mm512_max_ps
#define _mm512_min_ps simde_mm512_min_ps
#define _mm512_set1_ps simde_mm512_set1_ps
#define _mm512_loadu_ps simde_mm512_loadu_ps
#define _mm512_storeu_ps simde_mm512_storeu_ps
#define _mm512_mask_blend_ps simde_mm512_mask_blend_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask simde_mm512_cmp_ps_mask
#define _mm512_castps_si512 simde_mm512_castps_si512
#define _mm512_castsi512_ps simde_mm512_castsi512_ps
#define _mm512_castps512_ps256 simde_mm512_castps512_ps256
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps simde_mm512_extractf32x8_ps

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
#define _mm512_mask_blend_pd simde_mm512_mask_blend_pd
#undef _mm512_cmp_pd_mask
#define _mm512_cmp_pd_mask simde_mm512_cmp_pd_mask
#define _mm512_castpd_si512 simde_mm512_castpd_si512
#define _mm512_castsi512_pd simde_mm512_castsi512_pd
#define _mm512_castpd512_pd256 simde_mm512_castpd512_pd256
#undef _mm512_extractf64x4_pd
#define _mm512_extractf64x4_pd simde_mm512_extractf64x4_pd

#define _mm512_add_epi32 simde_mm512_add_epi32
#define _mm512_and_epi32 simde_mm512_and_epi32
#define _mm512_mask_or_epi32 simde_mm512_mask_or_epi32
#define _mm512_set1_epi32 simde_mm512_set1_epi32
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 simde_mm512_slli_epi32
#undef _mm512_slli_epi64
#define _mm512_slli_epi64 simde_mm512_slli_epi64
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 simde_mm512_srli_epi32
#define _mm512_cvtepu16_epi32 simde_mm512_cvtepu16_epi32

#define _mm512_mask_loadu_ps emulated_mm512_mask_loadu_ps
#define _mm512_mask_storeu_ps emulated_mm512_mask_storeu_ps
#define _mm512_mask_loadu_pd emulated_mm512_mask_loadu_pd
#define _mm512_mask_storeu_pd emulated_mm512_mask_storeu_pd
#define _mm256_maskz_loadu_ps emulated_mm256_maskz_loadu_ps
#define _mm256_maskz_loadu_epi16 emulated_mm256_maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 emulated_mm256_mask_storeu_epi16
#define _mm_maskz_loadu_epi16 emulated_mm_maskz_loadu_epi16
#define _mm512_stream_ps emulated_mm512_stream_ps
#define _mm512_stream_pd emulated_mm512_stream_pd
#define _mm512_cvtps_pd emulated_mm512_cvtps_pd
#define _mm512_mask_cvtps_pd emulated_mm512_mask_cvtps_pd
#define _mm512_cvtph_ps emulated_mm512_cvtph_ps
#define _mm512_mask_cvtph_ps emulated_mm512_mask_cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated_mm512_cvtps_ph
#define _mm512_cvtepi32_epi16 emulated_mm512_cvtepi32_epi16

/* The lanes of a mask, with so many bytes each. */
static inline void copy_lanes(void *to, const void *from, unsigned mask, size_t bytes)
{
    for (size_t i = 0; i < 16; i++)
        if (mask >> i & 1)
            memcpy((char *)to + i * bytes, (const char *)from + i * bytes, bytes);
}

static inline __m512 emulated_mm512_mask_loadu_ps(__m512 fill, __mmask16 mask, const void *p)
{
    copy_lanes(&fill, p, mask, sizeof(float));
    return fill;
}

static inline void emulated_mm512_mask_storeu_ps(void *p, __mmask16 mask, __m512 a)
{
    copy_lanes(p, &a, mask, sizeof(float));
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

static inline __m256 emulated_mm256_maskz_loadu_ps(__mmask8 mask, const void *p)
{
    __m256 a = _mm256_setzero_ps();
    copy_lanes(&a, p, mask, sizeof(float));
    return a;
}

static inline __m256i emulated_mm256_maskz_loadu_epi16(__mmask16 mask, const void *p)
{
    __m256i a = _mm256_setzero_si256();
    copy_lanes(&a, p, mask, sizeof(short));
    return a;
}

static inline void emulated_mm256_mask_storeu_epi16(void *p, __mmask16 mask, __m256i a)
{
    copy_lanes(p, &a, mask, sizeof(short));
}

static inline __m128i emulated_mm_maskz_loadu_epi16(__mmask8 mask, const void *p)
{
    __m128i a = _mm_setzero_si128();
    copy_lanes(&a, p, mask, sizeof(short));
    return a;
}

/* The processor refuses addresses that are no multiple of 64, two halves those of 32. */
static inline void must_be_aligned(const void *p)
{
    if ((size_t)p % 64)
        __builtin_trap();
}

static inline void emulated_mm512_stream_ps(void *p, __m512 a)
{
    float lanes[16];
    must_be_aligned(p);
    _mm512_storeu_ps(lanes, a);
    _mm256_stream_ps((float *)p, _mm256_loadu_ps(lanes));
    _mm256_stream_ps((float *)p + 8, _mm256_loadu_ps(lanes + 8));
}

static inline void emulated_mm512_stream_pd(void *p, __m512d a)
{
    double lanes[8];
    must_be_aligned(p);
    _mm512_storeu_pd(lanes, a);
    _mm256_stream_pd((double *)p, _mm256_loadu_pd(lanes));
    _mm256_stream_pd((double *)p + 4, _mm256_loadu_pd(lanes + 4));
}

static inline __m512d emulated_mm512_cvtps_pd(__m256 a)
{
    double lanes[8];
    _mm256_storeu_pd(lanes, _mm256_cvtps_pd(_mm256_castps256_ps128(a)));
    _mm256_storeu_pd(lanes + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
    return _mm512_loadu_pd(lanes);
}

static inline __m512d emulated_mm512_mask_cvtps_pd(__m512d fill, __mmask8 mask, __m256 a)
{
    const __m512d wide = emulated_mm512_cvtps_pd(a);
    copy_lanes(&fill, &wide, mask, sizeof(double));
    return fill;
}

static inline __m512 emulated_mm512_cvtph_ps(__m256i a)
{
    float lanes[16];
    _mm256_storeu_ps(lanes, _mm256_cvtph_ps(_mm256_castsi256_si128(a)));
    _mm256_storeu_ps(lanes + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
    return _mm512_loadu_ps(lanes);
}

static inline __m512 emulated_mm512_mask_cvtph_ps(__m512 fill, __mmask16 mask, __m256i a)
{
    const __m512 wide = emulated_mm512_cvtph_ps(a);
    copy_lanes(&fill, &wide, mask, sizeof(float));
    return fill;
}

/* In the rounding that simd_avx512.h asks for: an instruction has it as a constant. */
static inline __m256i emulated_mm512_cvtps_ph(__m512 a, int rounding)
{
    float lanes[16];
    __m128i halves[2];
    _mm512_storeu_ps(lanes, a);
    for (int i = 0; i < 2; i++) {
        const __m256 eight = _mm256_loadu_ps(lanes + 8 * i);
        halves[i] = rounding == (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                        ? _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                        : _mm256_cvtps_ph(eight, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    }
    return _mm256_loadu_si256((const __m256i *)halves);
}

/* The lower halves of 32-bit lanes. */
static inline __m256i emulated_mm512_cvtepi32_epi16(__m512i a)
{
    short lanes[16];
    for (int i = 0; i < 16; i++)
        memcpy(&lanes[i], (const char *)&a + 4 * i, sizeof *lanes);
    return _mm256_loadu_si256((const __m256i *)lanes);
}

#endif
