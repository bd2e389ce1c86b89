/* Eight lanes of float32 or float64 on AArch64's Advanced SIMD, which every
 * such processor has: the operations of simd_avx2.h, with two or four registers
 * per vector.  fma is fused, so results have the bits of the other FMA sets.
 *
 * NEON's max and min return NaN if either operand is NaN.  Those here compare and
 * select, and so return the second operand, as on x86.
 *
 * Streaming stores are plain ones.  There is no intrinsic for them; STNP would
 * need assembly and a pair of registers, and is only a hint.  A core that writes
 * whole lines one after the other stops reading them first without it. */
#ifndef BNFAST_SIMD_NEON_H
#define BNFAST_SIMD_NEON_H

#include <arm_neon.h>
#include <stddef.h>
#include <string.h>

#include "bnfast.h"

/* Traits, see lanes.h. */
#define ISA_UNROLL _Pragma("GCC unroll 8")
#define ISA_FEW_LOOPS false
#define ISA_INLINE static inline __attribute__((always_inline))

typedef struct {
    float32x4_t lo, hi;
} f8;
typedef struct {
    float64x2_t a, b, c, d;
} d8;

/* Nothing to do: another thread that waits for this one sees its plain stores. */
static inline void stream_end(void) {}

static inline f8 f8_set1(double a)
{
    const float32x4_t four = vdupq_n_f32((float)a);
    return (f8){four, four};
}
static inline f8 f8_load(const float *p) { return (f8){vld1q_f32(p), vld1q_f32(p + 4)}; }
static inline void f8_store(float *p, f8 a)
{
    vst1q_f32(p, a.lo);
    vst1q_f32(p + 4, a.hi);
}

/* The first n lanes of a, the others of b. */
static inline f8 f8_select_first(ptrdiff_t n, f8 a, f8 b)
{
    const int32_t lanes[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    const int32x4_t end = vdupq_n_s32((int32_t)n);
    return (f8){vbslq_f32(vcltq_s32(vld1q_s32(lanes), end), a.lo, b.lo),
                vbslq_f32(vcltq_s32(vld1q_s32(lanes + 4), end), a.hi, b.hi)};
}
/* The first n (0 to 3) of four lanes from memory, the others from fill. */
static inline float32x4_t f4_load_part(const float *p, ptrdiff_t n, float32x4_t fill)
{
    if (n >= 2)
        fill = vcombine_f32(vld1_f32(p), vget_high_f32(fill));
    if (n == 3)
        return vld1q_lane_f32(p + 2, fill, 2);
    return n == 1 ? vld1q_lane_f32(p, fill, 0) : fill;
}
/* The first n (1 to 7) lanes from memory, the others from fill. */
static inline f8 f8_load_part(const float *p, ptrdiff_t n, f8 fill)
{
    if (n < 4)
        return (f8){f4_load_part(p, n, fill.lo), fill.hi};
    return (f8){vld1q_f32(p), f4_load_part(p + 4, n - 4, fill.hi)};
}
static inline void f8_store_part(float *p, ptrdiff_t n, f8 a)
{
    float32x4_t rest = a.lo;
    if (n & 4) {
        vst1q_f32(p, rest);
        rest = a.hi;
        p += 4;
    }
    float32x2_t two = vget_low_f32(rest);
    if (n & 2) {
        vst1_f32(p, two);
        two = vget_high_f32(rest);
        p += 2;
    }
    if (n & 1)
        vst1_lane_f32(p, two, 0);
}
static inline void f8_stream(float *p, f8 a) { f8_store(p, a); }

static inline f8 f8_add(f8 a, f8 b) { return (f8){vaddq_f32(a.lo, b.lo), vaddq_f32(a.hi, b.hi)}; }
static inline f8 f8_sub(f8 a, f8 b) { return (f8){vsubq_f32(a.lo, b.lo), vsubq_f32(a.hi, b.hi)}; }
static inline f8 f8_mul(f8 a, f8 b) { return (f8){vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)}; }
static inline f8 f8_div(f8 a, f8 b) { return (f8){vdivq_f32(a.lo, b.lo), vdivq_f32(a.hi, b.hi)}; }
static inline f8 f8_fma(f8 a, f8 b, f8 c)
{
    return (f8){vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi)};
}
/* a > b ? a : b and a < b ? a : b: b if either is NaN. */
static inline f8 f8_max(f8 a, f8 b)
{
    return (f8){vbslq_f32(vcgtq_f32(a.lo, b.lo), a.lo, b.lo),
                vbslq_f32(vcgtq_f32(a.hi, b.hi), a.hi, b.hi)};
}
static inline f8 f8_min(f8 a, f8 b)
{
    return (f8){vbslq_f32(vcltq_f32(a.lo, b.lo), a.lo, b.lo),
                vbslq_f32(vcltq_f32(a.hi, b.hi), a.hi, b.hi)};
}
/* a <= b ? yes : no */
static inline f8 f8_select_le(f8 a, f8 b, f8 yes, f8 no)
{
    return (f8){vbslq_f32(vcleq_f32(a.lo, b.lo), yes.lo, no.lo),
                vbslq_f32(vcleq_f32(a.hi, b.hi), yes.hi, no.hi)};
}
/* 2^n for an integer n from -126 to 127: the sum's last bits are n + 127. */
static inline float32x4_t f4_pow2(float32x4_t n)
{
    const float32x4_t sum = vaddq_f32(n, vdupq_n_f32(0x1.8p23f + 127));
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(sum), 23));
}
static inline f8 f8_pow2(f8 n) { return (f8){f4_pow2(n.lo), f4_pow2(n.hi)}; }

static inline d8 d8_set1(double a)
{
    const float64x2_t two = vdupq_n_f64(a);
    return (d8){two, two, two, two};
}
static inline d8 d8_load(const double *p)
{
    return (d8){vld1q_f64(p), vld1q_f64(p + 2), vld1q_f64(p + 4), vld1q_f64(p + 6)};
}
static inline void d8_store(double *p, d8 x)
{
    vst1q_f64(p, x.a);
    vst1q_f64(p + 2, x.b);
    vst1q_f64(p + 4, x.c);
    vst1q_f64(p + 6, x.d);
}

/* The first n of two lanes (none if n <= 0, both if n >= 2) from memory, the others from fill. */
static inline float64x2_t d2_load_part(const double *p, ptrdiff_t n, float64x2_t fill)
{
    if (n >= 2)
        return vld1q_f64(p);
    return n == 1 ? vld1q_lane_f64(p, fill, 0) : fill;
}
static inline float64x2_t d2_select_first(ptrdiff_t n, float64x2_t a, float64x2_t b)
{
    const float64x2_t either = n >= 2 ? a : b;
    return n == 1 ? vcopyq_laneq_f64(b, 0, a, 0) : either;
}
static inline d8 d8_select_first(ptrdiff_t n, d8 x, d8 y)
{
    return (d8){d2_select_first(n, x.a, y.a), d2_select_first(n - 2, x.b, y.b),
                d2_select_first(n - 4, x.c, y.c), d2_select_first(n - 6, x.d, y.d)};
}
static inline d8 d8_load_part(const double *p, ptrdiff_t n, d8 fill)
{
    return (d8){d2_load_part(p, n, fill.a), d2_load_part(p + 2, n - 2, fill.b),
                d2_load_part(p + 4, n - 4, fill.c), d2_load_part(p + 6, n - 6, fill.d)};
}
static inline void d2_store_part(double *p, ptrdiff_t n, float64x2_t a)
{
    if (n >= 2)
        vst1q_f64(p, a);
    else if (n == 1)
        vst1q_lane_f64(p, a, 0);
}
static inline void d8_store_part(double *p, ptrdiff_t n, d8 x)
{
    d2_store_part(p, n, x.a);
    d2_store_part(p + 2, n - 2, x.b);
    d2_store_part(p + 4, n - 4, x.c);
    d2_store_part(p + 6, n - 6, x.d);
}
static inline void d8_stream(double *p, d8 x) { d8_store(p, x); }

static inline d8 d8_add(d8 x, d8 y)
{
    return (d8){vaddq_f64(x.a, y.a), vaddq_f64(x.b, y.b), vaddq_f64(x.c, y.c), vaddq_f64(x.d, y.d)};
}
static inline d8 d8_sub(d8 x, d8 y)
{
    return (d8){vsubq_f64(x.a, y.a), vsubq_f64(x.b, y.b), vsubq_f64(x.c, y.c), vsubq_f64(x.d, y.d)};
}
static inline d8 d8_mul(d8 x, d8 y)
{
    return (d8){vmulq_f64(x.a, y.a), vmulq_f64(x.b, y.b), vmulq_f64(x.c, y.c), vmulq_f64(x.d, y.d)};
}
static inline d8 d8_div(d8 x, d8 y)
{
    return (d8){vdivq_f64(x.a, y.a), vdivq_f64(x.b, y.b), vdivq_f64(x.c, y.c), vdivq_f64(x.d, y.d)};
}
static inline d8 d8_fma(d8 x, d8 y, d8 z)
{
    return (d8){vfmaq_f64(z.a, x.a, y.a), vfmaq_f64(z.b, x.b, y.b), vfmaq_f64(z.c, x.c, y.c),
                vfmaq_f64(z.d, x.d, y.d)};
}
static inline float64x2_t d2_max(float64x2_t a, float64x2_t b)
{
    return vbslq_f64(vcgtq_f64(a, b), a, b);
}
static inline float64x2_t d2_min(float64x2_t a, float64x2_t b)
{
    return vbslq_f64(vcltq_f64(a, b), a, b);
}
static inline d8 d8_max(d8 x, d8 y)
{
    return (d8){d2_max(x.a, y.a), d2_max(x.b, y.b), d2_max(x.c, y.c), d2_max(x.d, y.d)};
}
static inline d8 d8_min(d8 x, d8 y)
{
    return (d8){d2_min(x.a, y.a), d2_min(x.b, y.b), d2_min(x.c, y.c), d2_min(x.d, y.d)};
}
static inline d8 d8_select_le(d8 x, d8 y, d8 yes, d8 no)
{
    return (d8){
        vbslq_f64(vcleq_f64(x.a, y.a), yes.a, no.a), vbslq_f64(vcleq_f64(x.b, y.b), yes.b, no.b),
        vbslq_f64(vcleq_f64(x.c, y.c), yes.c, no.c), vbslq_f64(vcleq_f64(x.d, y.d), yes.d, no.d)};
}
static inline float64x2_t d2_pow2(float64x2_t n)
{
    const float64x2_t sum = vaddq_f64(n, vdupq_n_f64(0x1.8p52 + 1023));
    return vreinterpretq_f64_u64(vshlq_n_u64(vreinterpretq_u64_f64(sum), 52));
}
/* 2^n for an integer n from -1022 to 1023, as f8_pow2. */
static inline d8 d8_pow2(d8 x)
{
    return (d8){d2_pow2(x.a), d2_pow2(x.b), d2_pow2(x.c), d2_pow2(x.d)};
}

/* Lanes 0+4, 1+5, 2+6, 3+7; then 0+2, 1+3; then 0+1. */
static inline double d8_sum(d8 x)
{
    return vaddvq_f64(vaddq_f64(vaddq_f64(x.a, x.c), vaddq_f64(x.b, x.d)));
}

static inline d8 f8_widen(f8 a)
{
    return (d8){vcvt_f64_f32(vget_low_f32(a.lo)), vcvt_high_f64_f32(a.lo),
                vcvt_f64_f32(vget_low_f32(a.hi)), vcvt_high_f64_f32(a.hi)};
}
static inline d8 f32_load_wide(const float *p) { return f8_widen(f8_load(p)); }

/* --- float16 and bfloat16, eight in one register --- */

static inline uint16x8_t halves_load_part(const uint16_t *p, ptrdiff_t n)
{
    uint16_t lanes[8] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return vld1q_u16(lanes);
}
static inline void halves_store_part(uint16_t *p, ptrdiff_t n, uint16x8_t a)
{
    uint16_t lanes[8];
    vst1q_u16(lanes, a);
    memcpy(p, lanes, (size_t)n * sizeof *p);
}

/* float16, by the conversions that every AArch64 processor has; only arithmetic
 * in float16 is an extension. */
static inline f8 f16_widen(uint16x8_t a)
{
    const float16x8_t halves = vreinterpretq_f16_u16(a);
    return (f8){vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
static inline uint16x8_t f16_narrow(f8 a)
{
    return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(a.lo), a.hi));
}
static inline f8 f16_load(const bnf_f16 *p) { return f16_widen(vld1q_u16(&p->bits)); }
static inline f8 f16_load_part(const bnf_f16 *p, ptrdiff_t n, f8 fill)
{
    return f8_select_first(n, f16_widen(halves_load_part(&p->bits, n)), fill);
}
static inline d8 f16_load_wide(const bnf_f16 *p) { return f8_widen(f16_load(p)); }
static inline void f16_store(bnf_f16 *p, f8 a) { vst1q_u16(&p->bits, f16_narrow(a)); }
static inline void f16_store_part(bnf_f16 *p, ptrdiff_t n, f8 a)
{
    halves_store_part(&p->bits, n, f16_narrow(a));
}
static inline void f16_stream(bnf_f16 *p, f8 a) { f16_store(p, a); }

/* bfloat16, with integer operations: few processors have instructions for it. */
static inline f8 bf16_widen(uint16x8_t a)
{
    return (f8){vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vget_low_u16(a)), 16)),
                vreinterpretq_f32_u32(vshlq_n_u32(vmovl_high_u16(a), 16))};
}
/* Rounded to nearest even: 0x7fff, plus 1 if the upper half is odd, carries into
 * the upper half exactly if it must be rounded up.  A NaN keeps its upper half,
 * made quiet. */
static inline uint16x4_t bf16_narrow_four(float32x4_t a)
{
    const uint32x4_t bits = vreinterpretq_u32_f32(a);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(vdupq_n_u32(0x7fff), odd));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, quiet), 16);
}
static inline uint16x8_t bf16_narrow(f8 a)
{
    return vcombine_u16(bf16_narrow_four(a.lo), bf16_narrow_four(a.hi));
}
static inline f8 bf16_load(const bnf_bf16 *p) { return bf16_widen(vld1q_u16(&p->bits)); }
static inline f8 bf16_load_part(const bnf_bf16 *p, ptrdiff_t n, f8 fill)
{
    return f8_select_first(n, bf16_widen(halves_load_part(&p->bits, n)), fill);
}
static inline d8 bf16_load_wide(const bnf_bf16 *p) { return f8_widen(bf16_load(p)); }
static inline void bf16_store(bnf_bf16 *p, f8 a) { vst1q_u16(&p->bits, bf16_narrow(a)); }
static inline void bf16_store_part(bnf_bf16 *p, ptrdiff_t n, f8 a)
{
    halves_store_part(&p->bits, n, bf16_narrow(a));
}
static inline void bf16_stream(bnf_bf16 *p, f8 a) { bf16_store(p, a); }

#include "simd_pairs.h"

#endif
