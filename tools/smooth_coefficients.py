"""Derive the coefficients of src/smooth.h: `python tools/smooth_coefficients.py`. Needs mpmath.

Each function is interpolated at Chebyshev's nodes with 60 digits, which is nearly as good as the
best polynomial of the same degree. Printed are the coefficients, from the constant one on, and the
largest relative error before they are rounded.
"""

import mpmath as mp

mp.mp.dps = 60


def chebyshev_nodes(low, high, count):
    angles = [mp.pi * (2 * k + 1) / (2 * count) for k in range(count)]
    return [(low + high) / 2 - (high - low) / 2 * mp.cos(angle) for angle in angles]


def polynomial(function, low, high, degree):
    """The coefficients, and the largest error relative to the function."""
    nodes = chebyshev_nodes(low, high, degree + 1)
    powers = mp.matrix([[x**k for k in range(degree + 1)] for x in nodes])
    c = list(mp.lu_solve(powers, mp.matrix([function(x) for x in nodes])))
    at = [low + (high - low) * k / 1000 for k in range(1001)]
    return c, max(abs(mp.polyval(c[::-1], x) / function(x) - 1) for x in at)


def exp_rest(r):
    """(exp(r) - 1 - r) / r^2, without the cancellation near 0."""
    return mp.hyp1f1(1, 3, r) / 2


def phi_rest(square):
    """(Phi(a) - 1/2) / a of a^2, without the cancellation near 0."""
    return mp.hyp1f1(mp.mpf(1) / 2, mp.mpf(3) / 2, -square / 2) / mp.sqrt(2 * mp.pi)


def tail(t):
    """a (1 - Phi(a)) exp(a^2 / 2) of t = (a - 2) / (a + 2)."""
    a = 2 * (1 + t) / (1 - t)
    return a * mp.erfc(a / mp.sqrt(2)) * mp.exp(a * a / 2) / 2


def show(name, digits, found):
    coefficients, error = found
    print(f"{name}: 2^{mp.nstr(mp.log(error, 2), 4)}")
    for c in coefficients:
        print(f"    {mp.nstr(c, digits)},")


HALF_LOG2, NEAR = mp.mpf("0.347"), mp.mpf("0.7")
FIRST = (NEAR - 2) / (NEAR + 2)
for name, digits, exp_degree, phi_degree, tail_degree, most in (
    ("SINGLE", 10, 5, 4, 10, 15),
    ("DOUBLE", 17, 10, 9, 25, 39),
):
    last = mp.mpf(most - 2) / (most + 2)
    show(f"EXP_{name}", digits, polynomial(exp_rest, -HALF_LOG2, HALF_LOG2, exp_degree))
    show(f"PHI_{name}", digits, polynomial(phi_rest, mp.mpf(0), NEAR**2, phi_degree))
    show(f"TAIL_{name}", digits, polynomial(tail, FIRST, last, tail_degree))
