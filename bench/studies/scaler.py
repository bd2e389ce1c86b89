"""How long StandardScaler takes to fit, transform and do both, beside scikit-learn's.

    python -m bench.studies.scaler [--rounds 15] [--tables 2] [--quick]

scikit-learn's and ours, on one thread and on two, are timed in turn. A ratio is the median of
scikit-learn's time over ours in the same round. Some columns of the last table hold missing values.
scikit-learn-intelex (2026.2) has no StandardScaler of its own.
"""

import argparse
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
from sklearn import preprocessing

import bnfast
from bench.harness.machine import describe
from bench.harness.timing import Contestant, Progress, measure
from bnfast.sklearn import StandardScaler

STEPS = ("fit", "transform", "fit_transform")
THREADS = (1, 2)


class Table(NamedTuple):
    rows: int
    features: int
    dtype: type
    order: str = "C"
    missing: int = 0  # columns with NaN in every tenth row

    def __str__(self):
        text = f"({self.rows:,}, {self.features}) {np.dtype(self.dtype).name}"
        text += ", Fortran order" if self.order == "F" else ""
        return text + (f", NaN in {self.missing} columns" if self.missing else "")

    def values(self):
        rng = np.random.default_rng(0)
        x = np.empty((self.rows, self.features), self.dtype, self.order)
        for part in np.array_split(x, 100):
            part[...] = 3 * rng.standard_normal(part.shape, self.dtype) + 10
        x[::10, : self.missing] = np.nan
        return x


TABLES = (
    Table(1_000_000, 100, np.float32),
    Table(100_000, 20, np.float64),
    Table(1_000_000, 100, np.float32, "F"),
    Table(1_000_000, 100, np.float32, missing=10),
)


def contestants(step, x):
    kinds = {"scikit-learn": (preprocessing.StandardScaler, 1)}
    kinds |= {f"bnfast, {n} thread{'s' * (n > 1)}": (StandardScaler, n) for n in THREADS}
    return [Contestant(name, [call(kind, n, step, x)]) for name, (kind, n) in kinds.items()]


def call(kind, threads, step, x):
    scaler = kind().fit(x)
    method = getattr(scaler, step)

    def run():
        with bnfast.num_threads(threads):
            return method(x)

    return run


def rows_of(table, rounds, progress):
    """Yield a line of the report for each step."""
    x = table.values()
    for step in STEPS:
        progress.next(f"{table}, {step}")
        found = measure(contestants(step, x), rounds, budget=20.0)
        first, *others = found
        cells = [f"{1e3 * found[first].median:.1f}"]
        cells += [f"{1e3 * found[n].median:.1f} ({1 / found[n].paired:.1f})" for n in others]
        yield list(found), [step, *cells]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tables", type=int, default=len(TABLES), help="the first ones only")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the rows")
    args = parser.parse_args()
    tables = [t._replace(rows=t.rows // 100) for t in TABLES] if args.quick else TABLES
    tables = tables[: args.tables]
    machine = describe()
    print(f"{machine['cpu']}, {machine['bnfast_isa']}; bnfast {bnfast.__version__}, ", end="")
    print(f"scikit-learn {version('scikit-learn')}, NumPy {np.__version__}")
    progress = Progress([t.rows * t.features for t in tables for _ in STEPS])
    for table in tables:
        for i, (names, row) in enumerate(rows_of(table, args.rounds, progress)):
            if i == 0:
                print(f"\n{table}: milliseconds (times as fast as {names[0]})\n")
                print(f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
            print(f"| {' | '.join(row)} |", flush=True)
    progress.end()


if __name__ == "__main__":
    main()
