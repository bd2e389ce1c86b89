"""Compare the results of ranks with one process on the whole batch, computed by the paper.

Also compare what they raised: the failing rank its own error, the others an error that names it.
"""

import numpy as np
import pytest
import reference
from cases import bits
from launch import Raised
from tolerance import (
    SECOND_ORDER,
    assert_within,
    backward_bounds,
    batch_statistics,
    forward_bound,
    moments_of,
    off_the_kinks,
    running_bound,
    unit,
)
from wide import wide


def check_outputs(p, of):
    exact = reference.forward(*p.exact())
    y = np.concatenate([rank["y"] for rank in of])
    assert_within(y, exact, forward_bound(p, batch_statistics(p.x, 1)), "y")


def check_gradients(p, of):
    s = batch_statistics(p.x, 1)
    given = p.dy.copy()
    off_the_kinks(p, s)
    assert bits(given) == bits(p.dy), "a tie at a kink: rounding decides the gradient there"
    exact = reference.backward(wide(p.dy), *p.exact())
    bounds = backward_bounds(p, s, exact)
    assert_within(np.concatenate([rank["dx"] for rank in of]), exact.x, bounds.x, "x")
    if p.residual is not None:
        dresidual = np.concatenate([rank["dresidual"] for rank in of])
        assert_within(dresidual, exact.residual, bounds.residual, "residual")
    for grad, want, bound in (
        ("weight_grad", exact.gamma, bounds.gamma),
        ("bias_grad", exact.beta, bounds.beta),
    ):
        local = [wide(rank[grad]) for rank in of]
        # Each rank's part was rounded to the parameter's type.
        stored = sum(unit(p.x.dtype) * np.abs(part) for part in local)
        assert_within(sum(local), want, bound + SECOND_ORDER * stored, grad)


def check_running_statistics(p, of, momentum):
    s = moments_of(p.x, 1)
    share = wide(p.m) / (p.m - 1)
    for key, old, new, error in (
        ("running_mean", 0, s.mean, s.mean_error),
        ("running_var", 1, s.var * share, s.var_error * float(share)),
    ):
        assert len({bits(rank[key]) for rank in of}) == 1
        want = reference.running_average(old, new, wide(momentum))
        bound = running_bound(old, new, error, momentum, p.x.dtype)
        assert_within(of[0][key], want, bound, key)
    assert all(rank["num_batches_tracked"] == 1 for rank in of)


# The rank that fails; the fixture `bad` gives its number.
AT_FAULT = pytest.mark.parametrize("at_fault", ["first", "last"])


def told(bad):
    return Raised("RuntimeError", f"rank {bad} could not take part; its own exception says why")


def check_raised(raised, bad, own):
    for rank, error in enumerate(raised):
        if rank == bad:
            assert f"{error.kind}: {error.text}".startswith(own)
        else:
            assert error == told(bad)


def check_interrupted(raised, bad):
    """Return whether the other ranks completed the call; check that all of them did, or none."""
    assert raised[bad] == Raised("TimeoutError", "time is up")
    others = [found for rank, found in enumerate(raised) if rank != bad]
    gone_on = not isinstance(others[0], Raised)
    assert all(not isinstance(one, Raised) if gone_on else one == told(bad) for one in others)
    return gone_on


def check_whole(parts, want):
    """Within a few roundings of terms as large as the largest."""
    got = np.concatenate(parts)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
