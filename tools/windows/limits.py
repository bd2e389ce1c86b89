"""Tests that wine cannot run, and why. All others must pass."""

WINE = {
    "tests/test_interpreters.py": "a second interpreter that imports NumPy never ends",
}
