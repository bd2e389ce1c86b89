"""Layers for the tests, with a problem's parameters, and all that a call may change."""

import numpy as np
from cases import bits

from bnfast import BatchNorm

SHAPE = (6, 5, 3, 4)
STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def layer_of(p, **options):
    """A layer with the problem's parameters."""
    layer = BatchNorm(
        p.channels, p.eps, axis=p.axis, activation=p.activation, dtype=p.weight.dtype, **options
    )
    layer.weight[:], layer.bias[:] = p.weight, p.bias
    return layer


def state_bits(layer):
    """Everything that a call may change."""
    names = (*STATE, "weight_grad", "bias_grad")
    return {n: None if getattr(layer, n) is None else bits(getattr(layer, n)) for n in names}


def trained(p, **options):
    """A layer after one training step, so that no attribute has its initial value."""
    layer = layer_of(p, **options)
    call(layer, p)
    layer.backward(p.dy)
    return layer


def call(layer, p, **more):
    return layer(p.x, residual=p.residual, **more)


def trained_gradients(p):
    layer = layer_of(p)
    call(layer, p)
    return layer.backward(p.dy)


def junk_like(a, kind):
    """An array for the place of `a`, which cannot be written as `a` can."""
    if kind == "list":
        return a.tolist()
    made = {
        "read-only": a.copy,
        "shape": lambda: np.zeros(6, a.dtype),
        "type": lambda: a.astype(complex),
    }[kind]()
    made.flags.writeable = kind != "read-only"
    return made
