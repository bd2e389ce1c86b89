"""One pool of threads for PyTorch and bnfast: counted in separate processes, never timed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc"
)

# Tensors so large that both libraries use several threads.
PROGRAM = """
import copy, json, os, sys
import numpy as np
for name in sys.argv[1].split():
    package = __import__(name)
    if name == "bnfast":  # its own pool, if it is going to have one
        package.batch_norm_forward(np.ones((8, 64, 56, 56), np.float32))
import bnfast.torch, torch
from bnfast import _core
from torch import nn

torch.set_num_threads(int(sys.argv[2]))
# Some convolutions have a pool of another kind in PyTorch.
layers = [nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.ReLU()]
with_convolution = sys.argv[3] == "True"
model = nn.Sequential(*(m for m in layers if with_convolution or type(m) is not nn.Conv2d))
x = torch.randn(8, 32, 64, 64)

def step(model):
    model.train()(x).square().mean().backward()
    with torch.no_grad():
        model.eval()(x)
    return len(os.listdir("/proc/self/task"))

ours = bnfast.torch.convert(copy.deepcopy(model))
before = len(os.listdir("/proc/self/task"))
plain = [step(model) for _ in range(2)]
_core.reset_dispatches()
converted = [step(ours) for _ in range(2)] + [step(model), step(ours)]
maps = open("/proc/self/maps").read().split()
print(json.dumps({
    "before": before,
    "plain": plain[-1],
    "converted": max(converted),
    "directions": sorted({key[0] for key in _core.dispatches()}),
    "pool": _core.pool_started(),
    "runtimes": sorted({os.path.realpath(p) for p in maps if "libgomp" in p}),
}))
"""


def counted(imports, threads, convolution=True, **environ):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, imports, str(threads), str(convolution)],
        env={**os.environ, "OMP_NUM_THREADS": "8", "OPENBLAS_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["directions"] == ["backward", "forward", "inference"]
    return found


ORDERS = pytest.mark.parametrize("imports", ["bnfast torch", "torch bnfast"])


@ORDERS
def test_a_converted_step_adds_no_threads(imports):
    found = counted(imports, 3)
    assert found["pool"], "nothing ran in parallel: the test shows nothing"
    assert found["converted"] == found["plain"]
    assert len(found["runtimes"]) == 1


@ORDERS
def test_bundled_runtime_adds_no_threads(imports, tmp_path):
    """As in wheels, which carry one that is found before the system's."""
    system = counted("bnfast torch", 1)["runtimes"]
    shutil.copy(system[0], tmp_path / "libgomp.so.1")
    found = counted(imports, 3, LD_LIBRARY_PATH=str(tmp_path))
    assert found["pool"]
    assert found["converted"] == found["plain"]
    assert len(found["runtimes"]) == 1
    if imports.startswith("bnfast"):
        assert Path(found["runtimes"][0]).parent == tmp_path


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_thread_count_of_pytorch(threads):
    found = counted("torch", threads, convolution=False)
    assert found["pool"] == (threads > 1)
    assert found["converted"] == found["plain"] == found["before"] + threads - 1
