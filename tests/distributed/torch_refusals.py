"""The scenarios with PyTorch's tensors in which one rank, the first or the last, fails."""

import sys
from contextlib import nullcontext

import numpy as np
import torch
from launch import Raised, interrupted_soon
from numpy_refusals import MOMENTUM, Odd, gradient, memory_for, ranks_at_fault, rows, tried
from torch import nn

from bnfast.torch import SyncBatchNorm


def tensor(a):
    return torch.tensor(a)  # in memory of PyTorch's


def parameter(name, value):
    return lambda layer, call: setattr(layer, name, nn.Parameter(value))


def buffer(name, value):
    """Replace a buffer, made in any mode."""
    return lambda layer, call: layer._buffers.update({name: value})


def attribute(name, value):
    return lambda layer, call: setattr(layer, name, value)


def argument(name, value):
    return lambda layer, call: call.update({name: value})


def freed(layer, call):
    layer.weight = nn.Parameter(torch.ones(3))
    layer.weight.untyped_storage().resize_(0)


def freed_mask(layer, call):
    call["mask"] = torch.ones(4) > 0
    call["mask"].untyped_storage().resize_(0)


with torch.inference_mode():
    INFERRED, INFERRED_COUNT = torch.ones(3), torch.zeros((), dtype=torch.int64)
    INFERRED_INPUT = torch.ones(4, 3)

# A change of the layer and its call, and the error of the rank that makes it.
FORWARD = {
    "weight's shape": (parameter("weight", torch.ones(2)), "ValueError: weight has shape (2,)"),
    "weight's dtype": (parameter("weight", torch.ones(3).double()), "TypeError: weight has dtype"),
    "freed weight": (freed, "TypeError: weight is a Parameter"),
    "bias on another device": (
        parameter("bias", torch.ones(3, device="meta")),
        "TypeError: bias is a Parameter of torch.float32 on meta",
    ),
    "mean's shape": (buffer("running_mean", torch.ones(2)), "ValueError: running_mean has shape"),
    "mean of the inference mode": (
        buffer("running_mean", INFERRED),
        "RuntimeError: Inplace update to inference tensor",
    ),
    "variance without memory of its own": (
        buffer("running_var", torch.ones(1).expand(3)),
        "RuntimeError: unsupported operation",
    ),
    "counter of the inference mode": (
        buffer("num_batches_tracked", INFERRED_COUNT),
        "RuntimeError: Inplace update to inference tensor",
    ),
    "counter's dtype": (
        buffer("num_batches_tracked", torch.tensor(True)),
        "RuntimeError: result type Long can't be cast",
    ),
    "counter's shape": (
        lambda layer, call: (
            attribute("momentum", None)(layer, call),
            buffer("num_batches_tracked", torch.ones(2))(layer, call),
        ),
        "TypeError: momentum is",
    ),
    "momentum's type": (attribute("momentum", "0.1"), "TypeError: momentum is '0.1'"),
    "momentum": (attribute("momentum", np.inf), "ValueError: momentum is inf"),
    "eps": (attribute("eps", 0.0), "ValueError: eps is 0.0"),
    "eps interrupts": (attribute("eps", Odd(KeyboardInterrupt())), "KeyboardInterrupt: "),
    "channels": (attribute("num_features", 4), "ValueError: expected 4 channels"),
    "activation": (argument("activation", "mish"), "ValueError: activation is 'mish'"),
    "slope interrupts": (
        argument("activation", ("leaky_relu", Odd(KeyboardInterrupt()))),
        "KeyboardInterrupt: ",
    ),
    "no tensor": (argument("input", np.ones((4, 3))), "TypeError: input is an array of float64"),
    "nothing": (argument("input", None), "TypeError: input is None"),
    "input on another device": (
        argument("input", torch.ones((4, 3), device="meta")),
        "ValueError: SyncBatchNorm expected input tensor to be on GPU",
    ),
    "input's rank": (argument("input", torch.ones(3)), "ValueError: expected at least 2D input"),
    "input of the inference mode": (
        argument("input", INFERRED_INPUT),
        "RuntimeError: Inference tensors cannot be saved for backward",
    ),
    "residual's shape": (argument("residual", torch.ones(4, 2)), "ValueError: residual is of"),
    "mask's shape": (argument("mask", torch.ones(4, 3)), "ValueError: mask has shape (4, 3)"),
    "mask's dtype": (
        argument("mask", torch.ones(4).int()),
        "TypeError: mask has dtype torch.int32",
    ),
    "mask with a gradient": (
        argument("mask", torch.ones(4, requires_grad=True)),
        "ValueError: mask requires a gradient",
    ),
    "mask on another device": (
        argument("mask", torch.ones(4, device="meta")),
        "TypeError: mask is a Tensor of torch.float32 on meta",
    ),
    "freed mask": (freed_mask, "TypeError: mask is a Tensor"),
    "negative weight": (argument("mask", -torch.ones(4)), "ValueError: mask has a weight of -1"),
    "virtual batches": (attribute("virtual_batch_size", 2), "RuntimeError: virtual_batch_size is"),
    "no residual": (argument("residual", [1.0]), "TypeError: residual is [1.0] of type list"),
}


def changed(x, layer):
    """Overwrite the input."""
    with torch.no_grad():
        x.mul_(2)


def changed_weight(x, layer):
    with torch.no_grad():
        layer.weight.mul_(2)


BACKWARD = {
    "changed input": (changed, "RuntimeError: one of the variables needed for gradient"),
    "freed input": (
        lambda x, layer: x.untyped_storage().resize_(0),
        "RuntimeError: the input's memory was freed",
    ),
    "changed weight": (changed_weight, "RuntimeError: one of the variables needed for gradient"),
}


def state(layer):
    return {name: value.numpy().copy() for name, value in layer.state_dict().items()}


def made():
    return SyncBatchNorm(3, momentum=MOMENTUM)


def step(layer, this):
    """The results of a good step."""
    x = tensor(rows(this.rank)).requires_grad_()
    y = layer(x)
    y.backward(tensor(gradient(this.rank)))
    return y.detach().numpy(), x.grad.numpy(), state(layer)


def forward(this):
    """A refused call, then a good one."""
    found = {}
    for name, (spoil, _) in FORWARD.items():
        for bad in ranks_at_fault(this):
            layer = made()
            layer(tensor(rows(this.rank)))
            before, attributes = state(layer), dict(vars(layer))
            tensors = dict(layer._parameters), dict(layer._buffers)
            call = {"input": tensor(rows(this.rank, 1)), "residual": tensor(rows(this.rank, 2))}
            if this.rank == bad:
                spoil(layer, call)
            raised = tried(layer, **call)
            for name_of_new in vars(layer).keys() - attributes.keys():
                delattr(layer, name_of_new)
            vars(layer).update(attributes)
            for own, kept in zip((layer._parameters, layer._buffers), tensors, strict=True):
                own.update(kept)
            after = state(layer)
            same = all(np.array_equal(before[key], after[key]) for key in before)
            y = layer(tensor(rows(this.rank, 1)), tensor(rows(this.rank, 2)))
            found[name, bad] = raised, same, y.detach().numpy(), after, state(layer)
    return found


def backward(this):
    """A refused backward, then a good step."""
    found = {}
    for name, (spoil, _) in BACKWARD.items():
        for bad in ranks_at_fault(this):
            layer, x = made(), tensor(rows(this.rank)).requires_grad_()
            y = layer(x)
            if this.rank == bad:
                spoil(x, layer)
            raised = tried(y.backward, tensor(gradient(this.rank)))
            same = x.grad is None and layer.weight.grad is None
            found[name, bad] = raised, same, *step(made(), this)
    return found


def interrupt(_):
    raise KeyboardInterrupt


def nothing(t):
    return t


def hooks_that_raise(this):
    """Autograd's hooks run where it saves tensors, after the exchange, and where it reads them."""
    found = {}
    for bad in ranks_at_fault(this):
        given = tensor(gradient(this.rank))

        def kept_by(keep, read, bad=bad):
            """A forward whose tensors go through hooks on the failing rank."""
            hooks = (keep, read) if this.rank == bad else (nothing, nothing)
            layer, x = made(), tensor(rows(this.rank)).requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(*hooks):
                return tried(layer, x), state(layer)

        kept, after = kept_by(interrupt, nothing)
        read, _ = kept_by(nothing, interrupt)
        raised = kept if isinstance(kept, Raised) else None, tried(read.backward, given)
        found[bad] = *raised, after, *step(made(), this)
    return found


class Starting:
    """A number, or a hook, that starts something at its first use."""

    def __init__(self, start, number=None):
        self.starts, self.number = iter([start]), number

    def __float__(self):
        return self(self.number)

    def __call__(self, given):
        for start in self.starts:
            start()
        return given


def interrupted(this):
    """A signal handler raises while one rank waits for the others."""
    found = {}
    for bad in ranks_at_fault(this):
        layer, x = made(), tensor(rows(this.rank)).requires_grad_()
        with interrupted_soon(this, bad, "forward") as start:
            layer.eps = Starting(start, 1e-5)
            raised = tried(layer, x)
        after, layer.eps = state(layer), 1e-5
        with interrupted_soon(this, bad, "backward") as start:
            with torch.autograd.graph.saved_tensors_hooks(nothing, Starting(start)):
                y = layer(x)
            raised_back = tried(y.backward, tensor(gradient(this.rank)))
        found[bad] = raised, after, state(layer), raised_back, *step(made(), this)
    return found


def memory_that_runs_out(this):
    """One rank has no memory for the output, or for the gradient."""
    if sys.platform != "linux":
        return None
    found = {}
    for bad in ranks_at_fault(this):
        large = this.rank == bad
        x = torch.ones(2**22 if large else 4, 4)
        x[::2] = 3
        x.requires_grad_()
        layer = SyncBatchNorm(4)
        with memory_for(2**25) if large else nullcontext():
            refused = tried(layer, x)
        same = not layer.running_mean.any() and layer.num_batches_tracked == 0
        y = layer(x)
        dy = torch.ones_like(y)
        with memory_for(2**25) if large else nullcontext():
            refused_too = tried(y.backward, dy)
        found[bad] = refused, same, refused_too, x.grad is None, *step(made(), this)
    return found


SCENARIOS = [
    forward,
    backward,
    hooks_that_raise,
    interrupted,
    memory_that_runs_out,
]
