/* Eight lanes of float32 or float64 in plain C11: the operations of
 * simd_avx2.h on arrays, for processors that have no header of their own.
 *
 * fma is fused if the processor that the compiler builds for has an instruction
 * for it (AArch64, POWER, RISC-V with D, s390x).  Results then have the bits of
 * the FMA sets.  Elsewhere (plain x86-64) it rounds twice, and results have the
 * bits of SSE2: the C library's fma is exact, but takes some hundred
 * instructions per value. */
#ifndef BNFAST_SIMD_SCALAR_H
#define BNFAST_SIMD_SCALAR_H

#include <stddef.h>
#include <string.h>

#include "bnfast.h"

/* Traits, see lanes.h.  Beside lanes that are computed one by one, the branches of a variant cost
 * little, and a loop for each variant would be megabytes of scalar code: here the compiler decides
 * what to inline. */
#define ISA_UNROLL
#define ISA_FEW_LOOPS true
#define ISA_INLINE static inline

typedef struct {
    float lane[8];
} f8;
typedef struct {
    double lane[8];
} d8;

/* Every store goes through the caches, in order. */
static inline void stream_end(void) {}

static inline f8 f8_load(const float *p)
{
    f8 r;
    memcpy(r.lane, p, sizeof r);
    return r;
}
static inline void f8_store(float *p, f8 a) { memcpy(p, a.lane, sizeof a); }
/* The first n lanes of a, the others of b. */
static inline f8 f8_select_first(ptrdiff_t n, f8 a, f8 b)
{
    for (int i = 0; i < 8; i++)
        b.lane[i] = i < n ? a.lane[i] : b.lane[i];
    return b;
}
/* The first n (1 to 7) lanes from memory, the others from fill. */
static inline f8 f8_load_part(const float *p, ptrdiff_t n, f8 fill)
{
    memcpy(fill.lane, p, (size_t)n * sizeof *p);
    return fill;
}
static inline void f8_store_part(float *p, ptrdiff_t n, f8 a)
{
    memcpy(p, a.lane, (size_t)n * sizeof *p);
}
static inline void f8_stream(float *p, f8 a) { f8_store(p, a); }

static inline f8 f8_set1(double a)
{
    f8 r;
    for (int i = 0; i < 8; i++)
        r.lane[i] = (float)a;
    return r;
}
static inline f8 f8_add(f8 a, f8 b)
{
    for (int i = 0; i < 8; i++)
        a.lane[i] += b.lane[i];
    return a;
}
static inline f8 f8_sub(f8 a, f8 b)
{
    for (int i = 0; i < 8; i++)
        a.lane[i] -= b.lane[i];
    return a;
}
static inline f8 f8_mul(f8 a, f8 b)
{
    for (int i = 0; i < 8; i++)
        a.lane[i] *= b.lane[i];
    return a;
}
static inline f8 f8_div(f8 a, f8 b)
{
    for (int i = 0; i < 8; i++)
        a.lane[i] /= b.lane[i];
    return a;
}
static inline float f1_fma(float a, float b, float c)
{
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
static inline f8 f8_fma(f8 a, f8 b, f8 c)
{
    for (int i = 0; i < 8; i++)
        c.lane[i] = f1_fma(a.lane[i], b.lane[i], c.lane[i]);
    return c;
}
/* a > b ? a : b and a < b ? a : b: b if either is NaN. */
static inline f8 f8_max(f8 a, f8 b)
{
    for (int i = 0; i < 8; i++)
        b.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return b;
}
static inline f8 f8_min(f8 a, f8 b)
{
    for (int i = 0; i < 8; i++)
        b.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
    return b;
}
/* a <= b ? yes : no */
static inline f8 f8_select_le(f8 a, f8 b, f8 yes, f8 no)
{
    for (int i = 0; i < 8; i++)
        no.lane[i] = a.lane[i] <= b.lane[i] ? yes.lane[i] : no.lane[i];
    return no;
}
/* 2^n for an integer n from -126 to 127: the sum's last bits are n + 127. */
static inline f8 f8_pow2(f8 n)
{
    for (int i = 0; i < 8; i++) {
        const float sum = n.lane[i] + (0x1.8p23f + 127);
        uint32_t bits;
        memcpy(&bits, &sum, sizeof bits);
        bits <<= 23;
        memcpy(&n.lane[i], &bits, sizeof bits);
    }
    return n;
}

static inline d8 d8_load(const double *p)
{
    d8 r;
    memcpy(r.lane, p, sizeof r);
    return r;
}
static inline void d8_store(double *p, d8 a) { memcpy(p, a.lane, sizeof a); }
static inline d8 d8_select_first(ptrdiff_t n, d8 a, d8 b)
{
    for (int i = 0; i < 8; i++)
        b.lane[i] = i < n ? a.lane[i] : b.lane[i];
    return b;
}
static inline d8 d8_load_part(const double *p, ptrdiff_t n, d8 fill)
{
    memcpy(fill.lane, p, (size_t)n * sizeof *p);
    return fill;
}
static inline void d8_store_part(double *p, ptrdiff_t n, d8 a)
{
    memcpy(p, a.lane, (size_t)n * sizeof *p);
}
static inline void d8_stream(double *p, d8 a) { d8_store(p, a); }

static inline d8 d8_set1(double a)
{
    d8 r;
    for (int i = 0; i < 8; i++)
        r.lane[i] = a;
    return r;
}
static inline d8 d8_add(d8 a, d8 b)
{
    for (int i = 0; i < 8; i++)
        a.lane[i] += b.lane[i];
    return a;
}
static inline d8 d8_sub(d8 a, d8 b)
{
    for (int i = 0; i < 8; i++)
        a.lane[i] -= b.lane[i];
    return a;
}
static inline d8 d8_mul(d8 a, d8 b)
{
    for (int i = 0; i < 8; i++)
        a.lane[i] *= b.lane[i];
    return a;
}
static inline d8 d8_div(d8 a, d8 b)
{
    for (int i = 0; i < 8; i++)
        a.lane[i] /= b.lane[i];
    return a;
}
static inline double d1_fma(double a, double b, double c)
{
#ifdef __FP_FAST_FMA
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}
static inline d8 d8_fma(d8 a, d8 b, d8 c)
{
    for (int i = 0; i < 8; i++)
        c.lane[i] = d1_fma(a.lane[i], b.lane[i], c.lane[i]);
    return c;
}
static inline d8 d8_max(d8 a, d8 b)
{
    for (int i = 0; i < 8; i++)
        b.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return b;
}
static inline d8 d8_min(d8 a, d8 b)
{
    for (int i = 0; i < 8; i++)
        b.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
    return b;
}
static inline d8 d8_select_le(d8 a, d8 b, d8 yes, d8 no)
{
    for (int i = 0; i < 8; i++)
        no.lane[i] = a.lane[i] <= b.lane[i] ? yes.lane[i] : no.lane[i];
    return no;
}
/* 2^n for an integer n from -1022 to 1023, as f8_pow2. */
static inline d8 d8_pow2(d8 n)
{
    for (int i = 0; i < 8; i++) {
        const double sum = n.lane[i] + (0x1.8p52 + 1023);
        uint64_t bits;
        memcpy(&bits, &sum, sizeof bits);
        bits <<= 52;
        memcpy(&n.lane[i], &bits, sizeof bits);
    }
    return n;
}
/* Lanes 0+4, 1+5, 2+6, 3+7; then 0+2, 1+3; then 0+1. */
static inline double d8_sum(d8 a)
{
    for (int half = 4; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            a.lane[i] += a.lane[i + half];
    return a.lane[0];
}

static inline d8 f8_widen(f8 a)
{
    d8 r;
    for (int i = 0; i < 8; i++)
        r.lane[i] = (double)a.lane[i];
    return r;
}
static inline d8 f32_load_wide(const float *p) { return f8_widen(f8_load(p)); }

/* --- float16 and bfloat16, one by one, by their bits --- */

static inline uint32_t bits_of(float a)
{
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    return bits;
}
static inline float of_bits(uint32_t bits)
{
    float a;
    memcpy(&a, &bits, sizeof a);
    return a;
}

/* Exponents are biased by 15, those of float32 by 127: 112 are added, and twice
 * that for infinities and NaNs.  A denormal counts units of 2^-24. */
static inline float f16_widen(bnf_f16 a)
{
    const uint32_t sign = (a.bits & 0x8000u) << 16, size = (a.bits & 0x7fffu) << 13;
    if (size < 1u << 23)
        return of_bits(sign | bits_of((float)(a.bits & 0x3ff) * 0x1p-24f));
    return of_bits(sign | (size + (size < 31u << 23 ? 112u << 23 : 224u << 23)));
}

/* Rounded to nearest even.  The last place of a float16 denormal is 2^-24, and so
 * is that of 0.5 in float32: adding 0.5 rounds to it. */
static inline bnf_f16 f16_narrow(float a)
{
    const uint32_t bits = bits_of(a), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    uint32_t narrow;
    if (size > 0x7f800000) /* NaN, made quiet */
        narrow = 0x7e00 | (size >> 13 & 0x3ff);
    else if (size >= 0x477ff000) /* 65520, half a last place above the largest float16 */
        narrow = 0x7c00;
    else if (size < 113u << 23)
        narrow = bits_of(of_bits(size) + 0.5f) - (126u << 23);
    else
        narrow = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    return (bnf_f16){(uint16_t)(sign | narrow)};
}

static inline float bf16_widen(bnf_bf16 a) { return of_bits((uint32_t)a.bits << 16); }

/* Rounded to nearest even: 0x7fff, plus 1 if the upper half is odd, carries into
 * the upper half exactly if it must be rounded up.  A NaN keeps its upper half,
 * made quiet. */
static inline bnf_bf16 bf16_narrow(float a)
{
    const uint32_t bits = bits_of(a);
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1), quiet = bits | 0x400000;
    return (bnf_bf16){(uint16_t)((a == a ? rounded : quiet) >> 16)};
}

static inline f8 f16_load_part(const bnf_f16 *p, ptrdiff_t n, f8 fill)
{
    for (ptrdiff_t i = 0; i < n; i++)
        fill.lane[i] = f16_widen(p[i]);
    return fill;
}
static inline f8 f16_load(const bnf_f16 *p)
{
    f8 r;
    for (int i = 0; i < 8; i++)
        r.lane[i] = f16_widen(p[i]);
    return r;
}
static inline d8 f16_load_wide(const bnf_f16 *p) { return f8_widen(f16_load(p)); }
static inline void f16_store_part(bnf_f16 *p, ptrdiff_t n, f8 a)
{
    for (ptrdiff_t i = 0; i < n; i++)
        p[i] = f16_narrow(a.lane[i]);
}
static inline void f16_store(bnf_f16 *p, f8 a) { f16_store_part(p, 8, a); }
static inline void f16_stream(bnf_f16 *p, f8 a) { f16_store(p, a); }

static inline f8 bf16_load_part(const bnf_bf16 *p, ptrdiff_t n, f8 fill)
{
    for (ptrdiff_t i = 0; i < n; i++)
        fill.lane[i] = bf16_widen(p[i]);
    return fill;
}
static inline f8 bf16_load(const bnf_bf16 *p)
{
    f8 r;
    for (int i = 0; i < 8; i++)
        r.lane[i] = bf16_widen(p[i]);
    return r;
}
static inline d8 bf16_load_wide(const bnf_bf16 *p) { return f8_widen(bf16_load(p)); }
static inline void bf16_store_part(bnf_bf16 *p, ptrdiff_t n, f8 a)
{
    for (ptrdiff_t i = 0; i < n; i++)
        p[i] = bf16_narrow(a.lane[i]);
}
static inline void bf16_store(bnf_bf16 *p, f8 a) { bf16_store_part(p, 8, a); }
static inline void bf16_stream(bnf_bf16 *p, f8 a) { bf16_store(p, a); }

#include "simd_pairs.h"

#endif
