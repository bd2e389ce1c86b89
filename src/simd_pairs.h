/* Sixteen lanes of float32 as two f8, for the sets whose registers do not hold them: the operations
 * of simd_avx512.h, made of those that the including header has for eight lanes. */
#ifndef BNFAST_SIMD_PAIRS_H
#define BNFAST_SIMD_PAIRS_H

typedef struct {
    f8 lo, hi;
} f32x16;

static inline f32x16 f32x16_set1(double a) { return (f32x16){f8_set1(a), f8_set1(a)}; }
static inline f32x16 f32x16_load(const float *p) { return (f32x16){f8_load(p), f8_load(p + 8)}; }
static inline void f32x16_store(float *p, f32x16 a)
{
    f8_store(p, a.lo);
    f8_store(p + 8, a.hi);
}
static inline void f32x16_stream(float *p, f32x16 a)
{
    f8_stream(p, a.lo);
    f8_stream(p + 8, a.hi);
}
/* The first n (1 to 15) lanes from memory, the others from fill. */
static inline f32x16 f32x16_load_part(const float *p, ptrdiff_t n, f32x16 fill)
{
    fill.lo = n < 8 ? f8_load_part(p, n, fill.lo) : f8_load(p);
    fill.hi = n > 8 ? f8_load_part(p + 8, n - 8, fill.hi) : fill.hi;
    return fill;
}
static inline void f32x16_store_part(float *p, ptrdiff_t n, f32x16 a)
{
    if (n < 8) {
        f8_store_part(p, n, a.lo);
        return;
    }
    f8_store(p, a.lo);
    if (n > 8)
        f8_store_part(p + 8, n - 8, a.hi);
}
static inline f32x16 f32x16_add(f32x16 a, f32x16 b)
{
    return (f32x16){f8_add(a.lo, b.lo), f8_add(a.hi, b.hi)};
}
static inline f32x16 f32x16_sub(f32x16 a, f32x16 b)
{
    return (f32x16){f8_sub(a.lo, b.lo), f8_sub(a.hi, b.hi)};
}
static inline f32x16 f32x16_mul(f32x16 a, f32x16 b)
{
    return (f32x16){f8_mul(a.lo, b.lo), f8_mul(a.hi, b.hi)};
}
static inline f32x16 f32x16_div(f32x16 a, f32x16 b)
{
    return (f32x16){f8_div(a.lo, b.lo), f8_div(a.hi, b.hi)};
}
static inline f32x16 f32x16_fma(f32x16 a, f32x16 b, f32x16 c)
{
    return (f32x16){f8_fma(a.lo, b.lo, c.lo), f8_fma(a.hi, b.hi, c.hi)};
}
static inline f32x16 f32x16_max(f32x16 a, f32x16 b)
{
    return (f32x16){f8_max(a.lo, b.lo), f8_max(a.hi, b.hi)};
}
static inline f32x16 f32x16_min(f32x16 a, f32x16 b)
{
    return (f32x16){f8_min(a.lo, b.lo), f8_min(a.hi, b.hi)};
}
/* a <= b ? yes : no */
static inline f32x16 f32x16_select_le(f32x16 a, f32x16 b, f32x16 yes, f32x16 no)
{
    return (f32x16){f8_select_le(a.lo, b.lo, yes.lo, no.lo),
                    f8_select_le(a.hi, b.hi, yes.hi, no.hi)};
}
/* 2^n for an integer n from -126 to 127. */
static inline f32x16 f32x16_pow2(f32x16 n) { return (f32x16){f8_pow2(n.lo), f8_pow2(n.hi)}; }
/* The first n (0 to 16) lanes of a, the others of b. */
static inline f32x16 f32x16_select_first(ptrdiff_t n, f32x16 a, f32x16 b)
{
    return (f32x16){f8_select_first(n, a.lo, b.lo), f8_select_first(n - 8, a.hi, b.hi)};
}

/* The lower and the upper eight lanes, widened. */
static inline d8 f32x16_low(f32x16 a) { return f8_widen(a.lo); }
static inline d8 f32x16_high(f32x16 a) { return f8_widen(a.hi); }

static inline d8 f32_load_wide_part(const float *p, ptrdiff_t n, d8 fill)
{
    return d8_select_first(n, f8_widen(f8_load_part(p, n, f8_set1(0))), fill);
}

/* --- float16 --- */

static inline f32x16 f16x16_load(const bnf_f16 *p)
{
    return (f32x16){f16_load(p), f16_load(p + 8)};
}
static inline f32x16 f16x16_load_part(const bnf_f16 *p, ptrdiff_t n, f32x16 fill)
{
    fill.lo = n < 8 ? f16_load_part(p, n, fill.lo) : f16_load(p);
    fill.hi = n > 8 ? f16_load_part(p + 8, n - 8, fill.hi) : fill.hi;
    return fill;
}
static inline void f16x16_store(bnf_f16 *p, f32x16 a)
{
    f16_store(p, a.lo);
    f16_store(p + 8, a.hi);
}
static inline void f16x16_store_part(bnf_f16 *p, ptrdiff_t n, f32x16 a)
{
    if (n < 8) {
        f16_store_part(p, n, a.lo);
        return;
    }
    f16_store(p, a.lo);
    if (n > 8)
        f16_store_part(p + 8, n - 8, a.hi);
}
static inline void f16x16_stream(bnf_f16 *p, f32x16 a)
{
    f16_stream(p, a.lo);
    f16_stream(p + 8, a.hi);
}
static inline d8 f16_load_wide_part(const bnf_f16 *p, ptrdiff_t n, d8 fill)
{
    return d8_select_first(n, f8_widen(f16_load_part(p, n, f8_set1(0))), fill);
}

/* --- bfloat16 --- */

static inline f32x16 bf16x16_load(const bnf_bf16 *p)
{
    return (f32x16){bf16_load(p), bf16_load(p + 8)};
}
static inline f32x16 bf16x16_load_part(const bnf_bf16 *p, ptrdiff_t n, f32x16 fill)
{
    fill.lo = n < 8 ? bf16_load_part(p, n, fill.lo) : bf16_load(p);
    fill.hi = n > 8 ? bf16_load_part(p + 8, n - 8, fill.hi) : fill.hi;
    return fill;
}
static inline void bf16x16_store(bnf_bf16 *p, f32x16 a)
{
    bf16_store(p, a.lo);
    bf16_store(p + 8, a.hi);
}
static inline void bf16x16_store_part(bnf_bf16 *p, ptrdiff_t n, f32x16 a)
{
    if (n < 8) {
        bf16_store_part(p, n, a.lo);
        return;
    }
    bf16_store(p, a.lo);
    if (n > 8)
        bf16_store_part(p + 8, n - 8, a.hi);
}
static inline void bf16x16_stream(bnf_bf16 *p, f32x16 a)
{
    bf16_stream(p, a.lo);
    bf16_stream(p + 8, a.hi);
}
static inline d8 bf16_load_wide_part(const bnf_bf16 *p, ptrdiff_t n, d8 fill)
{
    return d8_select_first(n, f8_widen(bf16_load_part(p, n, f8_set1(0))), fill);
}

#endif
