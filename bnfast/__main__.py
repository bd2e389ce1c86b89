"""``python -m bnfast`` prints what was built and what was chosen on this machine."""

import argparse
import json

from . import __version__
from ._config import show_config


def main(arguments: list[str] | None = None) -> None:
    """Print the configuration as the command line asks, or refuse it with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m bnfast",
        description="Print what was built and what was chosen on this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--version", action="version", version=f"bnfast {__version__}")
    asked = parser.parse_args(arguments)
    if asked.json:
        print(json.dumps(show_config(mode="dicts"), indent=2))
    else:
        show_config()


if __name__ == "__main__":
    main()
