/* The smooth activations of activations.inc, on `vec`: for each entry `name(z)` and its derivative,
 * `name_slope(z)`.
 *
 * Each is one exponential, of a number that is not positive and so cannot overflow, one division
 * and, for gelu, polynomials.  Only sums, products and selections are used, no table and no
 * function of the C library, so sets with a fused multiply-add agree in all bits.  What must be
 * exact is so without one, too.  NaN passes, as in activations.inc.h.
 *
 * Errors found, in units in the last place: of values at most 2.5 (sigmoid, tanh), 3.2 (silu) and
 * 3.0 (gelu), of derivatives at most 2 of the largest derivative's units (docs/accuracy.md).  Tests
 * allow 4. */

#define SINGLE (sizeof(P) == sizeof(float))
#define COUNT(list) ((int)(sizeof list / sizeof *list))
/* Of NAME_SINGLE or NAME_DOUBLE. */
#define POLYNOMIAL(x, NAME)                                           \
    (SINGLE ? VEC(polynomial)(x, NAME##_SINGLE, COUNT(NAME##_SINGLE)) \
            : VEC(polynomial)(x, NAME##_DOUBLE, COUNT(NAME##_DOUBLE)))

ISA_INLINE vec VEC(polynomial)(vec x, const double *c, int count)
{
    vec sum = set1(c[count - 1]);
#pragma GCC unroll 12
    for (int i = count - 2; i >= 0; i--)
        sum = fmadd(sum, x, set1(c[i]));
    return sum;
}

/* a rounded to a multiple of step, a power of two: the sum has no digit below it. */
ISA_INLINE vec VEC(rounded_to)(vec a, double step)
{
    const vec large = set1(step * (SINGLE ? 0x1.8p23 : 0x1.8p52));
    return sub(add(a, large), large);
}

/* |z|, or most if that is less */
ISA_INLINE vec VEC(size_up_to)(vec z, double most)
{
    return min(set1(most), max(sub(set1(0.0), z), z));
}

/* --- exp(x + low) = 2^n (1 + rest), for x from -1100 to 0 and a low of a much smaller size */

typedef struct {
    vec n, rest;
} VEC(exponential);

/* The nearest integer to x / log(2). */
ISA_INLINE vec VEC(powers_in)(vec x)
{
    return VEC(rounded_to)(mul(x, set1(0x1.71547652b82fep+0)), 1.0);
}

/* Cody and Waite's reduction by n log(2), in two parts: n times the first 16 (40) bits of log(2) is
 * exact, and so is its difference from x. */
ISA_INLINE vec VEC(reduced)(vec x, vec n)
{
    return fmadd(n, set1(SINGLE ? -0x1.62e4p-1 : -0x1.62e42fefa2p-1), x);
}

/* The other bits; r is then between the halves of log(2). */
ISA_INLINE VEC(exponential) VEC(exponential_of_reduced)(vec reduced, vec n)
{
    const double other_bits = SINGLE ? 0x1.7f7d1cf79abcap-20 : 0x1.9ef35793c7673p-41;
    const vec r = fmadd(n, set1(-other_bits), reduced);
    return (VEC(exponential)){n, fmadd(mul(r, r), POLYNOMIAL(r, EXP), r)};
}

ISA_INLINE VEC(exponential) VEC(exponential_of)(vec x)
{
    const vec n = VEC(powers_in)(x);
    return VEC(exponential_of_reduced)(VEC(reduced)(x, n), n);
}

ISA_INLINE VEC(exponential) VEC(exponential_of_sum)(vec x, vec low)
{
    const vec n = VEC(powers_in)(add(x, low));
    return VEC(exponential_of_reduced)(add(VEC(reduced)(x, n), low), n);
}

/* The n up to which 2^n times numbers around 1 are no denormals. */
#define LEAST_N (SINGLE ? -100.0 : -1000.0)

/* a 2^n: exactly, and then rounded if the result is a denormal. */
ISA_INLINE vec VEC(scaled)(vec a, vec n)
{
    const vec first = max(set1(LEAST_N), n);
    return mul(mul(a, pow2(first)), pow2(sub(n, first)));
}

/* exp(-a), a >= 0 */
ISA_INLINE vec VEC(exp_minus)(vec a)
{
    const VEC(exponential) e = VEC(exponential_of)(sub(set1(0.0), a));
    return VEC(scaled)(add(set1(1.0), e.rest), e.n);
}

/* --- sigmoid = 1 / (1 + e) or e / (1 + e), e = exp(-|z|); silu = z sigmoid */

/* Sizes of z at which e, times z, is less than half of the smallest number. */
#define VANISHED (SINGLE ? 110.0 : 760.0)

/* factor / (1 + e) for z > 0, and factor_below e / (1 + e).  The factor comes before 2^n: for very
 * negative z their product is a number, while e is not. */
ISA_INLINE vec VEC(sigmoid_times)(vec z, vec a, vec factor, vec factor_below)
{
    const VEC(exponential) e = VEC(exponential_of)(sub(set1(0.0), a));
    const vec first = max(set1(LEAST_N), e.n);
    const vec near = mul(add(set1(1.0), e.rest), pow2(first)); /* e, if 1 + e is not 1 */
    const vec below = mul(mul(factor_below, near), pow2(sub(e.n, first)));
    return div(select_le(set1(0.0), z, factor, below), add(set1(1.0), near));
}

ISA_INLINE vec VEC(sigmoid)(vec z)
{
    const vec one = set1(1.0);
    return VEC(sigmoid_times)(z, VEC(size_up_to)(z, VANISHED), one, one);
}

ISA_INLINE vec VEC(silu)(vec z)
{
    const vec a = VEC(size_up_to)(z, VANISHED);
    return VEC(sigmoid_times)(z, a, z, sub(set1(0.0), a));
}

/* s (1 - s) = e / (1 + e)^2 */
ISA_INLINE vec VEC(sigmoid_slope)(vec z)
{
    const vec e = VEC(exp_minus)(VEC(size_up_to)(z, VANISHED));
    const vec below = add(set1(1.0), e);
    return div(e, mul(below, below));
}

/* s (1 + z (1 - s)) = e (1 + e - |z|) / (1 + e)^2 for z < 0, else 1 minus that of -z */
ISA_INLINE vec VEC(silu_slope)(vec z)
{
    const vec a = VEC(size_up_to)(z, VANISHED);
    const vec e = VEC(exp_minus)(a), below = add(set1(1.0), e);
    const vec left = mul(e, sub(below, a)), right = fmadd(e, a, below);
    return div(select_le(set1(0.0), z, right, left), mul(below, below));
}

/* --- tanh = m / (2 + m) for z < 0, m = exp(-2|z|) - 1; for small z without a subtraction */

ISA_INLINE vec VEC(tanh)(vec z)
{
    const vec a = VEC(size_up_to)(z, 22.0), x = mul(set1(-2.0), a);
    const VEC(exponential) e = VEC(exponential_of)(x);
    const vec power = pow2(e.n), m = fmadd(power, e.rest, sub(power, set1(1.0)));
    const vec above = select_le(set1(0.0), z, sub(set1(0.0), m), m);
    /* z - z^3 / 3 is z, whose sign is kept if it is 0 */
    return select_le(a, set1(SINGLE ? 0x1p-13 : 0x1p-28), z, div(above, add(set1(2.0), m)));
}

/* 4 times sigmoid's at 2 z */
ISA_INLINE vec VEC(tanh_slope)(vec z) { return mul(set1(4.0), VEC(sigmoid_slope)(add(z, z))); }

/* --- gelu = z Phi(z) = max(0, z) - |z| (1 - Phi(|z|)) */

/* exp(-a^2 / 2).  a^2 is rounded nowhere, since an error there is one of the exponent: a = a0 + a1,
 * the square of a0 is exact, and a^2 = a0^2 + a1 (a + a0). */
ISA_INLINE VEC(exponential) VEC(bell)(vec a)
{
    const vec a0 = VEC(rounded_to)(a, SINGLE ? 0x1p-8 : 0x1p-20), half = set1(-0.5);
    const vec low = mul(mul(half, sub(a, a0)), add(a, a0));
    return VEC(exponential_of_sum)(mul(mul(half, a0), a0), low);
}

/* Sizes of z at which z Phi(z) is less than half of the smallest number. */
#define NO_TAIL (SINGLE ? 15.0 : 39.0)
#define NEAR 0.7

/* Phi(a) - 1/2, a <= NEAR */
ISA_INLINE vec VEC(above_half)(vec a) { return mul(a, POLYNOMIAL(mul(a, a), PHI)); }

/* a (1 - Phi(a)) exp(a^2 / 2), NEAR <= a <= NO_TAIL.  (A ratio of two polynomials in a would be
 * quicker, but each of its steps rounds a sum that is as large as the result.) */
ISA_INLINE vec VEC(tail_share)(vec a)
{
    const vec t = div(sub(a, set1(2.0)), add(a, set1(2.0)));
    return POLYNOMIAL(t, TAIL);
}

ISA_INLINE vec VEC(gelu)(vec z)
{
    const vec a = VEC(size_up_to)(z, NO_TAIL);
    const VEC(exponential) e = VEC(bell)(a);
    const vec share = VEC(tail_share)(a);
    const vec tail = VEC(scaled)(fmadd(share, e.rest, share), e.n);
    const vec near = mul(z, POLYNOMIAL(mul(a, a), PHI));
    return select_le(a, set1(NEAR), mul(z, add(set1(0.5), near)), sub(max(set1(0.0), z), tail));
}

/* Phi(z) + z phi(z) = (1 - Phi(a)) - a phi(a) for z = -a, and 1 minus that for z = a */
ISA_INLINE vec VEC(gelu_slope)(vec z)
{
    const vec a = VEC(size_up_to)(z, NO_TAIL), near = set1(NEAR);
    const VEC(exponential) e = VEC(bell)(a);
    const vec height = VEC(scaled)(add(set1(1.0), e.rest), e.n);
    const vec tail = mul(height, div(VEC(tail_share)(a), max(near, a)));
    const vec below = select_le(a, near, sub(set1(0.5), VEC(above_half)(a)), tail);
    const vec left = fmadd(mul(a, height), set1(-0x1.9884533d43651p-2), below);
    return select_le(set1(0.0), z, sub(set1(1.0), left), left);
}
