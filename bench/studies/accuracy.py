"""How accurate the statistics and outputs of a training forward are, on difficult data.

    python -m bench.studies.accuracy    # writes accuracy.json, ACCURACY.md, figures/accuracy.svg

The data are float32 of shape SHAPE, channels on axis 1, weight 1 and bias 0. The right answer is
computed from the same float32 values in `numpy.longdouble`. Peers that are not installed are left
out. Nothing is timed, and the numbers are the same on every run with the same versions and
instruction set.
"""

import argparse
import json
from pathlib import Path

import numpy as np

SHAPE = (32, 8, 28, 28)
AXES = (0, 2, 3)
EPS = 1e-5
SEED = 1502_03167
RESULTS = Path(__file__).resolve().parents[1] / "results"
FIGURE = (
    "![Errors of the variance and of normalised values, for each kind of data and "
    "implementation](figures/accuracy.svg)"
)
CONSTANTS = (0.1, 1 / 3, 1e-3, 3.14159, 1e4 + 0.1, 1e6 + 0.3, -123456.7, 7e7)


# ---- data: name -> (description, array)


def cases():
    rng = np.random.default_rng(SEED)
    normal = rng.standard_normal(SHAPE)
    outlier, zeros = normal.copy(), 1000 + normal
    outlier[0, :, 0, 0] = 1e5
    zeros[0] = 0
    constant = np.broadcast_to(np.reshape(CONSTANTS, (1, -1, 1, 1)), SHAPE)
    made = {
        "normal": ("mean 0, deviation 1", normal),
        "far mean": ("mean 1e4, deviation 0.1", 1e4 + 0.1 * normal),
        "farther mean": ("mean 1e6, deviation 1", 1e6 + normal),
        "outlier first": ("1e5, then mean 0, deviation 1", outlier),
        "zeros first": ("an image of 0, then mean 1000, deviation 1", zeros),
        "constant": ("one value in all of a channel", constant),
    }
    return {name: (what, np.ascontiguousarray(x, np.float32)) for name, (what, x) in made.items()}


def along(vector):
    return np.reshape(vector, (1, -1, 1, 1))


def right_answer(x):
    exact = x.astype(np.longdouble)
    mean = exact.mean(AXES)
    centred = exact - along(mean)
    var = (centred * centred).mean(AXES)
    return var, centred / np.sqrt(along(var) + EPS)


# ---- contestants: x -> (biased variance, y)


def numpy_naive(x):
    """E[x^2] - E[x]^2 in float32."""
    mean = x.mean(AXES)
    var = np.maximum((x * x).mean(AXES) - mean * mean, 0)
    return var, (x - along(mean)) / np.sqrt(along(var) + np.float32(EPS))


def numpy_two_passes(x):
    var = x.var(AXES)
    return var, (x - along(x.mean(AXES))) / np.sqrt(along(var) + np.float32(EPS))


def ours(x):
    import bnfast

    y, stats = bnfast.batch_norm_forward(x, eps=EPS)
    return stats.var, y


def pytorch(x):
    import torch

    running = [torch.zeros(x.shape[1]), torch.ones(x.shape[1])]
    y = torch.nn.functional.batch_norm(
        torch.from_numpy(x), *running, training=True, momentum=1.0, eps=EPS
    )
    m = x.size // x.shape[1]
    return running[1].numpy().astype(np.float64) * (m - 1) / m, y.numpy()


def onednn(x):
    from bench.harness.cases import Case, Data
    from bench.peers.onednn import OneDNN

    data = Data(Case(x.shape, "nchw"))
    data.weight.fill(1)
    data.bias.fill(0)
    data.sets[0].x[...] = x
    run = OneDNN().runs(data, data.sets[0], "forward")["onednn nchw"]
    run.call()
    return run.call.arrays.var, run.answer(None)[0]


def contestants():
    """Return the contestants that are installed: name -> (version, function)."""
    import bnfast
    from bench.harness.compiled import Missing

    found = {
        "bnfast": (bnfast.__version__, ours),
        "NumPy, two passes": (np.__version__, numpy_two_passes),
        "NumPy, E[x²] - E[x]²": (np.__version__, numpy_naive),
    }
    try:
        import torch

        found["PyTorch"] = (torch.__version__.partition("+")[0], pytorch)
    except ImportError as error:
        print(f"left out: {error}")
    try:
        from bench.peers.onednn import OneDNN

        found["oneDNN"] = (OneDNN().version, onednn)
    except (Missing, OSError) as error:
        print(f"left out: {error}")
    return found


# ---- results


def errors(x, contestant, answer):
    """Return the worst relative error of a channel's variance, and that of a normalised value.

    The latter is absolute for values up to 1, and relative for larger ones (an outlier).
    """
    var, y = contestant(x)
    right_var, right_y = answer
    relative = None
    if (right_var > 0).all():
        relative = float((np.abs(var - right_var) / right_var).max())
    output = np.abs(y - right_y) / np.maximum(1, np.abs(right_y))
    return {"variance": relative, "output": float(output.max())}


def measure():
    found = contestants()
    rows = []
    for name, (what, x) in cases().items():
        answer = right_answer(x)
        with np.errstate(all="ignore"):  # the naive variance may be rounding errors only
            rows += [
                {"case": name, "data": what, "of": of, **errors(x, contestant, answer)}
                for of, (_, contestant) in found.items()
            ]
    versions = {of: version for of, (version, _) in found.items()}
    return {"shape": SHAPE, "seed": SEED, "eps": EPS, "versions": versions, "rows": rows}


def value(number):
    if number is None:
        return ""
    return "0" if number == 0 else f"{number:.0e}".replace("e-0", "e-").replace("e+0", "e+")


def table(results, which):
    names = list(results["versions"])
    lines = [f"| data | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["case"] == case]
        if any(row[which] is not None for row in rows):
            cells = " | ".join(value(row[which]) for row in rows)
            lines.append(f"| {case}: {rows[0]['data']} | {cells} |")
    return lines


def markdown(results):
    versions = ", ".join(f"{of} {version}" for of, version in results["versions"].items())
    setting = f"shape {tuple(results['shape'])}, seed {results['seed']}, eps {results['eps']:g}"
    return "\n".join(
        [
            FIGURE,
            "",
            f"`python -m bench.studies.accuracy`: float32, {setting}. {versions}.",
            "",
            "The worst relative error of a channel's variance:",
            "",
            *table(results, "variance"),
            "",
            "The worst error of a normalised value, relative where it is beyond 1 (an outlier):",
            "",
            *table(results, "output"),
            "",
        ]
    )


# Okabe and Ito's colours, as in report/figures.py.
COLOURS = {"bnfast": "#D55E00", "PyTorch": "#009E73", "oneDNN": "#0072B2"}
COLOURS |= {"NumPy, two passes": "#999999", "NumPy, E[x²] - E[x]²": "#000000"}
MARKERS = {"bnfast": "o", "PyTorch": "s", "oneDNN": "^"}
PANELS = {
    "variance": "relative error of the variance",
    "output": "largest error of a normalised value",
}


def draw(results, path):
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    settings = {"svg.hashsalt": "bnfast", "font.size": 10, "axes.spines.top": False}
    settings |= {"axes.spines.right": False, "figure.constrained_layout.use": True}
    names = list(dict.fromkeys(row["case"] for row in results["rows"]))
    with plt.rc_context(settings):
        figure, axes = plt.subplots(2, 1, figsize=(7.2, 6.8), sharex=True)
        for axis, (which, title) in zip(axes, PANELS.items(), strict=True):
            panel(axis, results, which, names)
            axis.set_title(title, fontsize=10, loc="left")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close(figure)


def panel(axis, results, which, names):
    """Draw a row for each case and a mark for each contestant, exact answers at the left."""
    exact = 1e-18
    contestants = list(results["versions"])
    for i, of in enumerate(contestants):
        rows = [row for row in results["rows"] if row["of"] == of and row[which] is not None]
        lift = (i - (len(contestants) - 1) / 2) * 0.12
        axis.scatter(
            [max(row[which], exact) for row in rows],
            [names.index(row["case"]) + lift for row in rows],
            label=of, color=COLOURS[of], marker=MARKERS.get(of, "D"), s=30, clip_on=False, zorder=3,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlim(exact, 1e7)
    ticks = [exact, 1e-14, 1e-10, 1e-6, 1e-2, 1e2, 1e6]
    axis.set_xticks(ticks, ["exact", *(f"$10^{{{round(np.log10(t))}}}$" for t in ticks[1:])])
    axis.minorticks_off()
    axis.axvline(2.0**-24, color="#999999", linewidth=1, linestyle=":", zorder=0)
    axis.annotate(
        "float32's rounding", (2.0**-24, 0), (-3, 4), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="right", va="bottom", fontsize=8, color="#777777",
    )  # fmt: skip
    data = {row["case"]: row["data"] for row in results["rows"]}
    axis.set_yticks(range(len(names)), [data[name].replace(", then", ",\nthen") for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    for row in range(len(names)):
        axis.axhspan(row - 0.5, row + 0.5, color="#f6f6f6" if row % 2 else "white", zorder=-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where to write")
    folder = parser.parse_args().folder
    results = measure()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accuracy.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "ACCURACY.md").write_text(markdown(results), encoding="utf-8")
    draw(results, folder / "figures" / "accuracy.svg")
    print(markdown(results))


if __name__ == "__main__":
    main()
