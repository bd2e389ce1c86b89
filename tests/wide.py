"""`wide(x)`: x in a type wider than float64, which judges float64 results.

Where NumPy's longdouble is wider, it is that (x86-64 and AArch64 Linux). On Windows and on Apple's
processors longdouble is float64. There, and everywhere with BNFAST_WIDE=double-double, it is a
`Wide` array: each number is the sum of two float64, of which the second is at most half a unit in
the last place of the first, about 100 bits. UNIT is the relative error of one operation, and
UNIT_OF_FUNCTIONS that of exp, expm1, tanh and cosh; tests/test_wide.py holds both. The range is
float64's: below LEAST the second part loses digits, and above 2**996 a product has none.

T. J. Dekker, "A floating-point technique for extending the available precision", Numerische
Mathematik 18 (1971), has the splitting of a product. M. Joldes, J.-M. Muller and V. Popescu, "Tight
and rigorous error bounds for basic building blocks of double-word arithmetic", ACM TOMS 44 (2017),
have the operations and their errors: at most 15 * 2**-106, that of the division.
"""

import math
import os

import numpy as np

NARROW = np.finfo(np.longdouble).eps > 2.0**-60
DOUBLE_DOUBLE = NARROW or os.environ.get("BNFAST_WIDE") == "double-double"
if DOUBLE_DOUBLE:
    UNIT, UNIT_OF_FUNCTIONS, LEAST = 2.0**-102, 2.0**-94, 2.0**-968
else:
    UNIT = UNIT_OF_FUNCTIONS = float(np.finfo(np.longdouble).eps) / 2
    LEAST = 0.0


def wide(x):
    if isinstance(x, Wide):
        return x
    return as_wide(x) if DOUBLE_DOUBLE else np.asarray(x).astype(np.longdouble)[()]


def is_wide(x):
    return isinstance(x, Wide) or (not NARROW and getattr(x, "dtype", None) == np.longdouble)


# ---- Of two float64: the exact sum or product is the sum of what is returned


def two_sum(a, b):
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def fast_two_sum(a, b):
    """If |a| >= |b|."""
    total = a + b
    return total, b - (total - a)


def split(a):
    """Two parts of 26 bits each."""
    scaled = 134217729.0 * a  # 2**27 + 1
    high = scaled - (scaled - a)
    return high, a - high


def two_product(a, b):
    product = a * b
    (a1, a2), (b1, b2) = split(a), split(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


# ---- Arithmetic of double-doubles


def finite(low):
    """Infinities, NaN and products of huge numbers have no second part."""
    good = np.isfinite(low)
    return low if good.all() else np.where(good, low, 0)


def paired(high, low):
    high, low = fast_two_sum(high, finite(low))
    return Wide(high, finite(low))


def add(a, b):
    high, low = two_sum(a.high, b.high)
    of_low, rest = two_sum(a.low, b.low)
    high, low = fast_two_sum(high, finite(low + of_low))
    return paired(high, low + rest)


def negative(a):
    return Wide(-a.high, -a.low)


def subtract(a, b):
    return add(a, negative(b))


def multiply(a, b):
    high, low = two_product(a.high, b.high)
    return paired(high, low + (a.high * b.low + a.low * b.high))


def divide(a, b):
    quotient = a.high / b.high
    rest = subtract(a, multiply(b, Wide(quotient)))
    return paired(quotient, rest.high / b.high)


def sqrt(a):
    root = np.sqrt(a.high)
    rest = subtract(a, multiply(Wide(root), Wide(root)))
    return paired(root, rest.high / (2 * root))


def square(a):
    return multiply(a, a)


def power(a, n):
    """Of whole n, by squares."""
    n = int(n)
    if n < 0:
        return divide(as_wide(1), power(a, -n))
    result, factor = ones_like(a), a
    while n:
        result = multiply(result, factor) if n & 1 else result
        factor, n = multiply(factor, factor), n >> 1
    return result


# ---- Order


def equal(a, b):
    return (a.high == b.high) & (a.low == b.low)


def less(a, b):
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def greater(a, b):
    return less(b, a)


def less_equal(a, b):
    return less(a, b) | equal(a, b)


def greater_equal(a, b):
    return less_equal(b, a)


def not_equal(a, b):
    return ~equal(a, b)


def where(condition, a, b):
    a, b = as_wide(a), as_wide(b)
    return Wide(np.where(condition, a.high, b.high), np.where(condition, a.low, b.low))


def maximum(a, b):
    return where(greater_equal(a, b) | np.isnan(a.high), a, b)


def minimum(a, b):
    return where(less_equal(a, b) | np.isnan(a.high), a, b)


def absolute(a):
    return where(np.signbit(a.high), negative(a), a)


def clip(a, low, high):
    return minimum(maximum(as_wide(a), as_wide(low)), as_wide(high))


# ---- Functions


def exp_parts(a):
    """k and exp(a - k log 2) - 1, where k is whole.

    By a Taylor series of a 512th, and (1 + t)^2 - 1 = t (2 + t), nine times.
    """
    a = clip(a, -2000, 2000)  # of which exp is 0, or infinite
    k = np.nan_to_num(np.rint(a.high / LOG2.high)).astype(int)
    t = scaled(add(a, multiply(Wide(-k), LOG2)), -9)
    total = ones_like(t)
    for n in range(9, 1, -1):
        total = add(as_wide(1), divide(multiply(t, total), as_wide(n)))
    t = multiply(t, total)
    for _ in range(9):
        t = multiply(t, add(as_wide(2), t))
    return k, t


def scaled(a, k):
    """a 2^k"""
    return Wide(np.ldexp(a.high, k), np.ldexp(a.low, k))


def exp(a):
    k, t = exp_parts(a)
    t = add(as_wide(1), t)
    return paired(np.ldexp(t.high, k), np.ldexp(t.low, k))


def expm1(a):
    k, t = exp_parts(a)
    return where(k == 0, t, subtract(exp(a), as_wide(1)))


def tanh(a):
    """Of |a| = -t / (2 + t), where t = exp(-2 |a|) - 1; a itself where that is as exact."""
    size = absolute(a)
    t = expm1(scaled(negative(size), 1))
    result = divide(negative(t), add(as_wide(2), t))
    result = where(np.signbit(a.high), negative(result), result)
    return where(size.high < 2.0**-60, a, result)


def cosh(a):
    return scaled(add(exp(a), exp(negative(a))), -1)


# ---- Sums and the like


def reduced(operation, a, axis=None, keepdims=False):
    """Reduce axes by an operation on the halves of what they hold."""
    axes = range(a.ndim) if axis is None else [one % a.ndim for one in np.atleast_1d(axis)]
    kept = [one for one in range(a.ndim) if one not in axes]
    if any(a.shape[one] == 0 for one in axes):
        return Wide(np.sum(a.high, axis=axis, keepdims=keepdims))
    a = a.transpose(*axes, *kept).reshape(-1, *(a.shape[one] for one in kept))
    while len(a) > 1:
        half = len(a) // 2
        left = a[2 * half :]
        a = operation(a[:half], a[half : 2 * half])
        if len(left):
            a[:1] = operation(a[:1], left)
    return np.expand_dims(a[0], tuple(axes)) if keepdims else a[0]


def total(a, axis=None, keepdims=False):
    return reduced(add, a, axis, keepdims)


def largest(a, axis=None, keepdims=False):
    return reduced(maximum, a, axis, keepdims)


def smallest(a, axis=None, keepdims=False):
    return reduced(minimum, a, axis, keepdims)


def mean(a, axis=None, keepdims=False):
    sums = total(a, axis, keepdims)
    return sums / (a.size // max(1, sums.size))


def variance(a, axis=None, ddof=0, keepdims=False):
    sums = total((a - mean(a, axis, keepdims=True)) ** 2, axis, keepdims)
    return sums / (a.size // max(1, sums.size) - ddof)


def largest_number(a):
    return largest(where(np.isnan(a.high), Wide(-np.inf), a))


def peak_to_peak(a, axis=None):
    return largest(a, axis) - smallest(a, axis)


def index_of_largest(a):
    return int(np.flatnonzero(equal(a.ravel(), largest(a)))[0])


def ones_like(a, **_):
    return Wide(np.ones_like(a.high))


def zeros_like(a, **_):
    return Wide(np.zeros_like(a.high))


def nan_to_num(a):
    return where(np.isnan(a.high), Wide(0.0), a)


# ---- The array


class Wide(np.lib.mixins.NDArrayOperatorsMixin):
    """An array of numbers `high + low`. NumPy's functions and operators work on it."""

    def __init__(self, high, low=0.0):
        self.high, self.low = np.asarray(high, np.float64), np.asarray(low, np.float64)
        if self.low.shape != self.high.shape:
            self.low = np.broadcast_to(self.low, self.high.shape)

    shape = property(lambda self: self.high.shape)
    ndim = property(lambda self: self.high.ndim)
    size = property(lambda self: self.high.size)
    T = property(np.transpose)
    flat = property(np.ravel)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        if method != "__call__" or options:
            return NotImplemented
        if out:  # of a += b
            out[0][...] = ufunc(*inputs)
            return out[0]
        with np.errstate(all="ignore"):
            if ufunc in OF_WIDE:
                return OF_WIDE[ufunc](*map(as_wide, inputs))
            if ufunc in OF_ONE:
                return OF_ONE[ufunc](*inputs)
            return ufunc(inputs[0].high) if ufunc in OF_FIRST_PART else NotImplemented

    def __array_function__(self, function, types, arguments, options):
        if function in ON_EACH_PART:
            return Wide(*(function(*part_of(arguments, i), **options) for i in range(2)))
        if function not in FUNCTIONS:
            return NotImplemented
        with np.errstate(all="ignore"):
            return FUNCTIONS[function](*arguments, **options)

    def __array__(self, *_, **__):
        raise TypeError("a Wide array is not rounded unasked: .astype(float)")

    def __getitem__(self, key):
        return Wide(self.high[key], self.low[key])

    def __setitem__(self, key, value):
        value = as_wide(value)
        if not self.low.flags.writeable:
            self.low = self.low.copy()
        self.high[key], self.low[key] = value.high, value.low

    def __len__(self):
        return len(self.high)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __float__(self):
        return float(self.high)

    def __bool__(self):
        return bool(self.high)

    def __repr__(self):
        return f"Wide({self.high!r}, {self.low!r})"

    def astype(self, dtype):
        """Rounded once: of two parts, odd last digits stand for the second one."""
        dtype = np.dtype(dtype)
        if dtype == np.float64:
            return self.high.copy()
        return rounded_to_odd(self.high, self.low).astype(dtype)

    def copy(self):
        return Wide(self.high.copy(), self.low.copy())

    def ravel(self):
        return np.ravel(self)

    def reshape(self, *shape):
        return Wide(self.high.reshape(*shape), self.low.reshape(*shape))

    def transpose(self, *axes):
        return Wide(self.high.transpose(*axes), self.low.transpose(*axes))

    sum, mean, var, max, min = total, mean, variance, largest, smallest


def as_wide(x):
    """Of whole numbers, too, which may have more than 53 bits."""
    if isinstance(x, Wide):
        return x
    x = np.asarray(x)
    high = x.astype(np.float64)
    exact_in_float64 = x.dtype.kind not in "iu" and x.dtype.itemsize <= 8
    return Wide(high) if exact_in_float64 else Wide(high, rest_of(x, high))


def rest_of(x, high):
    if x.dtype.kind in "iu":
        rest = x.astype(object) - np.vectorize(int, [object])(high) if x.size else high
        return np.asarray(rest, np.float64)
    return np.where(np.isfinite(high), x - high, 0)


def rounded_to_odd(high, low):
    """Towards zero, and then to an odd last digit, unless low is 0."""
    outwards = (low != 0) & (np.signbit(low) != np.signbit(high))
    high = np.where(outwards, np.nextafter(high, 0), high)
    digits = high.view(np.int64) | ((low != 0) & np.isfinite(high))
    return digits.view(np.float64)


def part_of(arguments, i):
    """Arguments with one part of each array."""
    if isinstance(arguments, Wide):
        return (arguments.high, arguments.low)[i]
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(part_of(a, i) for a in arguments)
    if isinstance(arguments, np.ndarray) and i == 1:
        return np.zeros_like(arguments)
    return arguments


LOG2 = Wide(math.log(2), 2.3190468138462996e-17)
# The second part is pi less its float64: sin(pi - t) is t.
PI = (math.pi, math.sin(math.pi))

OF_WIDE = {
    np.add: add,
    np.subtract: subtract,
    np.multiply: multiply,
    np.true_divide: divide,
    np.negative: negative,
    np.sqrt: sqrt,
    np.square: square,
    np.absolute: absolute,
    np.maximum: maximum,
    np.minimum: minimum,
    np.equal: equal,
    np.not_equal: not_equal,
    np.less: less,
    np.less_equal: less_equal,
    np.greater: greater,
    np.greater_equal: greater_equal,
    np.exp: exp,
    np.expm1: expm1,
    np.tanh: tanh,
    np.cosh: cosh,
}
OF_ONE = {np.power: power, np.ldexp: scaled}
OF_FIRST_PART = {np.isnan, np.isinf, np.isfinite, np.signbit, np.sign}
FUNCTIONS = {
    np.sum: total,
    np.mean: mean,
    np.var: variance,
    np.max: largest,
    np.min: smallest,
    np.nanmax: largest_number,
    np.ptp: peak_to_peak,
    np.argmax: index_of_largest,
    np.where: where,
    np.clip: clip,
    np.ones_like: ones_like,
    np.zeros_like: zeros_like,
    np.nan_to_num: nan_to_num,
    np.isneginf: lambda a: np.isneginf(a.high),
    np.shape: lambda a: a.shape,
}
ON_EACH_PART = {
    *(np.broadcast_to, np.concatenate, np.expand_dims, np.moveaxis, np.ravel, np.repeat),
    *(np.reshape, np.stack, np.transpose),
}
