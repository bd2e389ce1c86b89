"""``python -m bnfast.torch script.py ...`` calls `enable`, then runs a script."""

import runpy
import sys
from pathlib import Path

from .process import enable


def main() -> None:
    """Run the script given on the command line, as ``python script.py ...`` would."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m bnfast.torch script.py [argument ...]")
    enable()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
