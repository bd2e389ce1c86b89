"""Write a run's report again, from its JSON.

python -m bench.report run.json [RESULTS.md [FIGURES]]    as text, and the Markdown too
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.report.markdown import markdown
from bench.report.text import text


def main() -> None:
    if not 2 <= len(sys.argv) <= 4 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    source, *rest = map(Path, sys.argv[1:])
    results = json.loads(source.read_text())
    print(text(results))
    if rest:
        from bench.report import figures

        folder = rest[1] if len(rest) > 1 else rest[0].parent / "figures"
        drawn = figures.all_figures(results, folder)
        rest[0].write_text(markdown(results, drawn, rest[0].parent))


if __name__ == "__main__":
    main()
