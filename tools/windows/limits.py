"""Tests that wine cannot run, and why. All others must pass."""

OF_NUMPY = "a second interpreter that imports NumPy never ends, without bnfast either"
WINE = {
    "tests/test_interpreters.py::TestOtherInterpreters::test_after_the_main_one": OF_NUMPY,
    "tests/test_interpreters.py::TestOtherInterpreters::test_before_the_main_one": OF_NUMPY,
}
