"""The compiler for 64-bit Windows."""

import sys

from steps import TOOLS

sys.path.append(str(TOOLS))
from zig_cc import compiler_for, zig

__all__ = ["COMPILER", "zig"]

COMPILER = compiler_for("x86_64-windows-gnu")
