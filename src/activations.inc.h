/* The formulas of activations.inc: for each entry, `name(z, slope)`, and `name_gradient(dy, z,
 * slope)`, which is dy times the derivative at the pre-activation z (or at y, from_output).
 *
 * NaN passes through: max and min return their second operand if one is NaN.  At a kink the
 * gradient is PyTorch's: 0, or the slope of leaky_relu; of hardswish 0 at -3 and 1 at 3. */

INLINE vec NAME(relu)(vec z, vec slope)
{
    (void)slope;
    return max(set1(0.0), z);
}

INLINE vec NAME(relu_gradient)(vec dy, vec z, vec slope)
{
    (void)slope;
    return select_le(z, set1(0.0), set1(0.0), dy);
}

INLINE vec NAME(relu6)(vec z, vec slope)
{
    (void)slope;
    return min(set1(6.0), max(set1(0.0), z));
}

INLINE vec NAME(relu6_gradient)(vec dy, vec z, vec slope)
{
    (void)slope;
    const vec zero = set1(0.0);
    return select_le(z, zero, zero, select_le(set1(6.0), z, zero, dy));
}

/* 0 < slope <= 1 */
INLINE vec NAME(leaky_relu)(vec z, vec slope) { return max(mul(slope, z), z); }

INLINE vec NAME(leaky_relu_gradient)(vec dy, vec z, vec slope)
{
    return select_le(z, set1(0.0), mul(slope, dy), dy);
}

/* z * min(max(z + 3, 0), 6) / 6.  The factor of z is computed first, since z * 6 overflows for
 * large z.  0 is selected up to -3, since the product is NaN at minus infinity. */
INLINE vec NAME(hardswish)(vec z, vec slope)
{
    (void)slope;
    const vec share = mul(min(set1(6.0), add(z, set1(3.0))), set1(1.0 / 6));
    return select_le(z, set1(-3.0), set1(0.0), mul(z, share));
}

INLINE vec NAME(hardswish_gradient)(vec dy, vec z, vec slope)
{
    (void)slope;
    const vec between = mul(dy, fmadd(z, set1(1.0 / 3), set1(0.5)));
    return select_le(z, set1(-3.0), set1(0.0), select_le(set1(3.0), z, dy, between));
}

/* ---- Any of them */

INLINE vec NAME(activate)(vec z, vec slope, variant v)
{
    switch (v.activation) {
#define ACTIVATION(CODE, name, ...) \
    case BNF_##CODE:                \
        return NAME(name)(z, slope);
#include "activations.inc"
    default:
        return z;
    }
}

INLINE vec NAME(activate_gradient)(vec dy, vec z, vec slope, variant v)
{
    switch (v.activation) {
#define ACTIVATION(CODE, name, ...) \
    case BNF_##CODE:                \
        return NAME(name##_gradient)(dy, z, slope);
#include "activations.inc"
    default:
        return dy;
    }
}
