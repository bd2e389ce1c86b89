"""Python's other interpreters (subinterpreters): one uses bnfast, the others are refused."""

import importlib.util
import subprocess
import sys

import pytest

INTERPRETERS = (
    """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters

KIND = sys.argv[1]
COMPUTE = """
    + repr("""
who = "NumPy"
try:
    import numpy as np
    who = "bnfast"
    import bnfast
except (ImportError, RuntimeError) as error:  # NumPy has both
    print(f"{who} refused" if str(error) else "no reason given")
else:
    with bnfast.num_threads(2):
        x = np.arange(2.0**20).reshape(4, 4, 256, 256)
        print(bnfast.moments(x).mean.tolist() == x.mean((0, 2, 3)).tolist(), end=" ")
        y = bnfast.batch_norm(x[:1, :, :2, :2], training=True)
    print(abs(y.mean()) < 1e-15)
sys.stdout.flush()
""")
    + """
def another():
    if sys.version_info >= (3, 13):
        return interpreters.create(KIND)
    return interpreters.create(isolated=KIND == "isolated")

def there(interpreter, code):
    failed = interpreters.run_string(interpreter, "import sys" + code)
    assert failed is None, failed
"""
)


REFUSALS = {"NumPy refused", "bnfast refused"}


def have_interpreters():
    return any(map(importlib.util.find_spec, ("_interpreters", "_xxsubinterpreters")))


@pytest.mark.skipif(not have_interpreters(), reason="Python was built without interpreters")
@pytest.mark.parametrize("kind", ["isolated", "legacy"])  # with a GIL of its own (3.12), or not
class TestOtherInterpreters:
    """One interpreter of a process can use bnfast; the others are refused, by NumPy or by us."""

    @staticmethod
    def run(kind, code):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", INTERPRETERS + code, kind],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    def test_with_an_idle_interpreter(self, kind):
        """A process that has ever made one, as mod_wsgi does."""
        code = 'i = another(); there(i, "\\nimport json"); exec(COMPUTE); interpreters.destroy(i)'
        assert self.run(kind, code) == ["True True"]
        assert self.run(kind, f"exec(COMPUTE); {code}") == ["True True"] * 2

    def test_after_the_main_one(self, kind):
        lines = self.run(kind, "exec(COMPUTE); there(another(), COMPUTE); exec(COMPUTE)")
        assert lines[::2] == ["True True"] * 2
        assert lines[1] in REFUSALS

    def test_before_the_main_one(self, kind):
        code = "i = another(); there(i, COMPUTE); there(i, COMPUTE); exec(COMPUTE); exec(COMPUTE)"
        lines = self.run(kind, code)
        assert set(lines) <= {"True True", *REFUSALS}
        # NumPy 2.3 under free-threaded Python then refuses the main interpreter, too.
        assert "True True" in lines or set(lines) == {"NumPy refused"}
        assert lines[0] == lines[1]
        assert lines[2] == lines[3]
        assert lines.count("True True") <= 2
