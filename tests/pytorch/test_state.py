"""Layers whose tensors are replaced, shared, freed or of unusual types, compared with PyTorch's."""

import copy
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cases import by_direction
from layers import ours_like
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import bnfast.torch

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def forward_of(training):
    return "forward" if training else "inference"


def pair(channels=3, training=True):
    """PyTorch's layer and ours, in the same state without special values."""
    theirs = nn.BatchNorm2d(channels).train(training)
    with torch.no_grad():
        for tensor in (theirs.weight, theirs.bias, theirs.running_mean):
            tensor.normal_()
        theirs.running_var.uniform_(0.5, 2)
    return theirs, ours_like(theirs)


def batch(channels=3):
    return torch.randn(4, channels, 5, 5, generator=torch.Generator().manual_seed(0))


def loss(y):
    """Not symmetric: the gradient of a sum of squares, for example, is only rounding errors."""
    return (y * batch(y.shape[1]).roll(1, 0)).sum()


def outcome(call, *args):
    """Return what a call returns, or the kind and the text of what it raises."""
    try:
        return call(*args)
    except Exception as error:  # noqa: BLE001, whatever PyTorch raises
        return type(error), str(error)


def check_alike(theirs, ours, x, ran, on_bnfast, **tolerance):
    """Compare one forward, or one error, and the state after it."""
    want, before = outcome(theirs, x), copy.deepcopy(ours.state_dict())
    ran()
    got = outcome(ours, x)
    assert bool(ran()) == on_bnfast
    if isinstance(want, tuple):
        assert got == want  # and nothing has changed, even if PyTorch's layer may have counted
        torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(got, want, equal_nan=True, **tolerance)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), equal_nan=True)
    return want


def check_step(theirs, ours, ran, training=True, on_bnfast=True):
    """The same for a forward and a backward."""
    found = []
    for layer in (theirs, ours):
        x = batch().requires_grad_()
        ran()
        y = layer(x)
        loss(y).backward()
        found.append((y, x.grad, [p.grad for p in layer.parameters()], layer.state_dict()))
    assert by_direction(ran()) == ({forward_of(training): 1, "backward": 1} if on_bnfast else {})
    torch.testing.assert_close(found[1], found[0], equal_nan=True)


# ---- Replaced tensors


@TRAINING
def test_functional_call_uses_given_tensors(training, ran):
    layers = pair(training=training)
    given = {"weight": torch.full((3,), 5.0), "running_mean": torch.ones(3)}
    states = [{name: t.clone() for name, t in given.items()} for _ in layers]
    want, got = (functional_call(m, s, (batch(),)) for m, s in zip(layers, states, strict=True))
    assert by_direction(ran()) == {forward_of(training): 1}
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*states)
    assert training != torch.equal(states[1]["running_mean"], given["running_mean"])


REPLACEMENTS = {
    "running_mean": lambda m: setattr(m, "running_mean", torch.arange(3.0)),
    "weight.data": lambda m: setattr(m.weight, "data", torch.arange(3.0)),
    "a weight with gaps": lambda m: setattr(m.weight, "data", torch.arange(12.0)[::4]),
    "a running_var with gaps": lambda m: setattr(m, "running_var", torch.arange(1.0, 13)[::4]),
    "a negative running_var": lambda m: setattr(m, "running_var", -torch.ones(3)),
    "no weight": lambda m: setattr(m, "weight", None),
    "no bias": lambda m: setattr(m, "bias", None),
    "no running statistics": lambda m: (m.register_buffer("running_mean", None),
                                        m.register_buffer("running_var", None)),
    "memory format": lambda m: m.to(memory_format=torch.channels_last),
    "shared memory": lambda m: m.share_memory(),
    "a frozen weight": lambda m: m.weight.requires_grad_(False),
    "a weight that is no parameter": lambda m: (delattr(m, "weight"),
                                                setattr(m, "weight", torch.arange(3.0))),
}  # fmt: skip


@TRAINING
@pytest.mark.parametrize("name", REPLACEMENTS)
def test_replaced(name, training, ran):
    layers = pair(training=training)
    for layer in layers:
        layer(batch())  # the old tensors must be forgotten
        REPLACEMENTS[name](layer)
    of_batch = training or name == "no running statistics"
    check_step(*layers, ran, of_batch, on_bnfast="gaps" not in name)


def test_parametrized(ran):
    class Squared(nn.Module):
        def forward(self, weight):
            return weight.square()

    theirs, ours = pair()
    for layer in (theirs, ours):
        parametrize.register_parametrization(layer, "weight", Squared())
    check_step(theirs, ours, ran)
    assert bnfast.torch.report(ours).converted == ("(model)",)
    parametrize.remove_parametrizations(ours, "weight")
    assert type(ours) is bnfast.torch.BatchNorm2d


def test_replicas_share_statistics(ran):
    """As `nn.DataParallel` makes them: parameters are plain attributes."""
    theirs, ours = pair()
    replicas = []
    for layer in (theirs, ours):
        replica = layer._replicate_for_data_parallel()
        for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
            setattr(replica, name, tensor * 1 if name in layer._parameters else tensor)
        replicas.append(replica)
    want, got = (replica(batch()) for replica in replicas)
    assert by_direction(ran()) == {"forward": 1}
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@TRAINING
def test_running_statistics_have_no_gradient(training, ran):
    """PyTorch refuses that; without an error, they would silently not be learnt."""
    layers = pair(training=training)
    for layer in layers:
        del layer.running_mean
        layer.running_mean = nn.Parameter(torch.zeros(3))
    assert "not differentiable" in check_alike(*layers, batch(), ran, False)[1]


# ---- Types of tensors and options


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@TRAINING
@pytest.mark.parametrize("parameters", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32, torch.complex64], ids=str)
def test_every_pair_of_types(dtype, parameters, training, ran):
    theirs, ours = (layer.to(parameters) for layer in pair(training=training))
    half = dtype in (torch.float16, torch.bfloat16)
    on_bnfast = dtype in DTYPES and (parameters is dtype or (half and parameters is torch.float32))
    # PyTorch rounds statistics to halves before it uses them if the parameters are halves.
    eps = torch.finfo(dtype).eps if half else None
    tolerance = {"rtol": eps, "atol": 2 * eps} if half else {}
    check_alike(theirs, ours, (3 * batch()).to(dtype), ran, on_bnfast, **tolerance)


@TRAINING
@pytest.mark.parametrize(
    "eps", [1, 0, 0.1, 0.0, -1.0, float("nan"), np.float64(0.1), np.float32(0.1)]
)
def test_every_eps(eps, training, ran):
    """PyTorch decides which are valid."""
    layers = pair(training=training)
    for layer in layers:
        layer.eps = eps
    refused = isinstance(outcome(copy.deepcopy(layers[0]), batch()), tuple)
    check_alike(*layers, batch(), ran, not refused)


@pytest.mark.parametrize("momentum", [1, 0, True, np.float32(0.5), torch.tensor(0.3), -0.5, 2.0])
def test_every_momentum(momentum, ran):
    layers = pair()
    for layer in layers:
        layer.momentum = momentum
    check_alike(*layers, batch(), ran, True)


@TRAINING
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_one_of_two_running_statistics(missing, training, ran):
    layers = pair(training=training)
    for layer in layers:
        setattr(layer, missing, None)
    check_alike(*layers, batch(), ran, False)


@pytest.mark.parametrize("given", [None, 3, [1.0], np.ones((4, 3, 5, 5))], ids=repr)
def test_not_a_tensor(given, ran):
    check_alike(*pair(), given, ran, False)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_mkldnn(),
        lambda x: torch._efficientzerotensor(x.shape),
        lambda x: x[:, :2],
    ],
    ids=["sparse", "mkldnn", "symbolic zeros", "channels"],
)
def test_other_tensors(arrange):
    theirs, ours = pair(training=False)
    want, got = (outcome(layer, arrange(batch())) for layer in (theirs, ours))
    if isinstance(want, tuple):
        assert got == want
    else:
        torch.testing.assert_close(got.to_dense(), want.to_dense())


# ---- Memory


def test_storages_stay_resizable(ran):
    """Frameworks that shard or offload free tensors by resizing their storages."""
    _, ours = pair()
    x = batch()
    ours(x)
    assert ran()
    for tensor in (x, ours.weight, ours.running_mean):
        tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("name", ["weight", "running_mean"])
def test_freed_memory_is_not_read(name, ran):
    _, ours = pair(training=False)
    getattr(ours, name).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="not allocated"):
        ours(batch())
    assert not ran()


# Free one tensor that a backward needs; first in PyTorch's layer, which gives the expected result.
FREED = """
import sys
import torch, bnfast.torch
name, training = sys.argv[1], sys.argv[2] == "True"
for kind in (torch.nn.BatchNorm2d, bnfast.torch.BatchNorm2d):
    layer = kind(3).train(training)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    given = x * 1
    y = layer(given)
    freed = given if name == "x" else layer.weight
    freed.untyped_storage().resize_(0)
    print("freed", flush=True)
    try:
        y.backward(torch.ones_like(y))
    except RuntimeError as error:
        print("not allocated" in str(error), flush=True)
"""


@TRAINING
@pytest.mark.parametrize("name", ["x", "weight"])
def test_memory_freed_before_the_backward_is_not_read(name, training):
    """In a separate process, which may crash."""
    command = [sys.executable, "-c", FREED, name, str(training)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    expected = "freed\nTrue\n"
    if not done.stdout.startswith(expected + "freed\n"):
        pytest.fail(f"the program itself failed: {done.stderr}")
    assert done.returncode == 0
    assert done.stdout == 2 * expected


# ---- Modes


PLACES = {"normal": torch.enable_grad, "inference": torch.inference_mode}


@TRAINING
@pytest.mark.parametrize("call_in", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("x_from", PLACES)
@pytest.mark.parametrize("layer_from", PLACES)
def test_tensors_of_inference_mode(layer_from, x_from, call_in, training, ran):
    """Also compares what PyTorch refuses, and checks that a refused batch changes nothing."""
    with PLACES[layer_from]():
        layers = pair(training=training)
    with PLACES[x_from]():
        x = batch()
    found = []
    for layer in layers:
        ran()
        with call_in():
            found.append(outcome(layer, x))
    want, got = found
    if isinstance(want, tuple):
        assert got == want
    else:
        assert by_direction(ran()) == {forward_of(training): 1}
        torch.testing.assert_close(got.detach(), want.detach())
        assert (got.requires_grad, got.is_inference()) == (want.requires_grad, want.is_inference())
        torch.testing.assert_close(layers[1].state_dict(), layers[0].state_dict())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_count_as_pytorch(reentrant, ran):
    """Twice for each batch, also if the recomputation ends as soon as all is saved again."""
    theirs, ours = pair()
    gradients = []
    for layer in (theirs, ours):
        x = batch().requires_grad_()
        loss(checkpoint(layer, x, use_reentrant=reentrant)).backward()
        gradients.append(x.grad)
    assert by_direction(ran()) == {"forward": 2, "backward": 1}
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert ours.num_batches_tracked == 2


def test_saved_tensors_may_be_offloaded(ran):
    theirs, ours = pair()
    gradients = []
    for layer in (theirs, ours):
        x = batch().requires_grad_()
        with torch.autograd.graph.save_on_cpu():
            y = layer(x)
        loss(y).backward()
        gradients.append(x.grad)
    assert by_direction(ran()) == {"forward": 1, "backward": 1}
    torch.testing.assert_close(*gradients)


def test_retained_graphs_and_changed_outputs(ran):
    theirs, ours = pair()
    gradients = []
    for layer in (theirs, ours):
        x = batch().requires_grad_()
        y = layer(x)
        y[:, 0] = 0
        y.mul_(2).relu_()
        total = loss(y)
        total.backward(retain_graph=True)
        total.backward()
        gradients.append(x.grad)
    assert by_direction(ran()) == {"forward": 1, "backward": 2}
    torch.testing.assert_close(*gradients)


# ---- Files, threads, averaging


def test_a_whole_layer_loads_as_weights_only(ran):
    _, ours = pair(training=False)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    with torch.serialization.safe_globals([type(ours)]):
        loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded(batch()), ours(batch()))
    assert by_direction(ran()) == {"inference": 2}


def test_update_bn_of_averaged_models(ran):
    theirs, ours = (nn.Sequential(layer) for layer in pair())
    batches = [batch() + i for i in range(3)]
    for model in (theirs, ours):
        update_bn(batches, model)
    assert by_direction(ran()) == {"forward": 3}
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@TRAINING
def test_many_threads(training, ran):
    """One layer in evaluation, and one layer per thread in training."""
    theirs, ours = pair(16, training)
    x = torch.randn(8, 16, 14, 14)
    want = theirs(x)

    def work(_):
        layer = copy.deepcopy(ours) if training else ours
        for _ in range(20):
            torch.testing.assert_close(layer(x), want)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert by_direction(ran()) == {forward_of(training): 160}
