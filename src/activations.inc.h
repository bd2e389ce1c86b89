/* The formulas of activations.inc: for each entry, `name(z, slope)`, and `name_gradient(dy, z,
 * slope)`, which is dy times the derivative at the pre-activation z (or at y, from_output).
 *
 * NaN passes through: max and min return their second operand if one is NaN.  At a kink the
 * gradient is PyTorch's: 0, or the slope of leaky_relu; of hardswish 0 at -3 and 1 at 3. */

ISA_INLINE vec VEC(relu)(vec z, vec slope)
{
    (void)slope;
    return max(set1(0.0), z);
}

ISA_INLINE vec VEC(relu_gradient)(vec dy, vec z, vec slope)
{
    (void)slope;
    return select_le(z, set1(0.0), set1(0.0), dy);
}

ISA_INLINE vec VEC(relu6)(vec z, vec slope)
{
    (void)slope;
    return min(set1(6.0), max(set1(0.0), z));
}

ISA_INLINE vec VEC(relu6_gradient)(vec dy, vec z, vec slope)
{
    (void)slope;
    const vec zero = set1(0.0);
    return select_le(z, zero, zero, select_le(set1(6.0), z, zero, dy));
}

/* 0 < slope <= 1 */
ISA_INLINE vec VEC(leaky_relu)(vec z, vec slope) { return max(mul(slope, z), z); }

ISA_INLINE vec VEC(leaky_relu_gradient)(vec dy, vec z, vec slope)
{
    return select_le(z, set1(0.0), mul(slope, dy), dy);
}

/* z * min(max(z + 3, 0), 6) / 6.  The factor of z is computed first, since z * 6 overflows for
 * large z.  0 is selected up to -3, since the product is NaN at minus infinity. */
ISA_INLINE vec VEC(hardswish)(vec z, vec slope)
{
    (void)slope;
    const vec share = mul(min(set1(6.0), add(z, set1(3.0))), set1(1.0 / 6));
    return select_le(z, set1(-3.0), set1(0.0), mul(z, share));
}

ISA_INLINE vec VEC(hardswish_gradient)(vec dy, vec z, vec slope)
{
    (void)slope;
    const vec between = mul(dy, fmadd(z, set1(1.0 / 3), set1(0.5)));
    return select_le(z, set1(-3.0), set1(0.0), select_le(set1(3.0), z, dy, between));
}

#include "smooth.inc.h"

/* A function that is called, which keeps the loops small. */
static __attribute__((noinline)) vec VEC(activate_smoothly)(vec z, bnf_activation activation)
{
    switch (activation) {
#define ACTIVATION(...)
#define SMOOTH(CODE, name) \
    case BNF_##CODE:       \
        return VEC(name)(z);
#include "activations.inc"
    default:
        return z;
    }
}

static __attribute__((noinline)) vec VEC(smooth_slope)(vec z, bnf_activation activation)
{
    switch (activation) {
#define ACTIVATION(...)
#define SMOOTH(CODE, name) \
    case BNF_##CODE:       \
        return VEC(name##_slope)(z);
#include "activations.inc"
    default:
        return z;
    }
}

/* ---- Any of them */

ISA_INLINE vec VEC(activate)(vec z, vec slope, variant v)
{
    if (v.smooth)
        return VEC(activate_smoothly)(z, v.activation);
    switch (v.activation) {
#define SMOOTH(...)
#define ACTIVATION(CODE, name, ...) \
    case BNF_##CODE:                \
        return VEC(name)(z, slope);
#include "activations.inc"
    default:
        return z;
    }
}

ISA_INLINE vec VEC(activate_gradient)(vec dy, vec z, vec slope, variant v)
{
    if (v.smooth)
        return mul(dy, VEC(smooth_slope)(z, v.activation));
    switch (v.activation) {
#define SMOOTH(...)
#define ACTIVATION(CODE, name, ...) \
    case BNF_##CODE:                \
        return VEC(name##_gradient)(dy, z, slope);
#include "activations.inc"
    default:
        return dy;
    }
}
