"""Sphinx' settings: `make docs`, which treats every warning as an error."""

import importlib
import sys
from pathlib import Path

import latex2mathml.converter
from docutils import nodes

import bnfast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import figures  # noqa: E402  # beside this file

project = "bnfast"
author = "the bnfast developers"
copyright = author
version = release = bnfast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# Reports are written to be read in the repository as well.
suppress_warnings = ["myst.header"]

exclude_patterns = ["_build"]
default_role = "py:obj"  # a link if there is a target, else code
nitpicky = False

autosummary_generate = True
autodoc_typehints = "none"  # the docstrings give shapes and dtypes
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
numpydoc_show_class_members = False  # autodoc's :members: does that

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"bnfast {release}"
html_static_path = ["_static"]
html_css_files = ["bnfast.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_math_renderer = "mathml"

# ---- pages that depend on what is installed

# Modules that need other packages have a page if they can be imported.
OPTIONAL = ("torch", "distributed", "onnx", "sklearn")


def importable(name):
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"no page for {name}: {error}")
        return False
    return True


exclude_patterns += [f"api/{name}.md" for name in OPTIONAL if not importable(f"bnfast.{name}")]

figures.draw_all(HERE / "_figures")


# Pages that show a report of bench/results/, and the command that writes it.
REPORTS = {
    "accuracy": ("ACCURACY.md", "python -m bench.studies.accuracy"),
    "benchmarks": ("RESULTS.md", "make bench"),
}


def include_report(_app, docname, source):
    """Put a report of bench/results/ in its page; an sdist has no reports."""
    if docname in REPORTS:
        name, command = REPORTS[docname]
        text = f"```{{include}} ../bench/results/{name}\n:relative-images:\n:heading-offset: 1\n```"
        if not (HERE.parent / "bench" / "results" / name).exists():
            text = f"This copy has no `bench/results/{name}`: `{command}` writes it."
        source[0] = source[0].replace("@REPORT@", text)


# The first page shows one figure of those reports.
FIGURE = """```{figure} ../bench/results/figures/forward.png
:width: 540px
:alt: Training forward by shape, as a share of what memory allows: bnfast, oneDNN, PyTorch, libxsmm

The speed of a training forward by shape, two threads of an AMD EPYC. The limit is a loop that only
moves the bytes that must be moved.
```"""


def include_figure(_app, docname, source):
    """Put the figure in the first page, where there is one."""
    if docname == "index":
        there = (HERE.parent / "bench" / "results" / "figures" / "forward.png").exists()
        source[0] = source[0].replace("@FIGURE@", FIGURE if there else "")


def formula(translator, node):
    """Write a formula as MathML, which browsers draw themselves: no script, no network."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    drawn = latex2mathml.converter.convert(node.astext(), display=display)
    if display == "block":
        drawn = f'<div class="formula">{drawn}</div>'
    translator.body.append(drawn)
    raise nodes.SkipNode


def setup(app):
    app.connect("source-read", include_report)
    app.connect("source-read", include_figure)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
