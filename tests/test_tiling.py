"""Shape, caches and threads -> tiles: a pure function, tested for machines unlike this one."""

from itertools import pairwise

import numpy as np
import pytest

from bnfast import _core

KIB, MIB = 2**10, 2**20
MACHINES = {
    "a laptop": {"l2": 256 * KIB, "l3": 8 * MIB, "threads": 4},
    "this class of machine": {"l2": MIB, "l3": 32 * MIB, "threads": 2},
    "64 cores": {"l2": MIB, "l3": 256 * MIB, "threads": 64},
    "no shared cache": {"l2": MIB, "l3": 0, "threads": 64},
    "one thread, small caches": {"l2": 128 * KIB, "l3": 0, "threads": 1},
}
SHAPES = [
    (32, 64, 112 * 112),
    (32, 2048, 49),
    (3, 67, 35),
    (1, 1, 1_000_003),
    (2, 3, 40_001),
    (1, 16, 16),
    (100_003, 3, 1),
    (4096, 256, 1),
    (128, 5000, 1),
    (10_000_000, 2, 1),  # more rows than 512 blocks may have
]
MOST_SUMMED = {"planar": 64, "interleaved": 512}
MOST_WRITTEN = 2048


def plan(shape, machine, reads=2, writes=1, itemsize=4, gathers=True):
    return _core.plan(shape, itemsize, gathers, reads, writes, **MACHINES[machine])


def is_partition(tiles, shape):
    """Every value is in exactly one tile: the volumes add up, and no two tiles share a corner.

    Along each axis the ranges that occur must themselves be disjoint and cover it, since all
    tilings here are products of cuts.
    """
    volume = sum((o1 - o0) * (c1 - c0) * (i1 - i0) for o0, o1, c0, c1, i0, i1 in tiles)
    cuts = [sorted({tile[axis : axis + 2] for tile in tiles}) for axis in (0, 2, 4)]
    covered = all(
        ranges[0][0] == 0
        and ranges[-1][1] == size
        and all(a[1] == b[0] for a, b in pairwise(ranges))
        for ranges, size in zip(cuts, shape, strict=True)
    )
    return covered and len(set(tiles)) == len(tiles) and volume == np.prod(shape)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("reads", "writes"), [(1, 0), (1, 1), (2, 1), (3, 2)])
class TestTiles:
    def test_cover_every_value_once(self, shape, machine, reads, writes):
        found = plan(shape, machine, reads, writes)
        assert is_partition(found["sums"], shape)
        assert is_partition(found["writes"], shape)

    def test_fit_the_kernels(self, shape, machine, reads, writes):
        found = plan(shape, machine, reads, writes)
        most = MOST_SUMMED[found["layout"]]
        assert max(c1 - c0 for _, _, c0, c1, _, _ in found["sums"]) <= most
        assert max(c1 - c0 for _, _, c0, c1, _, _ in found["writes"]) <= MOST_WRITTEN


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_follow_from_the_shape_alone(shape):
    """What is summed together, and so the bits of a result, is the same on every machine."""
    cuts = set()
    for machine in MACHINES:
        for itemsize in (4, 8):
            tiles = plan(shape, machine, itemsize=itemsize)["sums"]
            cuts.add(frozenset((o0, o1, i0, i1) for o0, o1, _, _, i0, i1 in tiles))
    assert len(cuts) == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_length_within_proven_limit(shape):
    for o0, o1, _, _, i0, i1 in plan(shape, "64 cores")["sums"]:
        assert (o1 - o0) * (i1 - i0) <= 16384 + 16


@pytest.mark.parametrize("machine", MACHINES)
def test_large_work_uses_all_threads(machine):
    threads = MACHINES[machine]["threads"]
    for shape in [(64, 64, 12544), (1, 4, 2**24), (2**20, 64, 1), (256, 1, 65536)]:
        found = plan(shape, machine)
        assert found["threads"] == threads
        assert len(found["sums"]) >= threads
        assert len(found["writes"]) >= threads


def test_small_work_stays_on_one_thread():
    assert plan((1, 16, 16), "64 cores")["threads"] == 1


def test_streams_past_half_of_the_last_cache_only():
    assert not plan((32, 64, 784), "this class of machine", 1, 1)["stream"]
    assert plan((32, 256, 3136), "this class of machine", 1, 1)["stream"]


def is_fused(shape, machine, **options):
    return plan(shape, machine, **options)["fused"]


def test_large_arrays_are_computed_in_groups():
    assert is_fused((32, 256, 3136), "this class of machine")
    assert is_fused((32, 2048, 49), "no shared cache")
    assert is_fused((8, 64, 196), "this class of machine")


def test_no_groups_if_array_fits_last_cache():
    assert not is_fused((32, 512, 49), "this class of machine")
    assert not is_fused((32, 32, 784), "this class of machine", reads=1)


def test_a_larger_last_cache_counts_as_one_of_32_mib():
    """It is that of many cores."""
    for shape in SHAPES:
        large, usual = (_core.plan(shape, 4, True, 1, 1, MIB, size * MIB, 2) for size in (480, 32))
        assert large == usual


def test_channels_shared_among_threads_if_few_blocks():
    found = plan((4096, 256, 1), "64 cores")
    assert len(found["sums"]) == 64 == 8 * len(plan((4096, 256, 1), "a laptop")["sums"])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("channels", range(2, 17))
def test_all_of_few_channels_in_one_sum(machine, channels):
    """Otherwise the number of rows taken at once, and so the bits, would depend on the machine."""
    for rows in (1, 5, 1000, 100_003, 5_000_011):
        assert {tile[2:4] for tile in plan((rows, channels, 1), machine)["sums"]} == {(0, channels)}


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("channels", range(2, 17))
def test_streamed_rows_start_at_aligned_addresses(channels, itemsize):
    found = plan((20_000_003, channels, 1), "this class of machine", itemsize=itemsize)
    assert found["stream"]
    assert all(tile[0] * channels * itemsize % 16 == 0 for tile in found["writes"])


def test_no_streaming_if_results_fit_thread_caches():
    assert not plan((1, 64, 3136), "no shared cache", 1, 1)["stream"]
    assert plan((32, 256, 3136), "no shared cache", 1, 1)["stream"]
