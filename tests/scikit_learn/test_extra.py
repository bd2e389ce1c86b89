"""scikit-learn is imported by bnfast.sklearn alone, and named where it is missing."""

import pytest
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


def test_the_scaler_imports_no_dask():
    """Not even to find out that it was not given a Dask array."""
    pytest.importorskip("sklearn", minversion="1.6")
    done = run_python(
        "import sys, numpy as np; from bnfast.sklearn import StandardScaler; "
        "x = np.eye(3); StandardScaler().fit(x).inverse_transform(x); "
        "print([m for m in ('dask', 'zarr', 'bnfast.distributed') if m in sys.modules])"
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_dask_may_be_there_without_its_arrays():
    pytest.importorskip("sklearn", minversion="1.6")
    done = run_python(
        "import sys, types, numpy as np; sys.modules['dask'] = types.ModuleType('dask'); "
        "from bnfast.sklearn import StandardScaler; "
        "print(StandardScaler().fit(np.eye(2)).mean_, 'dask.array' in sys.modules)"
    )
    assert (done.stdout, done.stderr) == ("[0.5 0.5] False\n", "")
