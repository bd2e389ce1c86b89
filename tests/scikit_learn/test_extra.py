"""scikit-learn is imported by bnfast.sklearn alone, and named where it is missing."""

from processes import run_python


def test_without_scikit_learn_the_extra_is_named():
    done = run_python("import sys; sys.modules['sklearn'] = None; import bnfast.sklearn")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: bnfast.sklearn needs scikit-learn 1.6 or later, which the extra "
        "bnfast[sklearn] installs: "
    )


def test_bnfast_alone_imports_no_scikit_learn():
    done = run_python("import bnfast, sys; print('sklearn' in sys.modules, 'scipy' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False False\n", "")
