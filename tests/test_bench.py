"""bench/: its modules, what its figures show, and how instruction counts meet their pins."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="not run from a source tree")


@pytest.fixture(autouse=True)
def _root_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_cases_of_tests_and_bench_can_be_imported_together():
    import cases

    from bench.harness import cases as bench_cases

    assert hasattr(cases, "Problem")
    assert hasattr(bench_cases, "Case")


def imported(path):
    """Yield the modules that a file imports, those of functions too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_modules_import_each_other_in_no_circle():
    paths = (ROOT / "bench").rglob("*.py")
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    graph = {name: {m for m in imported(path) if m in files} for name, path in files.items()}
    assert graph["bench.report.markdown"] >= {"bench.report.sections", "bench.report.targets"}
    graphlib.TopologicalSorter(graph).prepare()


class TestFigures:
    @pytest.fixture
    def figures(self):
        pytest.importorskip("matplotlib")
        from bench.report import figures

        return figures

    @staticmethod
    def row(*names):
        times = {name: {"median": 2e-3} for name in ("bnfast", "bnfast default", *names)}
        return {
            "shape": "32x64x56x56", "layout": "nchw", "nbytes": 25_690_112, "limit": 1e-3,
            "times": times,
        }  # fmt: skip

    def test_a_peer_without_a_style_is_drawn(self, figures):
        rows = [self.row("torch", "torch default", "copy, streaming"), self.row("new", "newer")]
        figure = figures.roofline("forward", 2, rows)
        (legend,) = (axis.get_legend() for axis in figure.axes)
        labels = [text.get_text() for text in legend.get_texts()]
        assert labels == ["bnfast", "PyTorch", "new", "newer"]
        figures.plt.close(figure)

    def test_peers_without_a_style_have_different_colours(self, figures):
        styles = figures.styles([self.row(*figures.STYLE, "new", "newer")])
        assert {name: styles[name] for name in figures.STYLE} == figures.STYLE
        colours = [colour for colour, _ in styles.values()]
        assert colours.count(styles["new"][0]) == 1
        assert colours.count(styles["newer"][0]) == 1


class TestInstructionPins:
    """What `make instructions` does with counts; the counting itself needs valgrind."""

    @pytest.fixture
    def pins(self):
        from bench.instructions import pins

        return pins

    @pytest.fixture
    def main(self, pins, tmp_path, monkeypatch):
        """Return a function that runs `make instructions` on given counts, one a run."""
        from bench.instructions import __main__ as program

        monkeypatch.setattr(pins, "FILE", tmp_path / "pins.json")
        monkeypatch.setattr(program, "check_installed", lambda: None)

        def run(*counts, write=False):
            given = iter(counts)
            monkeypatch.setattr(program, "counted", lambda torch: next(given))
            monkeypatch.setattr(sys, "argv", ["instructions", *(["--write"] if write else [])])
            try:
                program.main()
            except SystemExit as end:
                return end.code
            return 0

        return run

    def test_the_committed_pins_name_the_calls(self, pins):
        from bench.harness.small_calls import calls

        for entry in pins.load():
            assert entry["isa"] == pins.ISA
            assert "torch" in entry["environment"] or list(entry["calls"]) == list(calls())

    def test_no_pins(self, main, capsys):
        assert main() == 0
        assert "SKIPPED: no pins for Python" in capsys.readouterr().out

    def test_written_pins_are_met_by_the_same_counts(self, main):
        assert main(*[{"a": 1000, "b": 100}] * 3, write=True) == 0
        assert main({"a": 1000, "b": 100}) == 0

    def test_the_least_of_three_runs_is_pinned(self, main, pins):
        main({"a": 1009}, {"a": 1000}, {"a": 1005}, write=True)
        assert pins.pinned(pins.load(), pins.environment()) == {"a": 1000}

    @pytest.mark.parametrize(("count", "code"), [(1030, 0), (1031, 1), (900, 0)])
    def test_three_per_cent_are_allowed(self, main, capsys, count, code):
        main(*[{"a": 1000, "b": 100}] * 3, write=True)
        assert main(*[{"a": count, "b": 100}] * 3) == code
        printed = capsys.readouterr().err
        assert ("bnfast: a: 1,031 instructions, +3.1% from 1,000" in printed) == bool(code)
        assert "b:" not in printed

    def test_a_call_fails_if_all_three_runs_do(self, main):
        main(*[{"a": 1000}] * 3, write=True)
        assert main({"a": 1050}, {"a": 1040}, {"a": 1010}) == 0
        assert main({"a": 1050}, {"a": 1040}, {"a": 1040}, {"a": 1010}) == 1

    def test_calls_and_pins_are_the_same_set(self, main, capsys):
        main(*[{"a": 1000, "b": 100}] * 3, write=True)
        assert main({"a": 1000, "c": 100}) == 1
        printed = capsys.readouterr().err
        assert "c: not pinned" in printed
        assert "b: pinned, but there is no such call" in printed

    @pytest.mark.parametrize(
        ("changed", "agree"),
        [
            ({}, True),
            ({"numpy": "2.4.9"}, True),
            ({"compiler": "gcc 14.2.0"}, True),
            ({"numpy": "2.5.6"}, False),
            ({"python": "3.11.8 (GCC 12.2.0)"}, False),
            ({"python": "3.11.7 (GCC 13.1.0)"}, False),
            ({"machine": "aarch64"}, False),
            ({"torch": "2.13.0"}, False),
        ],
    )
    def test_pins_of_another_python_or_numpy_are_not_compared(
        self, main, pins, monkeypatch, capsys, changed, agree
    ):
        here = {"python": "3.11.7 (GCC 12.2.0)", "numpy": "2.4.6", "machine": "x86_64"}
        here["compiler"] = "gcc 12.2.0"
        pins.write({"a": 1000}, here)
        monkeypatch.setattr(pins, "environment", lambda: here | changed)
        assert main(*[{"a": 2000}] * 3) == int(agree)
        assert ("SKIPPED" in capsys.readouterr().out) != agree

    def test_writing_keeps_the_pins_of_other_environments(self, main, pins, capsys):
        elsewhere = pins.environment() | {"python": "3.8.0 (GCC 4.8)"}
        pins.write({"a": 900}, elsewhere)
        main(*[{"a": 1000}] * 3, write=True)
        main(*[{"a": 1001}] * 3, write=True)
        assert pins.pinned(pins.load(), elsewhere) == {"a": 900}
        assert pins.pinned(pins.load(), pins.environment()) == {"a": 1001}
        assert len(pins.load()) == 2
        assert "unchanged: the pins for Python 3.8.0" in capsys.readouterr().out
