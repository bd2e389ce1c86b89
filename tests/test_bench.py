"""bench/: its modules, its peers, what its report says, and how instruction counts meet pins."""

import ast
import graphlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import run_python

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


# What a peer answers: for each case and number of threads, what is wrong and who answered.
ANSWERS = """
import json
from bench.compare import load_peers
from bench.harness.cases import STEPS, Case, Data

def answers(peer, case, threads):
    data = Data(case)
    peer.set_threads(threads)
    for step in STEPS:
        for name, run in peer.runs(data, data.sets[0], step).items():
            error = data.error(step, run)
            yield step, name, error, error <= data.tolerance(step)

(ours, *found), versions = load_peers([NAME] if NAME != "bnfast" else [])
peer, version = (found or [ours])[0], versions[NAME]
left_out = version if version.startswith("left out") else ""
given = [] if left_out else [(Case(*case), threads) for case, threads in CASES]
print(json.dumps([left_out, [[str(c), t, *a] for c, t in given for a in answers(peer, c, t)]]))
"""
IMAGES = (2, 16, 5, 3)
CASES = [
    ((IMAGES, "nchw", "plain"), 2),
    ((IMAGES, "nchw", "relu"), 1),
    ((IMAGES, "nchw", "add_relu"), 2),
    ((IMAGES, "nchw", "silu"), 1),
    ((IMAGES, "nhwc", "plain"), 1),
    ((IMAGES, "nhwc", "add_relu"), 2),
    (((6, 16), "dense", "relu"), 1),
]
# By peer: who answers in a forward of each of these cases.
ANSWERING = {
    "numpy": ["numpy"] * 7,
    "torch": ["torch", "torch default"] * 7,
    "onednn": [
        *("onednn nchw", "onednn nChw8c", "onednn nChw16c") * 2, "onednn nhwc", "onednn nhwc",
    ],
    "onnxruntime": [],
    "libxsmm": ["libxsmm"] * 4,
    "jax": ["jax"] * 7,
    "inductor": ["torch.compile"] * 7,
}  # fmt: skip


def run_beside_bench(code, **given):
    """Run code that can import bench, and the bnfast that the tests import."""
    return run_python(f"import bnfast, sys; sys.path.append({str(ROOT)!r})\n{code}", **given)


def answers_of(name, cases=CASES):
    """Return what a peer answers, in a process of its own: peers change global settings."""
    done = run_beside_bench(f"NAME, CASES = {name!r}, {cases!r}\n{ANSWERS}", timeout=500)
    assert done.returncode == 0, done.stderr
    left_out, answers = json.loads(done.stdout.splitlines()[-1])
    if left_out:
        pytest.skip(left_out)
    assert [answer for answer in answers if not answer[-1] and "bnfast plain" not in answer] == []
    return [(case, threads, step, name) for case, threads, step, name, _, _ in answers]


class TestPeers:
    def test_every_peer_is_tested(self):
        from bench.compare import PEERS

        assert set(ANSWERING) == set(PEERS) - {"limits"}

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ANSWERING)
    def test_a_peer_computes_what_float64_does(self, name):
        answers = answers_of(name)
        assert [who for *_, step, who in answers if step == "forward"] == ANSWERING[name]
        assert {"inference"} <= {step for *_, step, _ in answers}

    def test_bnfast_is_given_channels_last_data_twice(self):
        from bench.harness.cases import VARIANTS

        ways = ["bnfast", "bnfast default"]
        expected = {
            "2x16x5x3 nchw plain": ways,
            "2x16x5x3 nchw relu": [*ways, "bnfast plain"],
            "2x16x5x3 nchw add_relu": ways,
            "2x16x5x3 nchw silu": [*ways, "bnfast plain"],
            "2x16x5x3 nhwc plain": [*ways, "bnfast view"],
            "2x16x5x3 nhwc add_relu": [*ways, "bnfast view"],
            "6x16 dense relu": [*ways, "bnfast plain"],
        }
        cases = [case for case in CASES if case[0][2] in VARIANTS]
        found = {}
        for case, _, step, who in answers_of("bnfast", cases):
            found.setdefault((case.removesuffix(" float32"), step), []).append(who)
        assert found == {
            (case, step): ways
            for case, ways in expected.items()
            for step in ("forward", "backward", "inference")
            if case.split()[-1] in VARIANTS
        }

    def test_the_view_is_of_the_same_memory(self, monkeypatch):
        import bnfast
        from bench.harness.cases import Case, Data
        from bench.peers.ours import Ours

        data = Data(Case(IMAGES, "nhwc"))
        buffers = data.sets[0]
        run = Ours().runs(data, buffers, "inference")["bnfast view"]
        calls = []
        monkeypatch.setattr(bnfast, "batch_norm", lambda x, *_, **named: calls.append((x, named)))
        run.call()
        ((x, named),) = calls
        assert (x.shape, named["out"].shape, named["axis"]) == (IMAGES, IMAGES, 1)
        assert np.shares_memory(x, buffers.x)
        assert np.shares_memory(named["out"], buffers.out)

    def test_a_peer_that_cannot_be_had_is_named(self, monkeypatch, capsys):
        from bench.compare import load_peers
        from bench.peers import libxsmm

        monkeypatch.setattr(libxsmm, "LIBRARIES", ("-lxsmm-is-not-here",))
        peers, versions = load_peers(["libxsmm"])
        assert [peer.name for peer in peers] == ["bnfast"]
        assert versions["libxsmm"].startswith(
            "left out: libxsmm cannot be used (Debian, Ubuntu: apt"
        )
        assert versions["libxsmm"] in capsys.readouterr().err

    @pytest.mark.slow
    def test_without_a_compiler_there_is_no_torch_compile(self, tmp_path):
        pytest.importorskip("torch")
        code = (
            "from bench.compare import load_peers; print(load_peers(['inductor'])[1]['inductor'])"
        )
        nowhere = {"CXX": str(tmp_path / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = run_beside_bench(code, timeout=200, **nowhere)
        assert done.stdout.startswith("left out: torch.compile does not work: "), done.stderr


def row(shape="32x64x56x56", layout="nchw", variant="plain", step="forward", limit=1e-3, **times):
    """Return a row of a run, its times in milliseconds; `_` in a name stands for a space."""
    named = {name.replace("_", " "): ms * 1e-3 for name, ms in times.items()}
    n, c, *space = (int(size) for size in shape.split("x"))
    return {
        "shape": shape, "layout": layout, "variant": variant, "step": step, "threads": 1,
        "cold": False, "nbytes": 4 * n * c * int(np.prod(space)), "traffic": 1, "limit": limit,
        "others": 0.0,
        "times": {
            name: {"median": s, "paired": s / named["bnfast"]} for name, s in named.items()
        },
    }  # fmt: skip


def judge(*rows, l2=2**20, l3=2**25):
    from bench.report.targets import Judge

    return Judge({
        "rows": list(rows), "scaling": [], "machine": {"caches": {"l2": l2, "l3": l3}},
        "extras": {"small_calls": {}, "import_seconds": 0.001, "half": {}},
    })  # fmt: skip


class TestTargets:
    @staticmethod
    def verdict(judge, name, judged, step="forward"):
        found = [
            v for v in judge.verdicts() if (v.target, v.judged, v.step) == (name, judged, step)
        ]
        assert len(found) == 1
        return found[0]

    def test_the_slower_form_of_channels_last_data_counts(self):
        times = {"bnfast": 2, "bnfast_view": 4, "torch": 12}
        judged = judge(row("32x64x28x28", layout="nhwc", **times), row(layout="nhwc", **times))
        for how in ("mean", "worst"):
            assert self.verdict(
                judged, "PyTorch channels_last over ours", how
            ).value == pytest.approx(3)
        assert self.verdict(judged, "fastest peer of each row over ours", "worst").value == 3
        in_cache = self.verdict(judged, "limit: channels-last in the cache", "worst")
        assert in_cache.value == 4

    def test_a_mean_is_of_convolutions_and_the_worst_of_all_rows(self):
        judged = judge(
            row(layout="nhwc", bnfast=1, torch=2),
            row("1x64x56x56", layout="nhwc", bnfast=1, torch=8),
            row("60x100", layout="dense", bnfast=2, torch=3),
            row(layout="nhwc", variant="add_relu", bnfast=1, torch=1.6),
            row("1x16x4x4", layout="nhwc", bnfast=1, torch=1),
        )
        name = "PyTorch channels_last over ours"
        mean, worst = (self.verdict(judged, name, how) for how in ("mean", "worst"))
        assert (round(mean.value, 9), mean.bound, mean.met) == (4, 2, True)
        assert (worst.value, worst.bound, worst.met) == (1.5, 1.5, True)
        assert worst.where == "60x100 dense"

    def test_the_faster_blocked_layout_is_the_peer(self):
        times = {"onednn_nChw8c": 3, "onednn_nChw16c": 2}
        judged = judge(row(bnfast=1, **times), row("32x512x7x7", bnfast=1, onednn_nChw8c=2.5))
        name = "oneDNN's faster blocked layout over our NCHW"
        assert self.verdict(judged, name, "worst").value == 2
        assert self.verdict(judged, name, "mean").count == 2

    @pytest.mark.parametrize(
        "name", ["onnxruntime", "libxsmm", "jax", "jax_again", "torch.compile"]
    )
    def test_a_row_that_is_slower_than_a_peer_is_listed(self, name):
        from bench.report.markdown import miss_lines

        behind = {"bnfast": 1.0, name: 0.99}
        even = {"bnfast": 1.0, name: 1.0}
        judged = judge(row(**even), row("60x100", layout="dense", **behind))
        (line,) = miss_lines(judged)
        assert line.endswith(" over ours: 60x100 dense, forward, threads 1: 0.99, asked 1")

    def test_each_row_is_listed_for_one_bound_only(self):
        from bench.report.markdown import miss_lines

        judged = judge(row(bnfast=1, torch=3, numpy=5))
        (line,) = miss_lines(judged)
        assert line.startswith("- PyTorch NCHW over ours: ")
        assert line.endswith("asked 4")

    def test_sizes_decide_which_limit_is_asked_for(self):
        judged = judge(
            row("32x256x56x56", bnfast=1.5),
            row("32x2048x14x14", bnfast=1.2),
            row("32x256x56x56", layout="nhwc", bnfast=1.3),
            row("32x64x28x28", layout="nhwc", bnfast=1.4),
            row("32x64x56x56", layout="nhwc", bnfast=9),
            row("1x64x28x28", layout="nhwc", bnfast=9),
            row("32x64x28x28", variant="add_relu", bnfast=1.6),
            row("1x64x28x28", variant="add_relu", bnfast=9),
        )
        worst = {v.target: v.value for v in judged.verdicts() if v.target.startswith("limit: ")}
        assert worst == pytest.approx({
            "limit: NCHW beyond the cache": 1.5,
            "limit: NCHW 14x14 beyond the cache": 1.2,
            "limit: channels-last beyond the cache": 1.3,
            "limit: channels-last in the cache": 1.4,
            "limit: fused add + ReLU": 1.6,
        })  # fmt: skip

    def test_fused_activations_are_compared_with_plain(self):
        shape = "32x256x56x56"
        judged = judge(
            row(variant="relu", bnfast=1.5, bnfast_plain=1),
            row(shape, variant="silu", bnfast=1.2, bnfast_plain=1),
            row("1x64x56x56", variant="silu", bnfast=3, bnfast_plain=1),
        )
        assert self.verdict(judged, "fused ReLU over plain", "mean").value == 1.5
        silu = self.verdict(judged, "fused SiLU over plain, beyond the cache", "mean")
        assert (silu.value, silu.count) == (pytest.approx(1.2), 1)

    def test_targets_without_rows_are_named(self):
        from bench.report.markdown import listed

        judged = judge(row(bnfast=1, jax=2))
        assert "JAX over ours" not in judged.unjudged()
        assert "libxsmm over ours" in judged.unjudged()
        assert "- No rows in this run for: libxsmm over ours." in listed(judged)


class TestTables:
    def test_ways_of_bnfast_are_compared_with_each_other(self):
        from bench.report.sections import columns, row_cells

        times = {"bnfast_default": 3, "bnfast_view": 4, "bnfast_plain": 1, "torch": 8}
        given = row(layout="nhwc", variant="relu", bnfast=2, **times)
        ratios = columns([given])
        assert list(ratios) == ["default", "view", "fused", "torch"]
        assert row_cells(given, ratios) == [
            "32x64x56x56 nhwc", "4", "2.5e-07", "4", "1.5", "2", "2", "2",
        ]  # fmt: skip

    def test_ways_that_no_row_has_are_left_out(self):
        from bench.report.sections import columns

        assert list(columns([row(bnfast=2, bnfast_default=3)])) == ["default"]


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

    def test_the_slower_form_of_channels_last_data_is_drawn(self, figures):
        assert figures.share(row(bnfast=2, bnfast_view=4), "bnfast") == 0.25

    def test_every_peer_has_room_in_the_legend(self, figures):
        names = dict.fromkeys(figures.STYLE, 2)
        figure = figures.roofline("forward", 2, [row(**names), row("1x64x56x56", **names)])
        figure.draw_without_rendering()
        (axes,) = figure.axes
        legend, frame = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert frame.x0 <= legend.x0
        assert legend.y0 >= axes.transData.transform((0, figures.CUT))[1]
        figures.plt.close(figure)

    def test_second_ways_of_a_peer_are_not_drawn(self, figures):
        styles = figures.styles([row(bnfast=1, jax=2, jax_again=3, torch_default=4)])
        assert list(styles) == ["bnfast", "jax"]


class TestBatchKinds:
    @pytest.fixture
    def study(self):
        from bench.studies import batch_kinds

        return batch_kinds

    def test_masks_count_half(self, study, rng):
        for kind in ("lengths", "random"):
            assert abs(study.mask_of(kind, 32, 500, rng).mean() - 0.5) < 0.02

    @pytest.mark.parametrize("layout", ["NCL", "NLC"])
    @pytest.mark.parametrize("kind", ["none", "lengths", "random", "weights"])
    def test_an_answer_for_another_mask_ends_the_study(self, study, layout, kind, rng):
        p = study.problem((4, 6, 10), layout, kind)
        right, (step, read) = study.right_answer(p), study.ours(p)
        study.checked("right", step, read, right, p)
        step, read = study.ours(p._replace(mask=study.mask_of("random", 4, 10, rng)))
        with pytest.raises(SystemExit, match="wrong one is wrong by"):
            study.checked("wrong one", step, read, right, p)

    @pytest.mark.slow
    def test_a_quick_run_has_a_row_for_each_mask_and_size(self):
        code = "from bench.studies import batch_kinds; batch_kinds.main(['--quick'])"
        done = run_beside_bench(code, timeout=300)
        assert done.returncode == 0, done.stderr
        rows = [line.split("|")[1:3] for line in done.stdout.splitlines() if "|" in line]
        ours = [(first.strip(), who.strip()) for first, who in rows if "bnfast" in who]
        masks = [(kind, "bnfast") for kind in ("none", "lengths", "random", "weights")]
        ways = ("bnfast, one call", "bnfast, a loop", "bnfast, all rows")
        assert ours == masks * 2 + [(size, way) for size in ("128", "512") for way in ways]


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
