"""Results that are written around the caches have the same bits as others.

Results larger than the last cache are written in this way. Here the caches are declared to be
small, so that many shapes and every alignment of a result are tested in little time.
"""

import numpy as np
import pytest
from cases import ACTIVATIONS, EVERY_DTYPE, backward, bits, forward, make_problem

import bnfast
from bnfast import _core

SMALL = {"l2": 1024, "l3": 0}
# Runs that are multiples of 16 bytes, and longer ones that are not.
SHAPES = {
    "planar": (5, 3, 8, 16),
    "planar, long runs": (3, 2, 4099),
    "planar, one channel": (7, 1, 1000),
    "interleaved": (99, 48),
    "interleaved, long runs": (9, 4099),
}


@pytest.fixture
def streams():
    """A function that makes a call with small caches, where results are streamed."""
    caches = _core.config()["caches"]

    def call(function, *args, **options):
        _core.set_caches(**SMALL)
        try:
            return function(*args, **options)
        finally:
            _core.set_caches(caches["l2"], caches["l3"])

    return call


def surrounded(a, offset):
    """(an array of `a`'s shape at this offset from a multiple of 64, a check of the bytes around
    it).
    """
    store = np.full(a.nbytes + 256, 0xA5, np.uint8)
    start = -store.ctypes.data % 64 + 64 + offset
    inside = store[start : start + a.nbytes].view(a.dtype).reshape(a.shape)

    def untouched():
        return bool((store[:start] == 0xA5).all() and (store[start + a.nbytes :] == 0xA5).all())

    return inside, untouched


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
class TestStreamed:
    def test_these_shapes_are_streamed(self, dtype, shape):
        """Only with the caches that `streams` declares, not with real ones."""
        outer, channels, inner = shape[0], shape[1], int(np.prod(shape[2:]))
        if channels == 1:
            outer, inner = 1, outer * inner
        size = np.dtype(dtype).itemsize
        for gathers, reads in ((False, 1), (True, 1), (True, 2)):
            for threads in (1, 4):
                asked = ((outer, channels, inner), size, gathers, reads, 1)
                assert _core.plan(*asked, *SMALL.values(), threads)["stream"]
                assert not _core.plan(*asked, 2**19, 2**23, threads)["stream"]

    @pytest.mark.parametrize("activation", ACTIVATIONS[:3], ids=str)
    def test_forward_and_backward(self, isa, dtype, shape, activation, streams):
        p = make_problem(shape, dtype, activation=activation, residual=activation is not None)
        y, stats = forward(p)
        got, same = streams(forward, p)
        assert bits(got) == bits(y)
        assert all(bits(a) == bits(b) for a, b in zip(stats, same, strict=True))
        want = backward(p, stats)
        got = streams(backward, p, stats)
        for name, a, b in zip(want._fields, got, want, strict=True):
            assert a is b is None or bits(a) == bits(b), name

    def test_fresh_and_in_place(self, isa, dtype, shape, streams):
        p = make_problem(shape, dtype)
        want = bnfast.scale_shift(p.x, p.weight, p.bias)
        assert bits(streams(bnfast.scale_shift, p.x, p.weight, p.bias)) == bits(want)
        assert streams(bnfast.scale_shift, p.x, p.weight, p.bias, out=p.x) is p.x
        assert bits(p.x) == bits(want)

    def test_writes_only_its_own_bytes(self, isa, dtype, shape, streams):
        """From every alignment that an element can have; the bytes on either side stay."""
        p = make_problem(shape, dtype)
        stats = bnfast.moments(p.x)
        want = bnfast.scale_shift(p.x, p.weight, p.bias)
        population = bnfast.BatchStats.from_population(stats.mean, stats.var())
        gradient = backward(p, population).x
        for offset in range(0, 64, p.x.itemsize):
            out, untouched = surrounded(p.x, offset)
            streams(bnfast.scale_shift, p.x, p.weight, p.bias, out=out)
            assert bits(out) == bits(want), offset
            assert untouched()
            out, untouched = surrounded(p.x, offset)
            streams(backward, p, population, out=out)
            assert bits(out) == bits(gradient), offset
            assert untouched()

    def test_misaligned_inputs(self, isa, dtype, shape, streams):
        p = make_problem(shape, dtype)
        want = bnfast.scale_shift(p.x, p.weight, p.bias, residual=p.dy)
        for offset in range(p.x.itemsize, 32, p.x.itemsize):
            x, _ = surrounded(p.x, offset)
            residual, _ = surrounded(p.x, 32 - offset)
            x[...], residual[...] = p.x, p.dy
            got = streams(bnfast.scale_shift, x, p.weight, p.bias, residual=residual)
            assert bits(got) == bits(want), offset


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_past_the_last_cache_of_this_machine(dtype, isa):
    """With the machine's real caches: the results are larger than the largest one."""
    caches = _core.config()["caches"]
    last = max(caches["l2"] * bnfast.get_num_threads(), caches["l3"])
    if last > 2**27:
        pytest.skip("a last cache of more than 128 MiB")
    channels, inner = 4, 4096
    outer = last // (channels * inner * np.dtype(dtype).itemsize) + 1
    x = np.tile(make_problem((2, channels, inner), dtype).x, (-(-outer // 2), 1, 1))
    got = bnfast.scale_shift(x, np.full(channels, 2, np.float32), None)
    want = bnfast.scale_shift(x[:2].copy(), np.full(channels, 2, np.float32), None)
    assert bits(got[:2]) == bits(want)
    assert (got.reshape(-1, 2, channels, inner).view(np.uint8) == want.view(np.uint8)).all()
