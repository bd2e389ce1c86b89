"""scikit-learn's checks of estimators, and its own tests of StandardScaler, on ours."""

import importlib.util
import inspect
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6")

import sklearn
from sklearn import preprocessing
from sklearn.utils.estimator_checks import parametrize_with_checks

from bnfast.sklearn import StandardScaler

# Warnings are the business of scikit-learn's tests: they expect some, and cause others.
pytestmark = pytest.mark.filterwarnings("default")

# With copy=False a check fails that changes its data and looks at them again: scikit-learn's, too.
OPTIONS = [{}, {"with_mean": False}, {"with_std": False}, {"with_mean": False, "with_std": False}]


def with_a_list(mark):
    """pytest warns of parameters that come from a generator."""
    if mark.name != "parametrize":
        return mark
    names, values = mark.args
    return pytest.mark.parametrize(names, list(values), **mark.kwargs).mark


def expected_to_fail(estimator):
    """In 1.6 one check sets with_mean=False for scikit-learn's own class alone."""
    if not sklearn.__version__.startswith("1.6.") or not estimator.with_mean:
        return {}
    return {"check_sample_weight_equivalence_on_sparse_data": "centers sparse data"}


def test_estimator(estimator, check):
    check(estimator)


checks = parametrize_with_checks(
    [StandardScaler(**options) for options in OPTIONS], expected_failed_checks=expected_to_fail
)
test_estimator.pytestmark = [with_a_list(checks.mark)]


def scikit_learns_tests():
    """Yield the tests of its own file that name StandardScaler, which is ours there."""
    spec = importlib.util.find_spec("sklearn.preprocessing.tests.test_data")
    if spec is None:
        return
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(preprocessing, "StandardScaler", StandardScaler):
        spec.loader.exec_module(module)
    assert module.StandardScaler is StandardScaler
    for name, value in vars(module).items():
        if name.startswith("test_") and "StandardScaler" in inspect.getsource(value):
            value.pytestmark = [with_a_list(mark) for mark in getattr(value, "pytestmark", [])]
            yield name, value


TESTS = dict(scikit_learns_tests())
globals().update(TESTS)


@pytest.fixture(params=[np.float32, np.float64])
def global_dtype(request):
    """As in scikit-learn's conftest.py."""
    return request.param


@pytest.fixture
def global_random_seed():
    return 42


def test_scikit_learns_tests_were_found():
    if not TESTS:
        pytest.skip("this scikit-learn has no tests")
    assert len(TESTS) > 20
    assert "test_standard_scaler_near_constant_features" in TESTS
