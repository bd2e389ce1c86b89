"""All entry points from several Python threads at once: the bits and the counts of a single thread.

In free-threaded Python small calls run side by side too; elsewhere the large ones do.
"""

import importlib.util
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from processes import run_python

import bnfast
from bnfast import _core

pytestmark = pytest.mark.usefixtures("own_default")

THREADS = 4
ROUNDS = 5
SHAPES = {"small": (4, 8, 5, 5), "large": (8, 32, 24, 24)}  # with the GIL, and on several threads


def forward(x, weight, mask):
    return bnfast.batch_norm_forward(x, weight, activation="relu")


def masked(x, weight, mask):
    return bnfast.batch_norm_forward(x, weight, mask=mask)


def virtual(x, weight, mask):
    return bnfast.batch_norm_forward(x, weight, virtual_batch_size=2)


def backward(x, weight, mask):
    stats = bnfast.batch_norm_forward(x, weight)[1]
    return bnfast.batch_norm_backward(x, x, stats, weight)


def inference(x, weight, mask):
    return bnfast.normalize(x, weight, abs(weight), activation="hardswish")


def moments(x, weight, mask):
    found = bnfast.moments(x, mask=mask)
    return found.mean, found.m2


def half(x, weight, mask):
    return bnfast.batch_norm(x.astype(np.float16), training=True)


def copied(x, weight, mask):
    return bnfast.batch_norm(x[..., ::2], training=True)  # not dense


def trained(x, weight, mask):
    layer = bnfast.BatchNorm2d(x.shape[1], activation="relu")
    for _ in range(2):
        layer.backward(layer(x))
    return *layer.state_dict().values(), layer.weight_grad, layer.freeze()(x)


def limited(x, weight, mask):
    with bnfast.num_threads(2):
        return bnfast.get_num_threads(), bnfast.batch_norm(x, training=True)


def freed(x, weight, mask):
    y = bnfast.batch_norm(x, training=True)
    bnfast.release_memory()
    return y


CALLS = [forward, masked, virtual, backward, inference, moments, half, copied, trained, limited]
CALLS += [freed]


def bits_of(result):
    rows = result if isinstance(result, tuple) else (result,)
    return [bits_of(row) if isinstance(row, tuple) else np.asarray(row).tobytes() for row in rows]


@pytest.fixture
def switching():
    """Let Python change between threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(work):
    """Call work(i) in THREADS threads that start at the same moment; return the results."""
    barrier = threading.Barrier(THREADS, timeout=30)

    def begin(i):
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS), timeout=300))


@pytest.fixture(params=SHAPES)
def arguments(request):
    rng = np.random.default_rng(4)
    x = rng.standard_normal(SHAPES[request.param], dtype=np.float32)
    weight = rng.standard_normal(x.shape[1])
    return x, weight, rng.random((x.shape[0], 1, *x.shape[2:])) < 0.9


def test_bits_and_counts_of_a_single_thread(arguments, switching, dispatches):
    expected = {call: bits_of(call(*arguments)) for call in CALLS}
    alone = dispatches()
    assert len(alone) >= 8

    def work(i):
        """Another order in each thread, so that different calls meet."""
        order = (CALLS[i:] + CALLS[:i])[:: 1 - 2 * (i % 2)] * ROUNDS
        return [call.__name__ for call in order if bits_of(call(*arguments)) != expected[call]]

    assert together(work) == [[]] * THREADS
    assert dispatches() == {kind: n * THREADS * ROUNDS for kind, n in alone.items()}
    assert _core.at_work() == (0, 0)


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
def test_scalers(switching):
    from bnfast.sklearn import StandardScaler

    x = np.random.default_rng(5).standard_normal((3000, 16), dtype=np.float32)

    def fit(_=None):
        scaler = StandardScaler()
        for part in np.array_split(x, 3):
            scaler.partial_fit(part)
        return scaler

    shared = fit()
    expected = shared.transform(x).tobytes()
    found = together(lambda i: (fit().transform(x).tobytes(), shared.transform(x).tobytes()))
    assert found == [(expected, expected)] * THREADS


def test_one_thread_initialises_a_frozen_batch_norm(switching):
    """Another one sees it as it was before, or as it is after."""
    x = np.arange(48, dtype=np.float32).reshape(2, 3, 8)
    scale, shift = np.array([2.0, 3.0, 4.0]), np.arange(3.0)
    expected = bnfast.scale_shift(x, scale, shift).tobytes()
    for _ in range(50):
        layer = _core.FixedMap.__new__(_core.FixedMap)

        def work(i, layer=layer):
            try:
                if i < THREADS // 2:
                    layer.__init__(np.zeros(3), scale, shift, 1, None)
                    return "made"
                return layer(x).tobytes()
            except RuntimeError as error:
                return str(error)

        found = together(work)
        made, called = found[: THREADS // 2], found[THREADS // 2 :]
        assert sorted(made) == ["a frozen batch norm is immutable; make another one", "made"]
        assert set(called) <= {"this frozen batch norm was never initialised", expected}
        assert layer(x).tobytes() == expected


FIRST_USES = """
import sys, threading
import numpy as np
sys.setswitchinterval(1e-6)
import bnfast
from bnfast import _core
try:
    import ml_dtypes
except ImportError:
    types = [np.float32]
else:
    types = [np.float32, ml_dtypes.bfloat16]
x = np.ones((8, 32, 32, 32), np.float32)
inputs = [x.astype(t) for t in types]
barrier, found = threading.Barrier({threads}), []
def work():
    barrier.wait()
    found.append((bnfast.get_num_threads(), _core.kept_memory()[1] > 0,
                  *(float(abs(bnfast.batch_norm(x, training=True)).max()) for x in inputs)))
threads = [threading.Thread(target=work) for _ in range({threads})]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(found), set(found) == {{(bnfast.get_num_threads(), True, *[0.0] * len(types))}})
"""


def test_first_uses_in_several_threads():
    """What is found out at its first use: limits of the machine, the number of bfloat16."""
    done = run_python(
        FIRST_USES.format(threads=THREADS), BNFAST_NUM_THREADS=None, OMP_NUM_THREADS=None
    )
    assert done.stdout == f"{THREADS} True\n", done.stderr


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs free-threaded Python"
)
def test_the_import_leaves_the_gil_off():
    done = run_python(
        "import sys, numpy, bnfast, bnfast.layers; print(sys._is_gil_enabled())", PYTHON_GIL=None
    )
    assert done.stdout == "False\n", done.stderr
