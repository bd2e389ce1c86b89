"""A C compiler for other systems that takes gcc's options: PyPI's ziglang, which is clang.

python tools/zig_cc.py x86_64-windows-gnu -O2 -c file.c
"""

import os
import sys
from pathlib import Path

# Of the C libraries, which zig compiles once.
CACHE = Path(__file__).resolve().parents[1] / "build" / "zig"
# Processors are spelled zig's way, and it takes each -g for debug information, -g0 too.
RENAMED = {"-march=x86-64": "-march=x86_64", "-g0": "-s"}


def compiler_for(target):
    """Return the command of the compiler for a target, as a list."""
    return [sys.executable, str(Path(__file__).resolve()), target]


def zig():
    """Return the path of zig."""
    import ziglang

    return str(Path(ziglang.__file__).parent / "zig")


def main():
    os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(CACHE))
    target, *options = sys.argv[1:]
    arguments = [RENAMED.get(option, option) for option in options]
    os.execv(zig(), [zig(), "cc", "-target", target, *arguments])


if __name__ == "__main__":
    main()
