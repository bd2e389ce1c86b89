"""Counters show which kernel ran, and peak memory shows what was not copied.

A library that silently falls back to other kernels passes every test of equality.
"""

from functools import partial

import cases
import numpy as np
import pytest
from cases import (
    ACTIVATIONS,
    CONTIGUOUS_ORDERS,
    EVERY_DTYPE,
    HALVES,
    backward,
    make_problem,
    peak,
    with_gaps,
)

import bnfast
from bnfast import _config, _core

LAYOUTS = {"planar": (6, 5, 4), "interleaved": (24, 5)}


def variant(p):
    name = p.activation[0] if isinstance(p.activation, tuple) else p.activation
    if p.residual is None:
        return name or "plain"
    return f"{name}+residual" if name else "residual"


def running(p):
    return p.bias.copy(), p.weight**2


def normalized(p, **more):
    return bnfast.batch_norm(p.x, *running(p), p.weight, p.bias, **p.options, **more)


def trained_layer(p):
    layer = bnfast.BatchNorm(p.channels, axis=p.axis, activation=p.activation, dtype=p.weight.dtype)
    layer(p.x, residual=p.residual)
    return layer


# Calls as a user writes them, and the direction that each should count as. Each takes a
# problem, prepares, and returns the call that counts.
CALLS = {
    "moments": ("moments", lambda p: partial(bnfast.moments, p.x, axis=p.axis)),
    "Moments.update": (
        "moments",
        lambda p: partial(bnfast.Moments.empty(p.channels).update, p.x, axis=p.axis),
    ),
    "batch_norm_forward": (
        "forward",
        lambda p: partial(bnfast.batch_norm_forward, p.x, p.weight, p.bias, **p.options),
    ),
    "batch_norm(training)": (
        "forward",
        lambda p: partial(normalized, p, training=True),
    ),
    "layer": (
        "forward",
        lambda p: partial(trained_layer(p), p.x, residual=p.residual),
    ),
    "batch_norm_backward": ("backward", lambda p: partial(backward, p, cases.forward(p)[1])),
    "layer.backward": ("backward", lambda p: partial(trained_layer(p).backward, p.dy)),
    "batch_norm": ("inference", lambda p: partial(normalized, p)),
    "normalize": (
        "inference",
        lambda p: partial(bnfast.normalize, p.x, *running(p), p.weight, p.bias, **p.options),
    ),
    "scale_shift": (
        "inference",
        lambda p: partial(bnfast.scale_shift, p.x, p.weight, p.bias, **p.options),
    ),
    "layer.eval": (
        "inference",
        lambda p: partial(trained_layer(p).eval(), p.x, residual=p.residual),
    ),
    "frozen": (
        "inference",
        lambda p: partial(trained_layer(p).freeze(), p.x, residual=p.residual),
    ),
}


def test_instruction_sets_of_this_machine():
    assert _core.isa() in _core.isas()
    assert len(set(_core.isas())) == len(_core.isas()) >= 1
    with pytest.raises(ValueError, match="pdp11"):
        _core.set_isa("pdp11")


X86 = ("scalar", "sse2", "avx2", "avx512")  # as a build for x86-64 lists them


@pytest.mark.parametrize(
    ("isa", "pinned", "runnable", "why"),
    [
        ("avx512", None, X86, "the best that this processor can run"),
        ("avx2", None, X86[:3], "the best that this processor can run"),
        ("sse2", None, X86[:2], "the best that this processor can run"),
        ("neon", None, ("scalar", "neon"), "the best that this processor can run"),
        ("neon", "", ("scalar", "neon"), "the best that this processor can run"),
        ("scalar", None, ("scalar",), "plain C: no others were built for this processor"),
        ("avx512", "avx512", X86, "pinned by BNFAST_ISA"),
        ("sse2", "sse2", X86, "pinned by BNFAST_ISA"),
        ("scalar", "scalar", X86, "pinned by BNFAST_ISA"),
        ("scalar", "scalar", ("scalar",), "pinned by BNFAST_ISA"),
        ("sse2", None, X86, "set by a test"),
        ("scalar", "avx2", X86, "set by a test"),
    ],
)
def test_why_a_set_is_in_use(isa, pinned, runnable, why, monkeypatch):
    monkeypatch.delenv("BNFAST_ISA", raising=False)
    if pinned is not None:
        monkeypatch.setenv("BNFAST_ISA", pinned)
    assert _config._why(isa, runnable) == why


class TestShowConfig:
    """It must report the kernels that run, not the best ones."""

    def kernels(self, capsys):
        bnfast.show_config()
        shown = {line[:16].strip(): line[16:] for line in capsys.readouterr().out.splitlines()}
        assert shown["built"] == ", ".join(_core.config()["isas_built"])
        assert shown["runnable here"] == ", ".join(_core.isas())
        return shown["kernels"]

    def test_of_each_set(self, isa, monkeypatch, capsys, dispatches):
        monkeypatch.delenv("BNFAST_ISA", raising=False)
        best = "plain C: no others were built for this processor"
        if len(_core.isas()) > 1:
            best = "the best that this processor can run"
        why = best if isa == _core.isas()[-1] else "set by a test"
        assert self.kernels(capsys) == f"{isa} ({why})"
        bnfast.moments(np.ones((3, 2)))
        assert [key[3] for key in dispatches()] == [isa]

    def test_pinned_instruction_set(self, isa, monkeypatch, capsys):
        monkeypatch.setenv("BNFAST_ISA", isa)
        assert self.kernels(capsys) == f"{isa} (pinned by BNFAST_ISA)"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_every_call_counts_once(isa, dtype, layout, call, dispatches):
    direction, prepare = CALLS[call]
    counted = prepare(make_problem(LAYOUTS[layout], dtype))
    dispatches()
    counted()
    assert dispatches() == {(direction, np.dtype(dtype).name, layout, isa, "plain"): 1}
    counted()
    counted()
    assert dispatches() == {(direction, np.dtype(dtype).name, layout, isa, "plain"): 2}


@pytest.mark.parametrize("call", [c for c in CALLS if "oments" not in c])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_variant_has_its_kernel(activation, residual, call, dispatches):
    direction, prepare = CALLS[call]
    p = make_problem(LAYOUTS["planar"], activation=activation, residual=residual)
    counted = prepare(p)
    dispatches()
    counted()
    assert dispatches() == {(direction, "float32", "planar", _core.isa(), variant(p)): 1}


@pytest.mark.parametrize("order", CONTIGUOUS_ORDERS)
@pytest.mark.parametrize("call", CALLS)
def test_memory_order_picks_the_layout(order, call, dispatches):
    arrange, layout = CONTIGUOUS_ORDERS[order]
    direction, prepare = CALLS[call]
    counted = prepare(make_problem((4, 5, 3, 7), arrange=arrange))
    dispatches()
    counted()
    assert dispatches() == {(direction, "float32", layout, _core.isa(), "plain"): 1}


@pytest.mark.parametrize(
    ("shape", "axis", "layout"),
    [
        ((6, 5), 1, "interleaved"),
        ((6, 5), 0, "planar"),
        ((6, 5), -1, "interleaved"),
        ((6, 5, 1, 1), 1, "interleaved"),
        ((6, 5, 1, 2), 1, "planar"),
        ((2, 3, 4, 5), -1, "interleaved"),
        ((2, 3, 4, 5), 0, "planar"),
        ((1, 5, 4), 1, "planar"),
        ((6, 1), 1, "planar"),
        ((6, 1, 4), 1, "planar"),
    ],
)
def test_shape_and_axis_pick_the_layout(shape, axis, layout, dispatches):
    bnfast.moments(make_problem(shape, axis=axis).x, axis=axis)
    assert list(dispatches()) == [("moments", "float32", layout, _core.isa(), "plain")]


def test_counters_start_and_end_at_zero():
    _core.reset_dispatches()
    assert _core.dispatches() == {}
    bnfast.moments(np.ones((2, 3)))
    counts = _core.dispatches()
    assert list(counts.values()) == [1]
    counts.clear()
    assert _core.dispatches() != {}, "a copy is handed out"


BIG = (16, 32, 32, 32)  # 2 MB of float32
# Sums of a channel, a few blocks of them, and Python's own objects.
LITTLE = 256 * 1024


class TestNoCopies:
    @pytest.mark.parametrize("dtype", [np.float32, *HALVES])
    @pytest.mark.parametrize("order", CONTIGUOUS_ORDERS)
    def test_contiguous_orders_are_not_copied(self, order, dtype):
        arrange, _ = CONTIGUOUS_ORDERS[order]
        p = make_problem(BIG, dtype, arrange=arrange, activation="relu", residual=True)
        y, dx = np.empty_like(p.x), np.empty_like(p.x)
        _, stats = bnfast.batch_norm_forward(p.x, p.weight, p.bias, out=y, **p.options)
        mean, var = running(p)
        for call in (
            lambda: bnfast.moments(p.x),
            lambda: bnfast.batch_norm_forward(p.x, p.weight, p.bias, out=y, **p.options),
            lambda: bnfast.normalize(p.x, mean, var, p.weight, p.bias, out=y, **p.options),
            lambda: bnfast.scale_shift(p.x, p.weight, p.bias, out=y, **p.options),
            lambda: bnfast.batch_norm_backward(
                p.dy,
                p.x,
                stats,
                p.weight,
                p.bias,
                y=y,
                out=dx,
                needs=("x", "weight", "bias"),
                **p.options,
            ),
        ):
            assert peak(call) < LITTLE

    def test_fresh_result_takes_one_array(self):
        p = make_problem(BIG)
        grown = peak(lambda: bnfast.scale_shift(p.x, p.weight, p.bias))
        assert grown < p.x.nbytes + LITTLE

    def test_unneeded_gradients_take_no_array(self):
        p = make_problem(BIG, residual=True)
        _, stats = bnfast.batch_norm_forward(p.x)
        assert (
            peak(lambda: bnfast.batch_norm_backward(p.dy, p.x, stats, needs=("bias",), **p.options))
            < LITTLE
        )

    def test_measurement_detects_a_copy(self):
        x = make_problem(BIG, arrange=with_gaps).x
        assert peak(lambda: np.ascontiguousarray(x)) >= x.nbytes


class TestSlicesAreNotCopied:
    """A slice of the batch is contiguous, and so is a reshape."""

    def test_slices_of_the_batch(self, dispatches):
        x = make_problem(BIG).x
        assert peak(lambda: bnfast.moments(x[3:15])) < LITTLE
        assert peak(lambda: bnfast.moments(x[::1, :, :, :].reshape(16, 32, 1024))) < LITTLE
        assert sum(dispatches().values()) == 2
