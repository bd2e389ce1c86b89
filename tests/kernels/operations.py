"""The operations of each simd_<isa>.h: requests for run_operations.c, and the correct answers.

An instruction set's own part of the library is a few dozen functions on vectors. Kernels
show that they work together. Here each is tested alone: for every half, every rounding, and
every pair of numbers whose order matters, at both edges of accessible memory. The correct
answers are NumPy's, and ml_dtypes' for bfloat16.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product

import numpy as np
from cases import computed_in
from program import HERE, POISON, ROOT, WARNINGS, place, run
from tolerance import finfo

# The order of run_operations.c.
OPERATIONS = (
    *("load", "load_wide", "store", "stream", "set1", "widen", "pow2"),
    *("add", "sub", "mul", "div", "max", "min", "fmadd", "select_le", "select_first"),
    *("wide_set1", "wide_add", "wide_sub", "wide_fmadd", "wide_sum", "place"),
)
REQUEST = np.dtype([(name, "<i8") for name in ("operation", "n", "at_start", "groups")])
WIDE_LANES = 8  # of load_wide

# How a NaN is compared: in every bit; in every bit except the one that makes it quiet
# (conversions to a wider type may set it or not); or not at all (results of arithmetic).
EXACT, QUIETED, ANY = range(3)


@dataclass(frozen=True)
class Request:
    """Operands, one row per group, and the correct rows."""

    operation: str
    given: np.ndarray
    want: np.ndarray
    nan: int = ANY
    n: int = 0  # lanes in memory, or of the first operand
    at_start: bool = False

    def __str__(self):
        edge = "after" if self.at_start else "before"
        where = f", {self.n}, {edge} a page without access" if self.n else ""
        return f"{self.operation} of {self.given.dtype}{where}"

    def first(self, groups):
        return replace(self, given=self.given[:groups], want=self.want[:groups])

    def to_bytes(self):
        header = np.zeros((), REQUEST)
        header["operation"] = OPERATIONS.index(self.operation)
        header["n"], header["at_start"], header["groups"] = self.n, self.at_start, len(self.given)
        return header.tobytes() + self.given.tobytes()

    def check(self, file):
        got = np.frombuffer(file.read(self.want.nbytes), self.want.dtype).reshape(self.want.shape)
        right = as_integers(got) == as_integers(self.want)
        if self.nan == ANY:
            right |= np.isnan(got) & np.isnan(self.want)
        elif self.nan == QUIETED:
            right |= np.isnan(self.want) & (quieted(got) == quieted(self.want))
        wrong = np.argwhere(~right)
        assert len(wrong) == 0, (
            f"{self}: {len(wrong)} of {self.want.size} lanes, the first {wrong[0]}: "
            f"got {got[tuple(wrong[0])]!r}, expected {self.want[tuple(wrong[0])]!r}, "
            f"of {self.given[wrong[0][0]]}"
        )


def as_integers(a):
    return a.view(f"u{a.itemsize}")


def quieted(a):
    """The bits, with the first bit of the fraction set."""
    quiet = 1 << {4: 22, 8: 51}[a.itemsize]
    return as_integers(a) | np.asarray(quiet, f"u{a.itemsize}")


# --- Numbers ----------------------------------------------------------------------------------


def random_patterns(dtype, count, seed):
    """Numbers of all signs and exponents. NaN (signalling or not), infinities and denormals
    are among the halves, and are added to the wider ones.
    """
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 2 ** (8 * dtype.itemsize), count, f"u{dtype.itemsize}")
    return patterns.view(dtype)


def special_values(dtype):
    """NaN of either sign and of several payloads, both zeros, infinities, the smallest and largest
    numbers, the kinks of the activations and their neighbours.
    """
    info = finfo(dtype)
    sizes = [0, info.smallest_subnormal, info.smallest_normal, 0.01, 1, 6, info.max, np.inf, np.nan]
    sizes = np.array([*sizes, np.nextafter(dtype.type(6), dtype.type(7))], dtype)
    values = np.concatenate([sizes, -sizes])
    nan = as_integers(np.full(3, np.nan, dtype))
    quiet = np.array(1 << {4: 22, 8: 51}[dtype.itemsize], nan.dtype)
    payloads = nan + np.array([1, 77, 1], nan.dtype)
    payloads[2] ^= quiet  # a signalling one
    return np.concatenate([values, payloads.view(dtype)])


def in_memory(dtype):
    """Every half; of wider types the special values and some thousand at random."""
    if dtype.itemsize == 2:
        return np.arange(2**16, dtype=np.uint16).view(dtype)
    return np.concatenate([special_values(dtype), random_patterns(dtype, 4096, 1)])


def to_write(dtype):
    """Numbers that are rounded when they are written: the halves, the midpoints of two neighbours
    (also of the largest and the next power of two), and the nearest values above and below.
    """
    wide = computed_in(dtype)
    if wide == dtype:
        return in_memory(dtype)
    halves = np.arange(0x7C00 if dtype == np.float16 else 0x7F80, dtype=np.uint16).view(dtype)
    lower = halves.astype(float)
    upper = np.append(lower[1:], 2 * lower[-1] - lower[-2])
    middle = ((lower + upper) / 2).astype(wide)
    assert np.array_equal(middle, (lower + upper) / 2), "a float32 has the digits"
    beside = [np.nextafter(middle, wide.type(0)), np.nextafter(middle, wide.type(np.inf))]
    sizes = np.concatenate([lower.astype(wide), middle, *beside])
    more = [special_values(wide), random_patterns(wide, 2**16, 2)]
    return np.concatenate([sizes, -sizes, *more])


def converted(a, dtype):
    with np.errstate(all="ignore"):
        return a.astype(dtype)


def narrowed(a, dtype):
    """NumPy's and ml_dtypes' rounding; NaN made quiet, its sign and upper bits kept."""
    if a.dtype == dtype:
        return as_integers(a)
    bits, narrow = as_integers(a), as_integers(converted(a, dtype)).copy()
    sign, fraction = bits >> 16 & 0x8000, bits & 0x7FFFFF
    quiet = 0x7E00 | fraction >> 13 if dtype == np.float16 else 0x7FC0 | fraction >> 16
    narrow[np.isnan(a)] = (sign | quiet)[np.isnan(a)]
    return narrow


def grouped(values, n):
    """In rows of n; the last row is filled up with the first values."""
    return np.resize(values, (-(-len(values) // n), n))


def lanes_of(dtype):
    """Of the vector that this type is computed in."""
    return 8 if computed_in(dtype) == np.float64 else 16


# --- Requests ---------------------------------------------------------------------------------


def loads(dtype):
    wide, lanes = computed_in(dtype), lanes_of(dtype)
    nan = EXACT if wide == dtype else QUIETED
    for n, at_start in product(range(1, lanes + 1), (False, True)):
        given = grouped(in_memory(dtype), n)
        want = np.tile(np.arange(1, lanes + 1, dtype=wide), (len(given), 1))
        want[:, :n] = converted(given, wide)
        if wide == dtype:
            as_integers(want)[:, :n] = as_integers(given)
        yield Request("load", given, want, nan, n, at_start)
        if n <= WIDE_LANES:
            as_double = np.tile(np.arange(1.0, WIDE_LANES + 1), (len(given), 1))
            as_double[:, :n] = converted(converted(given, wide), float)
            yield Request("load_wide", given, as_double, QUIETED, n, at_start)


def stores(dtype):
    """Store every number as part of a whole vector, and of one of each kind of part. Streams
    are of whole vectors.
    """
    numbers, lanes = to_write(dtype), lanes_of(dtype)
    for n, at_start in product(range(1, lanes + 1), (False, True)):
        some = numbers if n == lanes else numbers[n - 1 :: lanes - 1]
        given = np.tile(grouped(some, n), (1, lanes))[:, :lanes].copy()
        want = np.full((len(given), lanes * dtype.itemsize), POISON, np.uint8)
        want = want.view(f"u{dtype.itemsize}")
        stored = slice(0, n) if at_start else slice(lanes - n, None)
        want[:, stored] = narrowed(given[:, :n].copy(), dtype)
        yield Request("store", given, want, EXACT, n, at_start)
        if n == lanes:
            yield Request("stream", given, want, EXACT, n, at_start)


def operands(dtype, count, lanes):
    """Special values, each with each, and random ones; one row per operand."""
    special = special_values(dtype)
    pairs = np.array(list(product(special, special)), dtype).T
    others = [np.resize(special[::step], pairs.shape[1]) for step in (1, -1)]
    special = np.stack([*pairs, *others])[:count]
    random = np.stack([random_patterns(dtype, 1024, seed) for seed in range(count)])
    return [grouped(row, lanes) for row in np.concatenate([special, random], axis=1)]


def fused(a, b, c):
    """a * b + c, rounded once."""
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a, b, c, strict=True)]
    return np.array([float(value) for value in exact]).astype(a.dtype)


def multiply_adds(name, dtype, lanes, has_fma):
    """Numbers between 1 and 4. For float32 the exact result fits a float64, so it is rounded
    once.
    """
    rng = np.random.default_rng(3)
    a, b, c = (rng.uniform(1, 4, 2048).astype(dtype) for _ in range(3))
    c *= rng.choice([-1, 1], len(c)).astype(dtype)
    want = fused(*(x.astype(float) for x in (a, b, c))) if has_fma else a * b + c
    if has_fma and dtype == np.float32:
        assert not np.array_equal(want.astype(dtype), a * b + c), "the two cannot be told apart"
    given = rows(*(grouped(x, lanes) for x in (a, b, c)))
    return Request(name, given, grouped(want.astype(dtype), lanes))


def rows(*operands):
    """A group of each operand after the other, as the program reads them."""
    return np.concatenate(operands, axis=1)


def tree_sum(a):
    """The two halves of the lanes are added, then the halves of the sums, and so on."""
    while (half := a.shape[1] // 2) > 0:
        a = a[:, :half] + a[:, half:]
    return a


def wide_arithmetic(lanes, has_fma):
    """On the float64 lanes in which sums are kept, as many as a vector has."""
    a, b = operands(np.dtype(float), 2, lanes)
    with np.errstate(all="ignore"):
        yield Request("wide_add", rows(a, b), a + b)
        yield Request("wide_sub", rows(a, b), a - b)
    yield multiply_adds("wide_fmadd", np.dtype(float), lanes, has_fma)
    some = np.random.default_rng(4).standard_normal((512, lanes))
    yield Request("wide_sum", some, tree_sum(some))
    yield Request("wide_set1", a[:, :1].copy(), np.tile(a[:, :1], lanes), QUIETED)


def arithmetic(dtype, has_fma):
    lanes = lanes_of(dtype)
    a, b, c, d = operands(dtype, 4, lanes)
    with np.errstate(all="ignore"):
        yield Request("add", rows(a, b), a + b)
        yield Request("sub", rows(a, b), a - b)
        yield Request("mul", rows(a, b), a * b)
        yield Request("div", rows(a, b), a / b)
    yield multiply_adds("fmadd", dtype, lanes, has_fma)
    # The second operand if they are equal (0 and -0) or either is NaN, in all its bits.
    for name, picks in (("max", a > b), ("min", a < b)):
        want = np.where(picks, as_integers(a), as_integers(b)).view(dtype)
        yield Request(name, rows(a, b), want, EXACT)
    want = np.where(a <= b, as_integers(c), as_integers(d)).view(dtype)
    yield Request("select_le", rows(a, b, c, d), want, EXACT)
    for n in range(lanes + 1):
        want = np.where(np.arange(lanes) < n, as_integers(a), as_integers(b)).view(dtype)
        yield Request("select_first", rows(a, b), want, EXACT, n)
    exponents = grouped(np.arange(finfo(dtype).minexp, finfo(dtype).maxexp), lanes)
    yield Request("pow2", exponents.astype(dtype), np.ldexp(dtype.type(1), exponents), EXACT)
    yield Request("widen", a, converted(a, float), QUIETED)
    numbers = np.random.default_rng(5).standard_normal((512, 1))
    yield Request("set1", numbers, np.tile(numbers.astype(dtype), lanes))
    yield from wide_arithmetic(lanes, has_fma)


def places():
    asked = [(k, places, n) for places in (8, 16, 32, 64) for n in (1, 5, 64, 193, 16384)
             for k in range(places)]  # fmt: skip
    want = [place(*each) for each in asked]
    return Request("place", np.array(asked), np.array(want)[:, None], EXACT)


def make_requests(dtype, has_fma):
    """All requests of one data type. Halves are computed in float32, whose arithmetic is tested
    here.
    """
    dtype = np.dtype(dtype)
    made = [*loads(dtype), *stores(dtype), places()]
    return made + (list(arithmetic(dtype, has_fma)) if computed_in(dtype) == dtype else [])


# --- The program ------------------------------------------------------------------------------

C_TYPES = {  # T, P, vec and wide of types.inc.h
    "float32": ("float", "float", "f32x16", "d16"),
    "float64": ("double", "double", "d8", "d8"),
    "float16": ("bnf_f16", "float", "f32x16", "d16"),
    "bfloat16": ("bnf_bf16", "float", "f32x16", "d16"),
}


def build(folder, isa, dtype, flags, compiler="cc", sources=ROOT / "src", warnings=WARNINGS):
    """Build run_operations for one instruction set and type."""
    types = zip(("T", "P", "vec", "wide"), C_TYPES[np.dtype(dtype).name], strict=True)
    names = (f'-DSIMD="simd_{isa}.h"', *(f"-D{name}={what}" for name, what in types))
    program = folder / f"run_operations_{isa}_{np.dtype(dtype)}"
    source = HERE / "run_operations.c"
    flags = [*flags, *warnings, "-std=gnu11", *names, f"-I{sources}"]
    run(compiler, *flags, source, "-o", program)
    return program


def check(requests, program, folder, launcher=()):
    """Run all requests and compare the answers."""
    with (folder / "requests").open("wb") as file:
        for request in requests:
            file.write(request.to_bytes())
    run(*launcher, program, folder / "requests", folder / "results")
    with (folder / "results").open("rb") as file:
        for request in requests:
            request.check(file)
        assert not file.read(1), "more than the requests ask for"
