"""The kernels without Python: cases for run_cases.c, and the correct answers.

The program is built from src/ with the flags of setup.py, for this processor or another one. So is
run_calls.c, which checks itself. A case is a header, then the inputs. Its answer is the output of
the kernels. Both are written one after the other, in the byte order and sizes of all
processors that have kernels.
"""

import os
import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from itertools import cycle, product
from pathlib import Path
from threading import Lock
from unittest.mock import MagicMock, patch

import numpy as np
import reference
from cases import DTYPES, Problem, bfloat16, computed_in, make_problem
from tolerance import (
    assert_within,
    backward_bounds,
    batch_statistics,
    constants,
    finfo,
    forward_bound,
    moments_of,
    off_the_kinks,
)
from wide import wide

from bnfast import _core

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WARNINGS = ("-Wall", "-Wextra", "-Werror")

# The orders of src/bnfast.h.
TYPES = _core.TYPE_NAMES
ACTIVATIONS = (None, *_core.ACTIVATIONS)  # by bnf_activation
NO_Z, FROM_X, FROM_X_RESIDUAL, FROM_Y = range(4)
POISON = 0xA5
DRIVER = "bnfast_driver"  # setup.py's library, beside those of the kernels

HEADER = np.dtype(
    [
        *((name, "<i8") for name in ("type", "itemsize", "layout", "activation", "z_source")),
        *((name, "<i8") for name in ("through", "residual", "stream", "ahead", "masked")),
        ("shape", "<i8", 3),
        ("tile", "<i8", 6),
        ("slope", "<f8"),
    ]
)


# --- Building and running ----------------------------------------------------------------


def setup(platform=None, **environ):
    """The names of setup.py, as for sysconfig's name of another platform; nothing is built."""
    commands = ("setuptools.command.build_clib", "setuptools.command.build_ext")
    others = ("setuptools", "setuptools.errors", "Cython", "Cython.Build")
    stand_ins = {name: MagicMock() for name in (*commands, *others)}
    environ |= {"_PYTHON_HOST_PLATFORM": platform} if platform else {}
    with patch.dict(sys.modules, stand_ins), patch.dict(os.environ, environ):
        return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def libraries(platform=None):
    """setup.py's libraries, (name, facts) each."""
    return setup(platform)["LIBRARIES"]


def run(*command, **options):
    """Return a program's output; raise AssertionError with its error output if it fails."""
    command = [str(part) for part in command]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False, **options
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stderr}"
    return done.stdout


def flags_of(isa, platform=None):
    """The compiler flags of an instruction set's kernels, for any type."""
    names = setup(platform)
    suffix = names["data_types"]()[0]
    flags = dict(names["LIBRARIES"])[f"bnfast_{isa}_{suffix}"]["cflags"]
    return [flag for flag in flags if flag != f"-DKERNELS_{suffix}"]


def emulation_flags(simde):
    """The flags of AVX-512's kernels if SIMDe, in a folder, replaces it: AVX2's own."""
    shim = ("-include", HERE / "avx512_emulated.h", f"-isystem{simde}")
    # The shim's loops over lanes must stay loops; vectors of 64 bytes never leave an object.
    return [*flags_of("avx2"), *shim, "-fno-tree-vectorize", "-Wno-psabi"]


def sources(platform=None):
    """The sources of a program apart from its own file: (path, flags) each, slowest first."""
    return [
        (ROOT / source, facts["cflags"])
        for _, facts in sorted(libraries(platform), key=lambda library: library[0] == DRIVER)
        for source in facts["sources"]
    ]


def emulated_sources(simde):
    """The same with AVX-512's table only, emulated."""
    source, flags = ROOT / "src/kernels_avx512.c", emulation_flags(simde)
    kernels = [(source, [*flags, f"-DKERNELS_{suffix}"]) for suffix in setup()["data_types"]()]
    driver = [job for job in sources() if not job[0].name.startswith(("kernels_", "dispatch"))]
    return [*kernels, *driver, (HERE / "dispatch_emulated.c", ["-std=c11"])]


@cache
def built():
    """The kernels' objects that `make build` made of these sources, by source and command."""
    names, found = setup(), {}
    for name, facts in libraries():
        for source in facts["sources"] if name != DRIVER else ():
            target = (ROOT / names["OBJECTS"] / name / source).with_suffix(".o")
            made_by = target.with_suffix(".command")
            if made_by.exists() and not names["is_outdated"](target, made_by.read_text("utf-8")):
                key = (ROOT / source, *facts["cflags"], "cc")
                found[key] = target
    return found


def compiled(job, folder, compiler="cc", more=()):
    """Return the object of (source, flags); `more` are additional flags, such as -g."""
    source, flags = job
    key = (source, *flags, compiler, *more)
    with _ONE_AT_A_TIME:  # setup.py is run with stand-ins for what it imports
        found = built()
    if key in found:
        return found[key]
    if key not in _OBJECTS:
        target = folder / f"{source.stem}-{flags[-1].rpartition('_')[2]}.o"
        include = f"-I{ROOT / 'src'}"
        run(compiler, "-c", "-fPIC", *flags, *WARNINGS, *more, include, source, "-o", target)
        _OBJECTS[key] = target
    return _OBJECTS[key]


# Objects already made in this test run, by source and command: kernels take the most time.
_OBJECTS = {}
_ONE_AT_A_TIME = Lock()


def build(folder, compiler="cc", platform=None, more=(), jobs=None, name="run_cases"):
    """Build a program of this folder for a platform, or from other sources."""
    jobs = [*(jobs or sources(platform)), (HERE / f"{name}.c", ["-std=gnu11", "-O2"])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compiled(job, folder, compiler, more), jobs))
    run(compiler, *more, *objects, "-fopenmp", "-lm", "-o", folder / name)
    return folder / name


SIMDE_VERSION = (0, 8, 2)  # the first that has what avx512_emulated.h needs


def find_simde():
    """Return (SIMDe's include folder, None) or (None, what to do about it).

    SIMDE_INCLUDE names the folder; otherwise it is PyPI's simde-py, or the system's.
    """
    named = os.environ.get("SIMDE_INCLUDE")
    package = find_spec("simde_py")
    packaged = [Path(package.origin).parent / "simde"] if package else []
    for folder in [Path(named)] if named else [*packaged, Path("/usr/include")]:
        header = folder / "simde" / "simde-common.h"
        if not header.exists():
            continue
        text = header.read_text("utf-8")
        found = re.findall(r"define SIMDE_VERSION_(?:MAJOR|MINOR|MICRO) (\d+)", text)
        if tuple(map(int, found)) >= SIMDE_VERSION:
            return folder, None
    wanted = ".".join(map(str, SIMDE_VERSION))
    return None, (
        f"AVX-512's emulation needs SIMDe {wanted} or later: pip install simde-py, "
        "or name a folder with simde/ in SIMDE_INCLUDE"
    )


# --- Cases -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A problem of shape (outer, channels, inner), and the loops of the kernels that it runs."""

    problem: Problem
    z_source: int
    through: bool
    stream: bool
    tile: tuple[slice, slice, slice]
    ahead: int = 0  # how far ahead sums fetch
    special: bool = False  # NaN and similar values: only compared between instruction sets
    hard: bool = False  # data that are hard to sum: only their moments are compared
    masked: bool = False  # with weights; then also special

    def __str__(self):
        p = self.problem
        return (
            f"{p.x.dtype} {p.x.shape} {self.tile} {p.activation} residual={p.residual is not None} "
            f"z_source={self.z_source} through={self.through} stream={self.stream} "
            f"ahead={self.ahead} masked={self.masked}"
        )

    def parameters(self):
        """The kernels' per-channel parameters, from the exact statistics, in the header's order."""
        p = self.problem
        x, weight, bias, eps, *_ = p.exact()
        s = moments_of(p.x, 1)
        inv_std = 1 / np.sqrt(s.var + eps)
        scale = weight * inv_std
        g = reference.backward(p.dy.astype(x.dtype), *p.exact())
        x_factor, constant = -scale * inv_std * g.gamma / p.m, -scale * g.beta / p.m
        made = [a.astype(float) for a in (s.mean, scale, bias, scale, x_factor, constant)]
        return with_special_parameters(*made) if self.special else made

    def weights(self):
        """A mask of positions (outer, inner): ranges, single values and weights of all sizes."""
        outer, _, inner = self.problem.x.shape
        kind, at = np.ogrid[:outer, :inner]
        kind = (kind + (at if inner == 1 else 0)) % 5
        place = at + np.arange(outer)[:, None] * (inner == 1)
        kinds = (place % 7 < 4, place < (inner + 1) // 2, place % 3 * 0.5, place * 0, 1 + place * 0)
        weights = np.choose(kind, [k.astype(float) for k in np.broadcast_arrays(*kinds)])
        return weights.astype(computed_in(self.problem.x.dtype))

    def y(self):
        """The exact output, rounded."""
        p = self.problem
        x, weight, bias, eps, axis, residual, activation = p.exact()
        return reference.forward(x, weight, bias, eps, axis, residual, activation).astype(p.x.dtype)

    def to_bytes(self):
        p = self.problem
        header = np.zeros((), HEADER)
        header["type"] = TYPES.index(p.x.dtype.name)
        header["itemsize"] = p.x.itemsize
        header["layout"] = p.x.shape[2] == 1
        header["activation"] = ACTIVATIONS.index(p.activation)
        header["z_source"] = self.z_source
        header["through"] = self.through
        header["residual"] = p.residual is not None
        header["stream"] = self.stream
        header["ahead"] = self.ahead
        header["masked"] = self.masked
        header["shape"] = p.x.shape
        header["tile"] = [
            bound for s, n in zip(self.tile, p.x.shape, strict=True) for bound in s.indices(n)[:2]
        ]
        header["slope"] = 0.01
        arrays = [p.x, p.dy]
        arrays += [p.residual] if p.residual is not None else []
        arrays += [self.y()] if self.z_source == FROM_Y else []
        if self.special:
            arrays = [with_special_values(a) for a in arrays]
        numbers = [*self.parameters(), *([self.weights()] if self.masked else [])]
        return b"".join(a.tobytes() for a in (header, *arrays, *numbers))

    def answer(self, file):
        """The program's output for this case."""
        p = self.problem
        masked = ("masked mean", "masked m2") if self.masked else ()
        rows = (*masked, "mean", "m2", "batch mean", "batch m2", "sum", "dot")
        names = (*rows[:-2], "y", "sum", "dot", "dx")
        names += ("dresidual",) if p.residual is not None else ()
        found = {}
        for name in names:
            a_row = name in rows
            dtype, shape = (np.dtype(float), (p.channels,)) if a_row else (p.x.dtype, p.x.shape)
            size = dtype.itemsize * int(np.prod(shape))
            found[name] = np.frombuffer(file.read(size), dtype).reshape(shape)
        return found


# Around the multiples of a vector, and of a tree of eight; vectors are of 8 or 16 values.
EDGES = [n + d for n in (48, 56, 64, 72, 80, 96, 112, 128, 144, 256) for d in (-1, 0, 1)]
SHAPES = {
    "planar": (
        *((2, 3, inner) for inner in (*range(2, 36), *EDGES, 1027)),
        # two images are summed at once if planes are small, one if it is the last
        *((outer, 2, inner) for outer in (1, 3, 4, 5) for inner in (3, 8, 16, 17, 32, 33, 64, 65)),
        *((3, channels, inner) for channels in (4, 7) for inner in (17, 25, 31, 33, 49, 50)),
        *((5, 1, 49), (1, 33, 9), (2, 64, 5)),
        *((2, 2, 2047), (2, 2, 2048), (40, 2, 103)),  # a pivot of more places
    ),
    "interleaved": (
        *((11, channels, 1) for channels in (*range(1, 42), 63, 64, 65, 127, 128, 129)),
        *((outer, c, 1) for outer in (*range(1, 10), 16, 33, 127) for c in (13, 37)),
        # several rows at once, some left over
        *((133, channels, 1) for channels in (2, 3, 5, 8, 16)),
        *((outer, 19, 1) for outer in (64, 65, 192, 193)),  # a pivot of more places
    ),
}
WHOLE = (slice(None),) * 3
# A tile and the shape of the whole.
PARTS = {
    "planar": (
        ((slice(1, 4), slice(1, 10), slice(3, 20)), (5, 11, 23)),
        ((slice(0, 3), slice(2, 7), slice(None)), (3, 9, 49)),
        ((slice(1, 3), slice(1, 6), slice(None)), (4, 7, 17)),
        ((slice(0, 2), slice(1, 3), slice(5, 135)), (2, 4, 150)),
        ((slice(1, 2), slice(0, 3), slice(7, 8)), (3, 5, 9)),
    ),
    "interleaved": (
        ((slice(3, 14), slice(5, 24), slice(None)), (19, 29, 1)),
        ((slice(1, 10), slice(7, 47), slice(None)), (11, 53, 1)),
        ((slice(0, 9), slice(1, 4), slice(None)), (9, 7, 1)),
        ((slice(2, 20), slice(16, 32), slice(None)), (21, 48, 1)),
        ((slice(5, 66), slice(None), slice(None)), (70, 6, 1)),
    ),
}


def loops():
    """Every loop that the kernels are compiled to, by the values that select it."""
    for activation, residual in product(ACTIVATIONS, (False, True)):
        recomputed = FROM_X_RESIDUAL if residual else FROM_X
        sources = (NO_Z,) if activation is None else (recomputed,)
        if activation is not None and _core.ACTIVATIONS[activation].from_output:
            sources += (FROM_Y,)
        yield from product((activation,), (residual,), sources, (False, True), (False, True))


def make_case(shape, dtype, activation, residual, z_source, through, stream, tile=WHOLE, seed=0):
    p = make_problem(shape, dtype, activation=activation, residual=residual, seed=seed)
    off_the_kinks(p, moments_of(p.x, 1))
    return Case(p, z_source, through, stream, tile)


def with_hard_values(x):
    """A copy, float32 or halves, with one kind of data per channel: a bad pivot, and squares that
    are denormal, or overflow, or are 0.
    """
    x, largest = x.copy(), float(finfo(x.dtype).max)
    for channel in range(x.shape[1]):
        part = x[:, channel].astype(float)
        outlier = np.zeros(part.shape)
        outlier.flat[channel * 7 % outlier.size] = 1
        kinds = (
            part,
            part * 0 + 0.3,
            part + 300,
            part * 1e-21 if largest > 1e20 else part / 1024,
            part * 1e-30 if largest > 1e20 else part / 4096,
            part * (largest / 32),
            outlier,
            3 + outlier / 8,
            np.where(np.arange(part.size).reshape(part.shape) % 16 < 15, 1, 5),
        )
        x[:, channel] = kinds[channel % len(kinds)].astype(x.dtype)
    return x


def place(k, places, n):
    """Of a pivot's values: one in each part of n, shifted by k times the golden ratio."""
    shift = Fraction(k * 40503, 2**16) % 1  # 40503: 2^16 times 0.618
    return int(n * (k + shift) / places)


def with_outliers_at_pivots(x):
    """A copy in which all values of a channel are equal except those that make its pivot: then
    all rounding errors have the same sign.
    """
    outer, channels, inner = x.shape
    base = 0.1 + 0.07 * np.arange(channels)[:, None]
    x = np.tile(base, (outer, 1, inner)).astype(x.dtype)
    places = 16 if inner > 1 else 64
    for k in range(places):
        i = place(k, places, inner if inner > 1 else outer)
        if inner > 1:
            x[0, :, min(i, inner - 16) :][:, :16] = base + 1
        else:
            x[i] = base + 1
    return x


def hard_cases(dtype):
    """Of several places of pivots, sizes of blocks, and tiles of a few channels."""
    shapes = ((3, 18, 49), (2, 9, 2500), (1, 9, 129), (7, 9, 16), (11, 18, 1), (70, 27, 1))
    hard = [(shape, with_hard_values) for shape in (*shapes, (300, 40, 1), (40, 9, 1))]
    hard += [(shape, with_outliers_at_pivots) for shape in ((1, 6, 30000), (16384, 20, 1))]
    for seed, (shape, made_hard) in enumerate(hard):
        case = make_case(shape, dtype, None, False, NO_Z, True, False, seed=seed)
        problem = case.problem.replace(x=made_hard(case.problem.x))
        yield replace(case, problem=problem, hard=True, ahead=seed % 2 * 96)


def with_special_values(a):
    """A copy whose channels hold NaN, an infinity, denormals and so on, one kind per channel."""
    tiny, huge = finfo(a.dtype).smallest_subnormal, float(finfo(a.dtype).max) / 4
    values = (-0.0, 0.0, np.nan, tiny, np.inf, huge, -tiny, -huge, -np.inf)
    a = a.copy()
    for channel, value in zip(range(a.shape[1]), cycle(values), strict=False):
        a[::2, channel, ::3] = value
    return a


def with_special_parameters(mean, scale, shift, *others):
    """The same numbers per channel, except those that make -0 from its -0 and 0: nothing is
    subtracted or added, and 0 is multiplied by a negative number.
    """
    minus_zero, zero = slice(0, None, 9), slice(1, None, 9)
    for channels, sign in ((minus_zero, 1.0), (zero, -1.0)):
        mean[channels], shift[channels] = 0.0, -0.0
        scale[channels] = np.copysign(scale[channels], sign)
    return [mean, scale, shift, *others]


def make_cases():
    """Every loop on a few sizes and on part of an array, every size with a loop or two."""
    made = []
    every = (*DTYPES, np.float16, *([bfloat16] if bfloat16 else []))
    for dtype, layout in product(every, SHAPES):
        shapes, all_loops = cycle(SHAPES[layout]), list(loops())
        parts, ahead = cycle(PARTS[layout]), cycle((0, 160, 0))
        for loop in all_loops:
            of_loop = [make_case(next(shapes), dtype, *loop) for _ in range(3)]
            tile, whole_of_tile = next(parts)
            of_loop.append(make_case(whole_of_tile, dtype, *loop, tile=tile))
            of_loop.append(replace(make_case(whole_of_tile, dtype, *loop, seed=1), special=True))
            made += [replace(case, ahead=next(ahead)) for case in of_loop]
        masks = cycle((*SHAPES[layout][::3], *(shape for _, shape in PARTS[layout])))
        for loop, special in product(all_loops[::3], (False, True)):
            case = replace(make_case(next(masks), dtype, *loop, seed=3), masked=True)
            made.append(replace(case, special=True) if special else replace(case, hard=True))
        tile, whole_of_tile = PARTS[layout][0]
        masked = make_case(whole_of_tile, dtype, *all_loops[0], tile=tile, seed=3)
        made.append(replace(masked, masked=True, hard=True))
        for shape, loop in zip(SHAPES[layout], cycle(all_loops[5::7]), strict=False):
            made.append(replace(make_case(shape, dtype, *loop, seed=2), ahead=next(ahead)))
    for dtype in (dtype for dtype in every if computed_in(dtype) == np.float32):
        made += hard_cases(dtype)
    return made


def write(cases, path):
    with path.open("wb") as file:
        for case in cases:
            file.write(case.to_bytes())


def read(cases, path):
    with path.open("rb") as file:
        found = [case.answer(file) for case in cases]
        assert not file.read(1), "more than the cases ask for"
    return found


# --- Checking ------------------------------------------------------------------------------


def comparable(a):
    """The bytes of an array, with every NaN the same. IEEE 754 leaves a NaN's sign and payload to
    the processor, and x86 and Arm choose differently.
    """
    return np.where(np.isnan(a), np.asarray(np.nan, a.dtype), a).tobytes()


def differences(cases, some, others):
    """Outputs whose bits differ between two answers."""
    return [
        f"{case}: {name}"
        for case, one, other in zip(cases, some, others, strict=True)
        for name in one
        if comparable(one[name]) != comparable(other[name])
    ]


def check_untouched(case, name, got, tile):
    """No byte outside of the tile was written."""
    outside = np.ones(got.shape, bool)
    outside[tile] = False
    left = np.frombuffer(got[outside].tobytes(), np.uint8)
    assert (left == POISON).all(), f"{case}: {name} was written outside of its tile"


def check_moments(case, got):
    """Both kernels that sum a tile's moments, each within its own limits."""
    p, tile = case.problem, case.tile
    x = p.x[tile]
    m = x.size // x.shape[1]
    for kind, limits in (("", moments_of), ("batch ", batch_statistics)):
        of_part, what = limits(x, p.axis), f"{case}: {kind}"
        got_mean, got_m2 = (got[kind + name][tile[1]] for name in ("mean", "m2"))
        assert_within(got_mean, of_part.mean, of_part.mean_error, f"{what}mean")
        assert_within(got_m2, m * of_part.var, m * of_part.var_error, f"{what}m2")


def check_masked_moments(case, got):
    """Sums in float64 around one of the values: n products, sixteen lanes, and the mean's own."""
    x = wide(case.problem.x[case.tile])
    w = np.broadcast_to(case.weights()[case.tile[0], None, case.tile[2]], x.shape)
    count = w[:, 0].sum()
    if count == 0:
        return
    mean = (w * x).sum((0, 2)) / count
    m2 = (w * (x - mean[:, None]) ** 2).sum((0, 2))
    spread = np.ptp(x, (0, 2))
    roundings = (w[:, 0].size / 8 + 8) * np.finfo(float).eps
    limit = roundings * spread + np.spacing(np.abs(mean).astype(float))
    assert_within(got["masked mean"][case.tile[1]], mean, limit, f"{case}: masked mean")
    limit = roundings * count * spread**2
    assert_within(got["masked m2"][case.tile[1]], m2, limit, f"{case}: masked m2")


def check(case, got):
    """Compare with the paper in float64 and wider, within the limits of tolerance.py."""
    p, tile, what = case.problem, case.tile, str(case)
    for name, array in got.items():
        check_untouched(case, name, array, tile if array.ndim == 3 else tile[1])
    if case.special:
        return
    check_moments(case, got)
    if case.masked:
        check_masked_moments(case, got)
    if case.hard:
        return
    x, weight, bias, eps, axis, residual, activation = p.exact()
    s = moments_of(p.x, axis)

    part = p.replace(
        x=p.x[tile],
        dy=p.dy[tile],
        weight=p.weight[tile[1]],
        bias=p.bias[tile[1]],
        residual=None if p.residual is None else p.residual[tile],
    )
    want = reference.inference(x, s.mean, s.var, weight, bias, eps, axis, residual, activation)
    assert_within(got["y"][tile], want[tile], forward_bound(p, s)[tile], f"{what}: y")

    # The kernel's mean is the exact one rounded to float64.
    given = constants(s.mean[tile[1]], s.var[tile[1]])
    given.mean_error[...] = np.spacing(np.abs(given.mean).astype(float))
    dy = part.dy.astype(x.dtype)
    sums = reference.inference_backward(
        dy, part.exact()[0], given.mean, given.var, *part.exact()[1:]
    )
    bounds = backward_bounds(part, given, sums, through_statistics=False)
    inv_std = 1 / np.sqrt(given.var + eps)
    assert_within(got["sum"][tile[1]], sums.beta, bounds.beta, f"{what}: sum")
    assert_within(got["dot"][tile[1]], sums.gamma / inv_std, bounds.gamma / inv_std, f"{what}: dot")

    dy = p.dy.astype(x.dtype)
    if case.through:
        exact = reference.backward(dy, *p.exact())
    else:
        exact = reference.inference_backward(dy, x, s.mean, s.var, *p.exact()[1:])
    bounds = backward_bounds(p, s, exact, through_statistics=case.through)
    assert_within(got["dx"][tile], exact.x[tile], bounds.x[tile], f"{what}: dx")
    if residual is not None:
        want = exact.residual[tile]
        assert_within(got["dresidual"][tile], want, bounds.residual[tile], f"{what}: dresidual")
