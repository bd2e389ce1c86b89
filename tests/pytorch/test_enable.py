"""`enable` and related functions: on and off, threads, processes, the script runner, the report."""

import sys
import textwrap
import threading

import pytest
import torch
import torch.nn.functional as F
from processes import needs_fork, run_python

import bnfast.torch
from bnfast.torch import _aten

SHAPE = (8, 3, 4)


def norm():
    return F.batch_norm(torch.randn(SHAPE), None, None, training=True)


def counted():
    """How often `norm` ran here, and how often it was left because bnfast was not enabled."""
    _aten.forget_counts()
    norm()
    ran, left = _aten.counts()
    return ran.get("training", 0), left.get("bnfast was not enabled", 0)


def test_repeated_enable_and_disable():
    for _ in range(3):
        bnfast.torch.enable()
        bnfast.torch.enable()
        assert bnfast.torch.is_enabled()
        assert counted() == (1, 0)
        bnfast.torch.disable()
        bnfast.torch.disable()
        assert not bnfast.torch.is_enabled()
        assert counted() == (0, 1)


@pytest.mark.parametrize("before", [True, False])
def test_enabled_restores_former_state(before):
    (bnfast.torch.enable if before else bnfast.torch.disable)()
    try:
        with bnfast.torch.enabled():
            assert counted() == (1, 0)
            with bnfast.torch.enabled():
                bnfast.torch.disable()
            assert bnfast.torch.is_enabled()
        assert bnfast.torch.is_enabled() is before
        with pytest.raises(KeyError), bnfast.torch.enabled():
            raise KeyError
        assert bnfast.torch.is_enabled() is before
    finally:
        bnfast.torch.disable()


def test_report_counts_and_reasons(calls, fresh):
    x = torch.randn(SHAPE, requires_grad=True)
    F.batch_norm(x, None, None, training=True).sum().backward()
    F.batch_norm(x, torch.zeros(3), torch.ones(3))
    F.batch_norm(x, torch.zeros(3), torch.ones(6)[::2])
    F.batch_norm(x[:0], torch.zeros(3), torch.ones(3))
    bnfast.torch.disable()
    norm()
    report = bnfast.torch.report()
    assert report == bnfast.torch.Activity(
        ran={"training": 1, "evaluation": 1, "backward": 1},
        left={
            "parameters or statistics of another type, shape or order in memory": 1,
            "bnfast was not enabled": 1,
        },
    )
    assert str(report).splitlines() == [
        "3 calls ran on bnfast",
        "training: 1",
        "evaluation: 1",
        "backward: 1",
        "1 left to PyTorch: bnfast was not enabled",
        "1 left to PyTorch: parameters or statistics of another type, shape or order in memory",
    ]


def test_report_of_none_refused():
    with pytest.raises(TypeError, match=r"model is of type builtins\.NoneType"):
        bnfast.torch.report(None)


def test_enable_while_other_threads_compute():
    x = torch.randn(16, 8, 5, dtype=torch.float64)
    dy = torch.randn_like(x)
    stop, wrong = threading.Event(), []

    def step():
        leaf = x.clone().requires_grad_()
        y = F.batch_norm(leaf, None, None, training=True)
        return y.detach(), torch.autograd.grad(y, leaf, dy)[0]

    want = step()

    def compute():
        while not stop.is_set():
            if not all(map(torch.allclose, step(), want)):
                wrong.append(True)

    def switch():
        while not stop.is_set():
            with bnfast.torch.enabled():
                bnfast.torch.disable()

    threads = [threading.Thread(target=target) for target in (compute, compute, switch, switch)]
    _aten.forget_counts()
    for thread in threads:
        thread.start()
    try:
        for _ in range(2000):
            bnfast.torch.enable()
            bnfast.torch.disable()
            step()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        bnfast.torch.disable()
    ran, left = _aten.counts()
    assert not wrong
    assert ran["training"] > 0
    assert left.keys() == {"bnfast was not enabled"}


def test_backward_from_many_threads(calls):
    """Autograd runs each backward in the thread that called it."""
    wrong = []

    def step(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(32, 4, 9, generator=generator, requires_grad=True)
        for _ in range(100):
            (dx,) = torch.autograd.grad((F.batch_norm(x, None, None, training=True) ** 2).sum(), x)
            # y is as large as possible for any x: all but eps of the gradient cancels.
            if dx.abs().max() > 1e-3:
                wrong.append(seed)

    threads = [threading.Thread(target=step, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert calls() == ({"training": 400, "backward": 400}, {})


def ask(code, **environ):
    done = run_python(textwrap.dedent(code), **environ)
    assert done.returncode == 0, done.stderr
    return done


def test_no_output_on_stderr():
    done = ask(
        """
        import warnings
        warnings.simplefilter("error")
        import torch, bnfast.torch
        for _ in range(2):
            bnfast.torch.enable()
            torch.nn.BatchNorm1d(3)(torch.randn(4, 3))
            bnfast.torch.disable()
            torch.nn.BatchNorm1d(3)(torch.randn(4, 3))
        """
    )
    assert done.stdout == done.stderr == ""


def test_importing_bnfast_imports_neither_torch_nor_the_kernels():
    ask(
        """
        import sys, bnfast
        assert not any(name.startswith(("torch", "bnfast.torch")) for name in sys.modules)
        """
    )


@pytest.mark.parametrize("way", ["convert(torch.nn.BatchNorm1d(3))", "BatchNorm1d(3)"])
def test_kernels_registered_by_convert_not_by_import(way):
    ask(
        f"""
        import torch, bnfast.torch
        torch.nn.BatchNorm1d(3)(torch.randn(4, 3))
        assert bnfast.torch.report() == bnfast.torch.Activity({{}}, {{}})
        layer = bnfast.torch.{way}
        torch.nn.BatchNorm1d(3)(torch.randn(4, 3))
        layer(torch.randn(4, 3))
        assert bnfast.torch.report() == bnfast.torch.Activity(
            {{"training": 1}}, {{"bnfast was not enabled": 1}}
        )
        """
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_large_tensors_run_here(training, last, calls):
    x = torch.randn(8, 64, 64, 64)
    x = x.to(memory_format=torch.channels_last) if last else x
    F.batch_norm(x, torch.zeros(64), torch.ones(64), training=training)
    assert calls() == ({"training" if training else "evaluation": 1}, {})


def test_kernels_after_subinterpreter_ends():
    """The kernels do not depend on the interpreter. (PyTorch refuses a backward after that.)"""
    ask(
        """
        import importlib, sys, torch, bnfast.torch
        name = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
        interpreters = importlib.import_module(name)
        bnfast.torch.enable()
        norm, x = torch.nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5, requires_grad=True)
        for _ in range(3):
            other = interpreters.create()
            y = norm(x)
            interpreters.run_string(other, "x = sum(range(1000))")
            interpreters.destroy(other)
            assert torch.equal(norm(x), y)
        assert bnfast.torch.report().ran == {"training": 6}
        """
    )


@pytest.mark.parametrize(("asked", "answer"), [("1", True), ("0", False), ("", False)])
def test_environment_variable_enables(asked, answer):
    done = ask("import bnfast.torch as t; print(t.is_enabled())", BNFAST_TORCH=asked)
    assert done.stdout.strip() == str(answer)


def test_importing_does_not_import_dynamo():
    """Importing Dynamo takes more than a second."""
    ask("import sys, bnfast.torch; assert 'torch._dynamo' not in sys.modules")


def test_invalid_environment_variable_raises():
    done = run_python("import bnfast.torch", BNFAST_TORCH="yes")
    assert "ValueError: BNFAST_TORCH is 'yes'; expected 1 or 0" in done.stderr


def test_an_older_pytorch_is_refused():
    done = run_python(
        "import torch; torch.__version__ = '2.12.1+cpu'; import bnfast.torch\n"
        "bnfast.torch.convert(torch.nn.BatchNorm1d(3)); bnfast.torch.enable()"
    )
    assert "ImportError: PyTorch is 2.12.1+cpu; bnfast.torch needs 2.13" in done.stderr


def test_a_missing_function_is_named():
    done = run_python(
        "from bnfast.torch import _aten; import ctypes; ctypes.CDLL('libc.so.6')\n"
        "_aten.install('libc.so.6', '9.9')"
    )
    assert (
        "ImportError: PyTorch 9.9 has no aoti_torch_library_init_impl, which bnfast's kernels need"
    ) in done.stderr


RUNNER = """
import sys, torch, bnfast.torch
assert __name__ == "__main__"
torch.nn.BatchNorm1d(3)(torch.randn(4, 3))
import beside
print(sys.argv[1:], bnfast.torch.report().ran, sys.argv[0] == __file__, beside.VALUE)
"""


def test_a_script_runs_enabled(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RUNNER, encoding="utf-8")
    (tmp_path / "beside.py").write_text("VALUE = 7", encoding="utf-8")
    done = ask(
        f"""
        import subprocess, sys
        sys.exit(subprocess.run([sys.executable, "-m", "bnfast.torch", {str(script)!r}, "-a", "b"]
                 ).returncode)
        """
    )
    assert done.stdout.strip() == "['-a', 'b'] {'training': 1} True 7"
    assert done.stderr == ""


def test_runner_without_script_fails():
    done = run_python("import runpy, sys; sys.argv = ['x']; runpy.run_module('bnfast.torch')")
    assert done.returncode == 0  # nothing is run if it is not the main module
    done = run_python(
        "import subprocess, sys\n"
        "sys.exit(subprocess.run([sys.executable, '-m', 'bnfast.torch']).returncode)"
    )
    assert done.returncode == 1
    assert "usage: python -m bnfast.torch script.py" in done.stderr


FORK = """
import os, signal, torch, bnfast.torch
torch.set_num_threads(2)
bnfast.torch.enable()
x = torch.randn(16, 64, 56, 56)

def compute():
    leaf = x.clone().requires_grad_()
    y = torch.nn.functional.batch_norm(leaf, None, None, training=True)
    return torch.autograd.grad(y.square().sum(), leaf)[0].double().sum().item()

{before}
read, write = os.pipe()
if os.fork() == 0:
    signal.alarm(60)  # a hanging child ends itself, and its parent reads nothing
    torch.set_num_threads(1)  # as DataLoader's workers do
    os.write(write, repr(compute()).encode())
    os._exit(0)
os.close(write)
print(os.read(read, 1000).decode())
os.wait()
print(compute())
"""


def test_same_number_of_threads_as_pytorch():
    ask(
        """
        import torch, bnfast.torch
        from bnfast import _core
        bnfast.torch.enable()
        norm, x = torch.nn.BatchNorm2d(64), torch.randn(16, 64, 56, 56)
        torch.set_num_threads(1)
        norm(x)
        assert not _core.pool_started()
        torch.set_num_threads(2)
        norm(x)
        assert _core.pool_started()
        """
    )


@needs_fork
@pytest.mark.parametrize("before", ["compute()", ""], ids=["after parallel work", "before it"])
def test_a_forked_child_computes(before):
    done = ask(FORK.format(before=before), PYTHONWARNINGS="ignore")
    child, parent = map(float, done.stdout.split())
    assert child == pytest.approx(parent, abs=1e-3)


LOADER = """
import torch, bnfast.torch
bnfast.torch.enable()
torch.set_num_threads(2)
norm = torch.nn.BatchNorm2d(64)
norm(torch.randn(16, 64, 56, 56))

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        norm(torch.randn(4, 64, 28, 28))
        return torch.tensor(bnfast.torch.report().ran["training"])

if __name__ == "__main__":
    for batch in torch.utils.data.DataLoader(Data(), 2, num_workers=2, timeout=40):
        print(batch.tolist())
"""


@needs_fork
@pytest.mark.skipif(sys.platform != "linux", reason="DataLoader forks on Linux")
def test_data_loader_workers():
    done = ask(LOADER, PYTHONWARNINGS="ignore")
    assert done.stdout.split("\n")[:2] == ["[2, 3]", "[2, 3]"]
