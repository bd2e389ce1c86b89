"""The variance that a training call normalises with, on data that are hard to sum.

Promised, for float32 data and halves of any values in any order: the variance of a forward within
1e-6 of the exact one, whatever its sums are made in, and that of `moments()` within 1e-7. The data
here are the ones that sums in float32, or around a guessed pivot, would lose digits on.
"""

from functools import cache

import numpy as np
import pytest
from cases import HALVES, bits
from hypothesis import settings
from wide import wide

import bnfast

OF_A_FORWARD = 1e-6  # relative error of a variance, as promised
OF_MOMENTS = 1e-7
SIGNS = (1, -1)


# --- From a (channels, values) array to a batch ------------------------------------


def as_rows(data):
    return np.ascontiguousarray(data.T)


def as_planes(inner=None):
    """Images whose planes have `inner` values, or one image."""

    def arrange(data):
        channels, m = data.shape
        planes = data.reshape(channels, -1, inner or m)
        return np.ascontiguousarray(planes.transpose(1, 0, 2))

    return arrange


BOTH_LAYOUTS = pytest.mark.parametrize(
    "arrange", [as_planes(), as_rows], ids=["planar", "interleaved"]
)


# --- Exact, and how far from it ----------------------------------------------------


def exact(data, of=wide):
    """Mean and variance of each row of finite values, by two passes and a correction."""
    d = of(data)
    mean = d.mean(axis=1)
    d = d - mean[:, None]
    left = d.mean(axis=1)
    d = d - left[:, None]
    return mean + left, (d**2).mean(axis=1)


def relative_error(got, want):
    """0 where both are 0; NaN, which no limit admits, where `got` is."""
    apart = np.abs(got - want)
    return np.where(apart == 0, 0, apart / np.where(want == 0, np.finfo(np.float64).tiny, want))


def assert_variances(arrange, data, want, names=None):
    """Of a forward and of moments(). The mean may be off by as much of a deviation as the variance
    of itself, and by float64's roundings.
    """
    mean, var = want
    x = arrange(data)
    _, stats = bnfast.batch_norm_forward(x)
    moments = bnfast.moments(x)
    for what, got_mean, got_var, limit in (
        ("forward", stats.mean, stats.var, OF_A_FORWARD),
        ("moments", moments.mean, moments.var(), OF_MOMENTS),
    ):
        error = relative_error(got_var, var)
        bad = np.flatnonzero(~(error <= limit))
        labels = [(names[i] if names else int(i), float(error[i])) for i in bad[:5]]
        assert not bad.size, f"variance of {what}, {x.shape} {x.dtype}: {labels}"
        room = limit * np.sqrt(var) + 2.0**-48 * np.abs(mean)
        assert (np.abs(got_mean - mean) <= room).all(), f"mean of {what}, {x.shape} {x.dtype}"


# --- Named kinds of data -----------------------------------------------------------

# Whole images of 49 and of 784 values, and more than three blocks of 2^14 values.
M = 1024 * 49
FIRST = M // 32  # as many values as the first of 32 images has


def starting_with(first, others):
    return np.r_[first, others[np.size(first) :]]


def make_kinds():
    rng = np.random.default_rng(11)
    normal, uniform = rng.standard_normal(M), rng.random(M)
    pixels = rng.integers(0, 256, M) / 255
    outlier_of_every_block = np.where(np.arange(M) % 16384 == 0, 1e4, normal)
    outlier_of_every_run = np.where(np.arange(M) % 784 == 0, 1e4, normal)
    kinds = {
        "normal": normal,
        "uniform": uniform,
        "pixels": pixels,
        "normalised pixels": (pixels - 0.485) / 0.229,
        "ReLU": np.maximum(normal, 0),
        "95% zeros": np.maximum(normal - 1.64, 0),
        "99.9% zeros": np.maximum(normal - 3.09, 0),
        "zero or one": uniform < 0.5,
        "0.1 or 0.7": np.where(uniform < 0.5, 0.1, 0.7),
        "3.3 in 1%": np.where(uniform < 0.01, 3.3, 0.1),
        "3.3 once": starting_with(3.3, np.full(M, 0.1)),
        "pi or -pi": np.where(uniform < 0.5, -np.pi, np.pi),
        "one ulp apart": np.where(uniform < 0.3, np.nextafter(np.float32(1), np.float32(2)), 1),
        "outlier first": starting_with(1e5, normal),
        "outlier last": starting_with(1e5, normal)[::-1],
        "outlier first in every block": outlier_of_every_block,
        "outlier first in every image": outlier_of_every_run,
        "image of zeros, then 1000": starting_with(np.zeros(FIRST), 1000 + normal),
        "zeros to mid-block, then 1000": starting_with(np.zeros(FIRST - 777), 1000 + normal),
        "64 zeros, then 1000": starting_with(np.zeros(64), 1000 + normal),
        "half zeros, then 1000": starting_with(np.zeros(M // 2), 1000 + normal),
        "sorted": np.sort(normal),
        "sorted uniform": np.sort(uniform),
        "ramp": np.linspace(0, 1, M),
        "heavy tails": rng.standard_t(1.5, M),
        "Cauchy": rng.standard_cauchy(M),
        "lognormal": np.exp(2 * normal),
        "mixed magnitudes": normal * 10.0 ** rng.integers(-4, 4, M),
        "1e-20": 1e-20 * normal,
        "1e30": 1e30 * normal,
        "constant": np.full(M, 0.1),
        "zeros": np.zeros(M),
    }
    for period in (2, 8, 16, 128):
        kinds[f"period {period}"] = np.resize(rng.standard_normal(period), M)
        kinds[f"period {period} of 1 in {period}"] = np.resize(np.eye(1, period) * 3.3 + 0.1, M)
    for ratio in (1e3, 1e4, 1e5, 1e6, 1e7):
        for sign in SIGNS:
            kinds[f"mean {sign * ratio:g} deviations"] = sign * (ratio + normal)
    return {name: np.asarray(values, np.float32) for name, values in kinds.items()}


@pytest.fixture(scope="module")
def kinds():
    """The names, a row of values each, and their exact statistics: by data type."""
    made = make_kinds()
    found = {}

    def of(dtype):
        if dtype not in found:
            with np.errstate(over="ignore"):
                rows = {name: values.astype(dtype) for name, values in made.items()}
            kept = {name: row for name, row in rows.items() if np.isfinite(row).all()}
            data = np.stack(list(kept.values()))
            found[dtype] = list(kept), data, exact(data)
        return found[dtype]

    return of


@pytest.mark.parametrize("dtype", [np.float32, *HALVES])
@pytest.mark.parametrize(
    "arrange",
    [as_planes(), as_planes(784), as_planes(49), as_rows],
    ids=["one image", "images of 784", "images of 49", "rows"],
)
def test_kinds_of_data(isa, arrange, dtype, kinds):
    names, data, want = kinds(dtype)
    assert_variances(arrange, data, want, names)


# --- Sizes -------------------------------------------------------------------------

# Around vectors of 8 and 16, groups of 8 of them, and where blocks end.
EDGES = (49, 98, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384, 32768)
LENGTHS = (*range(2, 41), *(edge + i for edge in EDGES for i in (-1, 0, 1)), 16400, 40_001)
# (images, values of a plane), around the images of a block of 2^14 values.
IMAGES = (
    *((images, 49) for images in (2, 3, 333, 334, 335, 669)),
    *((images, 196) for images in (2, 83, 84, 167)),
    *((images, 17) for images in (2, 963, 964)),
    (3, 5461),
    (3, 5462),
    (2, 16_385),
)


@cache
def hard_channels(channels, m):
    """Whose first values say little about the others: a row each. And their exact statistics."""
    normal = np.random.default_rng([channels, m]).standard_normal((channels, m))
    for i, row in enumerate(normal):
        kind = i % 7
        if kind == 0:
            row += 100
        elif kind == 1:
            row[0] = 1e5
        elif kind == 2:
            row[:] = np.maximum(row - 1.64, 0)
        elif kind == 3:
            row[:] = np.where(row < 0.5, 0.1, 0.7)
        elif kind == 4:
            row[:] = np.exp(2 * row)
        elif kind == 5:
            row += 1e6
        else:
            row[: m // 3] = 0
            row[m // 3 :] += 1000
    data = normal.astype(np.float32)
    return data, exact(data)


class TestSizes:
    def test_planes(self, isa):
        for length in LENGTHS:
            assert_variances(as_planes(), *hard_channels(7, length))

    def test_images(self, isa):
        for images, inner in IMAGES:
            assert_variances(as_planes(inner), *hard_channels(7, images * inner))

    @pytest.mark.parametrize("channels", [1, 3, 7, 16, 33])
    def test_rows(self, isa, channels):
        for length in LENGTHS:
            if channels * length <= 2**18:
                assert_variances(as_rows, *hard_channels(channels, length))


# --- The ends of float32's range ---------------------------------------------------

LARGEST = float(np.finfo(np.float32).max)


@BOTH_LAYOUTS
def test_every_magnitude(isa, arrange, rng):
    """Squares of float32 underflow from 1e-19 down, and overflow from 1e19 on."""
    normal, signs = rng.standard_normal(2000), rng.choice([-1.0, 1.0], 2000)
    outlier = np.zeros(2000)
    outlier[777] = 1
    shapes = (normal, signs, outlier, signs * 0.3 + 5, np.exp(2 * normal))
    magnitudes = 10.0 ** np.arange(-45, 39)
    rows = [np.clip(shape * size, -LARGEST, LARGEST) for size in magnitudes for shape in shapes]
    data = np.asarray(rows, np.float32)
    names = [f"{size:g}, shape {i}" for size in magnitudes for i in range(len(shapes))]
    assert_variances(arrange, data, exact(data), names)


@pytest.mark.parametrize("unusual", [np.nan, np.inf, -np.inf, LARGEST, 1e15])
@pytest.mark.parametrize("channels", [3, 20])
@BOTH_LAYOUTS
def test_of_other_channels_has_the_same_bits(isa, arrange, channels, unusual, rng):
    """Also where a channel must be summed again because of its values."""
    m, hit = 1200, channels // 2
    data = rng.standard_normal((channels, m)).astype(np.float32)
    _, clean = bnfast.batch_norm_forward(arrange(data))
    for place in (0, 1, 15, 16, 127, 128, m // 2, m - 1):
        dirty = data.copy()
        dirty[hit, place] = unusual
        _, stats = bnfast.batch_norm_forward(arrange(dirty))
        for was, now in ((clean.mean, stats.mean), (clean.var, stats.var)):
            assert bits(np.delete(now, hit)) == bits(np.delete(was, hit)), place
        if np.isfinite(unusual):
            want = exact(dirty[hit : hit + 1])[1]
            assert relative_error(stats.var[hit], want[0]) <= OF_A_FORWARD
        else:
            assert np.isnan(stats.var[hit])
            assert not np.isfinite(stats.mean[hit])


# --- Data made against the sums ----------------------------------------------------


def spread_places(n, count):
    """Places to guess a mean from, one in each of `count` parts and never in step with a period:
    part k's is (k times the golden ratio) modulo 1 of the way through it.
    """
    k = np.arange(count)
    return n * ((k << 16) + (k * 40503 & 65535)) // (count << 16)


@pytest.mark.parametrize("parts", [4, 8, 16, 32, 64])
@BOTH_LAYOUTS
def test_a_guess_that_is_wrong(isa, arrange, parts, rng):
    """One value at all places that a mean might be guessed from, and another elsewhere. Around
    such a guess a float32 sum of squares is far larger than their sum around the mean. Rows of
    few channels make long blocks, of which the guess is a smaller part.
    """
    run = 16 if arrange is not as_rows else 1  # a vector of a plane, or a row
    for n in (64, 200, 512, 1000, 16384):
        places = np.minimum(spread_places(n, parts), n - run)
        guessed = np.unique(places[:, None] + np.arange(run))
        two = rng.standard_normal((2, 64)) * 10.0 ** rng.integers(-1, 2, (2, 64))
        here, there = two.astype(np.float32)
        data = np.repeat(there[:, None], n, axis=1)
        data[:, guessed] = here[:, None]
        share, apart = wide(guessed.size) / n, wide(here) - there
        mean, var = there + share * apart, share * (1 - share) * apart**2
        width = 2 if run == 1 and n > 1000 else 64
        for c in range(0, 64, width):
            those = slice(c, c + width)
            assert_variances(arrange, data[those], (mean[those], var[those]))


class Pattern:
    """Two or three values in an arrangement; `changed` is another one near it."""

    PERIODS = (2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 64, 127, 128, 129)

    def __init__(self, rng):
        self.numbers = rng.standard_normal(3) * 10.0 ** rng.integers(-1, 2, 3)
        self.kind = int(rng.integers(0, 5))
        self.change_places(rng)

    def change_places(self, rng):
        self.period = int(rng.choice(self.PERIODS))
        self.cut = int(rng.integers(1, self.period))
        self.share = rng.random()
        self.seed = int(rng.integers(0, 1000))

    def changed(self, rng):
        other = object.__new__(Pattern)
        other.__dict__.update(self.__dict__)
        if rng.random() < 0.7:
            other.numbers = self.numbers.copy()
            other.numbers[rng.integers(0, 3)] *= 1 + rng.standard_normal() * 10.0 ** rng.uniform(
                -7, -0.5
            )
        else:
            other.change_places(rng)
        return other

    def values(self, n):
        a, b, c = self.numbers
        i = np.arange(n)
        if self.kind == 0:
            return np.where(i % self.period < self.cut, a, b)
        if self.kind == 1:
            return np.where(i // 16 % self.period < self.cut, a, b)
        if self.kind == 2:
            vector = i // 16 % 8
            return np.where(vector < self.cut % 9, a, np.where(vector < self.period % 9, b, c))
        if self.kind == 3:
            return np.where(i < self.share * n, a, b)
        return np.random.default_rng(self.seed).choice([a, b, c], n, p=[0.5, 0.3, 0.2])


@BOTH_LAYOUTS
def test_search(isa, arrange):
    """Hill climbing: each channel follows a pattern, and keeps the changes that raise its error.
    The default takes a second, HYPOTHESIS_PROFILE=long minutes.
    """
    rng = np.random.default_rng(7)
    n, climbers = 1045, 48
    patterns = [Pattern(rng) for _ in range(climbers)]
    errors, stalled = np.zeros(climbers), np.zeros(climbers, int)
    for _ in range(settings.default.max_examples):
        tried = [
            p.changed(rng) if s < 20 else Pattern(rng)
            for p, s in zip(patterns, stalled, strict=True)
        ]
        data = np.stack([p.values(n) for p in tried]).astype(np.float32)
        want = exact(data, np.float64)
        assert_variances(arrange, data, want, [vars(p) for p in tried])
        now = relative_error(bnfast.batch_norm_forward(arrange(data))[1].var, want[1])
        better = (now > errors) | (stalled >= 20)
        patterns = [new if b else old for new, old, b in zip(tried, patterns, better, strict=True)]
        errors, stalled = np.where(better, now, errors), np.where(better, 0, stalled + 1)
