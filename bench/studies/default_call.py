"""What a new output array costs: the default call's time over that of the call with out=, by size.

    python -m bench.studies.default_call [--repeats 41]

Medians of calls in turn, at steady state, for two kinds of callers. One drops a result before the
next call; it is compared with a call that has one array as out=. The other replaces a result by
the next one; it is compared with two arrays as out= in turn, since two results take twice the
cache. The target of both ratios is 1.15 (bench/report/targets.py).
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import numpy as np

import bnfast

SIZES = [2**k * 10_000 for k in range(13)] + [100_000_000, 200_000_000, 400_000_000]
CHANNELS, PLANE = 16, 25
SECONDS_PER_SAMPLE = 2e-4


def problem(nbytes):
    """Return functions of `out` by name, and x, which has about `nbytes`."""
    shape = (nbytes // (4 * CHANNELS * PLANE), CHANNELS, PLANE)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    mean, var = np.zeros(CHANNELS, np.float32), np.ones(CHANNELS, np.float32)
    frozen = bnfast.BatchNorm(CHANNELS).freeze()
    _, stats = bnfast.batch_norm_forward(x)
    calls = {
        "inference": lambda out: frozen(x, out=out),
        "forward": lambda out: bnfast.batch_norm(x, mean, var, training=True, out=out),
        "backward": lambda out: bnfast.batch_norm_backward(x, x, stats, out=out),
    }
    return calls, x


def dropping(call, out, times):
    for _ in range(times):
        call(out)


def replacing(call, outs, times):
    result = None
    for out in itertools.islice(outs, times):
        result = call(out)
    return result


def seconds(loop, *args):
    start = time.perf_counter()
    kept = loop(*args)
    return time.perf_counter() - start, kept


def measure(call, x, repeats):
    """Return the median seconds of a call in each way."""
    one, other = np.empty_like(x), np.empty_like(x)
    ways = {
        "dropped": (dropping, None),
        "out": (dropping, one),
        "replaced": (replacing, itertools.repeat(None)),
        "two outs": (replacing, itertools.cycle([one, other])),
    }
    once, _ = seconds(dropping, call, one, 3)
    times = max(2, min(300, int(3 * SECONDS_PER_SAMPLE / once)))
    samples = {way: [] for way in ways}
    for _ in range(repeats):
        for way, (loop, out) in ways.items():
            loop(call, out, 1)
            spent, _ = seconds(loop, call, out, times)
            samples[way].append(spent / times)
    return {way: statistics.median(taken) for way, taken in samples.items()}


def huge_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text(encoding="ascii").strip() if setting.exists() else "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=41)
    repeats = parser.parse_args().repeats
    print(f"threads {bnfast.get_num_threads()}, huge pages {huge_pages()}")
    print(f"{'bytes':>12} {'call':10} {'out= us':>12} {'dropped':>8} {'replaced':>9}")
    for nbytes in SIZES:
        calls, x = problem(nbytes)
        for name, call in calls.items():
            took = measure(call, x, repeats)
            dropped, replaced = took["dropped"] / took["out"], took["replaced"] / took["two outs"]
            given = 1e6 * took["out"]
            print(
                f"{x.nbytes:12,} {name:10} {given:12.1f} {dropped:8.2f} {replaced:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
