"""The scenarios with NumPy arrays in which one rank, the first or the last, fails."""

import sys
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
from launch import Raised, interrupted_soon

import bnfast
from bnfast.distributed import Merging, SyncBatchNorm, all_reduce

MOMENTUM = 0.3
UNWRITTEN = 7.0


def rows(rank, batch=0):
    """A rank's part of a batch."""
    return (np.arange(12, dtype=np.float32).reshape(4, 3) + 1 + rank) ** 2 / np.float32(batch + 1)


def gradient(rank):
    """The gradient of a rank's output."""
    return np.cos(rows(rank))


def ranks_at_fault(this):
    return (0, this.size - 1)


def tried(call, *args, **options):
    """Return what a call returns, or any exception that it raised."""
    try:
        return call(*args, **options)
    except BaseException as error:  # noqa: BLE001  # the tests compare it
        return Raised(type(error).__name__, str(error))


class Odd:
    """An argument whose Python code raises."""

    def __init__(self, error):
        self.error = error

    def _raise(self, *_, **__):
        raise self.error

    __float__ = __index__ = __bool__ = __array__ = _raise


class Once:
    """An argument that can be read only once."""

    def __init__(self, value):
        self.value, self.read = value, False

    def _answer(self):
        assert not self.read, "read twice"
        self.read = True
        return self.value

    def __float__(self):
        return float(self._answer())

    def __index__(self):
        return int(self._answer())

    def __bool__(self):
        return bool(self._answer())

    def __array__(self, dtype=None, copy=None):
        return np.array(self._answer())


class Interrupting:
    """An array that starts an interrupt of the call when it is read."""

    def __init__(self, array, start):
        self.array, self.start = array, start

    def __array__(self, dtype=None, copy=None):
        self.start()
        return self.array


def read_only(a):
    a.flags.writeable = False
    return a


def attribute(name, value):
    """Replace an attribute of the layer."""
    return lambda layer, call: setattr(layer, name, value)


def argument(name, value):
    """Pass another argument."""
    return lambda layer, call: call.update({name: value})


def overlapping(layer, call):
    memory = np.zeros(5, np.float32)
    layer.running_mean, layer.running_var = memory[:3], memory[2:]


def an_input_of_the_statistics(layer, call):
    call["x"] = np.stack([layer.running_mean] * 4)
    layer.running_mean = call["x"][0]


# A change of the layer and its call, and the error of the rank that makes it.
FORWARD = {
    "weight's shape": (attribute("weight", np.ones(2, np.float32)), "ValueError: weight has shape"),
    "weight's dtype": (attribute("weight", np.ones(3, int)), "TypeError: weight has dtype int64"),
    "weight's kind": (attribute("weight", "ones"), "TypeError: weight has dtype"),
    "masked weight": (attribute("weight", np.ma.ones(3)), "TypeError: weight is a masked array"),
    "bias' shape": (attribute("bias", np.ones((3, 1))), "ValueError: bias has shape"),
    "bias interrupts": (attribute("bias", Odd(KeyboardInterrupt())), "KeyboardInterrupt: "),
    "mean's shape": (attribute("running_mean", np.ones(2)), "ValueError: running_mean has shape"),
    "mean's dtype": (attribute("running_mean", np.ones(3)), "TypeError: running_mean has dtype"),
    "mean's kind": (attribute("running_mean", [0.0] * 3), "TypeError: running_mean is [0.0"),
    "no variance": (attribute("running_var", None), "TypeError: running_var is None"),
    "read-only variance": (
        attribute("running_var", read_only(np.ones(3, np.float32))),
        "ValueError: running_var is read-only",
    ),
    "statistics that overlap": (overlapping, "ValueError: running_mean overlaps"),
    "statistics in the input": (an_input_of_the_statistics, "ValueError: running_mean overlaps"),
    "a full counter": (
        attribute("num_batches_tracked", np.array(2**63 - 1)),
        "ValueError: num_batches_tracked is 9223372036854775807",
    ),
    "counter's dtype": (
        attribute("num_batches_tracked", np.zeros((), np.int32)),
        "TypeError: num_batches_tracked is",
    ),
    "read-only counter": (
        attribute("num_batches_tracked", read_only(np.array(0))),
        "ValueError: num_batches_tracked is read-only",
    ),
    "no counter for the average": (
        lambda layer, call: vars(layer).update(momentum=None, num_batches_tracked=None),
        "TypeError: num_batches_tracked is None",
    ),
    "momentum's type": (attribute("momentum", "0.1"), "TypeError: momentum is '0.1'"),
    "momentum": (attribute("momentum", np.nan), "ValueError: momentum is nan"),
    "momentum interrupts": (attribute("momentum", Odd(SystemExit(3))), "SystemExit: 3"),
    "eps": (attribute("eps", 0.0), "ValueError: eps is 0.0"),
    "eps' type": (attribute("eps", "small"), "TypeError: eps is 'small'"),
    "axis": (attribute("axis", 2), "ValueError: axis is 2"),
    "axis' type": (attribute("axis", 1.0), "TypeError: axis is 1.0"),
    "ddof": (attribute("ddof", 2), "ValueError: ddof is 2"),
    "channels": (attribute("num_features", 4), "ValueError: x has shape (4, 3)"),
    "channels' type": (attribute("num_features", None), "TypeError: num_features is None"),
    "activation": (attribute("activation", "mish"), "ValueError: activation is 'mish'"),
    "slope": (attribute("activation", ("leaky_relu", 2)), "ValueError: activation slope is 2"),
    "tracking": (
        attribute("track_running_stats", Odd(ZeroDivisionError())),
        "TypeError: track_running_stats is",
    ),
    "update_stats": (
        argument("update_stats", Odd(ZeroDivisionError())),
        "TypeError: update_stats is",
    ),
    "input's dtype": (argument("x", np.ones((4, 3), int)), "TypeError: x has dtype int64"),
    "input's channels": (argument("x", np.ones((4, 2), np.float32)), "ValueError: x has shape"),
    "input interrupts": (argument("x", Odd(KeyboardInterrupt("no"))), "KeyboardInterrupt: no"),
    "residual's shape": (
        argument("residual", np.ones((3, 3), np.float32)),
        "ValueError: residual has shape",
    ),
    "residual's kind": (
        argument("residual", np.ma.ones((4, 3))),
        "TypeError: residual is a masked",
    ),
    "out's kind": (argument("out", [0.0]), "TypeError: out is [0.0]"),
    "mask's shape": (argument("mask", np.ones((4, 3))), "ValueError: mask has shape (4, 3)"),
    "mask's dtype": (argument("mask", np.ones(4, int)), "TypeError: mask has dtype int64"),
    "masked mask": (argument("mask", np.ma.ones(4)), "TypeError: mask is a masked array"),
    "negative weight": (argument("mask", -np.ones(4)), "ValueError: mask has a weight of -1"),
    "mask interrupts": (argument("mask", Odd(KeyboardInterrupt())), "KeyboardInterrupt: "),
    "virtual batches": (attribute("virtual_batch_size", 2), "RuntimeError: virtual_batch_size is"),
    "read-only out": (
        argument("out", read_only(np.ones((4, 3), np.float32))),
        "ValueError: out of shape (4, 3) is read-only",
    ),
    "out over the weight": (
        lambda layer, call: (
            call.update(out=np.ones((4, 3), np.float32)[:])
            or setattr(layer, "weight", call["out"][1])
        ),
        "ValueError: out overlaps weight",
    ),
}

BACKWARD = {
    "no dy": (argument("dy", None), "TypeError: dy is None"),
    "dy's shape": (argument("dy", np.ones((3, 3), np.float32)), "ValueError: dy has shape (3, 3)"),
    "dy's dtype": (argument("dy", np.ones((4, 3))), "TypeError: dy has dtype float64"),
    "dy interrupts": (argument("dy", Odd(KeyboardInterrupt("no"))), "KeyboardInterrupt: no"),
    "weight's shape": (attribute("weight", np.ones(2, np.float32)), "ValueError: weight has shape"),
    "bias' dtype": (attribute("bias", np.ones(3, complex)), "TypeError: bias has dtype complex128"),
    "read-only gradient": (
        attribute("weight_grad", read_only(np.zeros(3, np.float32))),
        "ValueError: weight_grad is read-only",
    ),
    "no gradient": (attribute("bias_grad", None), "TypeError: bias_grad is None"),
    "gradient's shape": (attribute("bias_grad", np.ones(2)), "ValueError: bias_grad has shape"),
    "affine": (attribute("affine", Odd(ZeroDivisionError())), "TypeError: affine is"),
    "axis": (attribute("axis", -3), "ValueError: axis is -3"),
    "activation": (attribute("activation", "mish"), "ValueError: activation is 'mish'"),
    "activation of a lost residual": (
        attribute("activation", "relu"),
        "ValueError: needs names 'residual', but residual and y are None",
    ),
    "no forward": (
        lambda layer, call: layer.eval().train(),
        "RuntimeError: backward before a forward",
    ),
}

ALL_REDUCE = {
    "count": (lambda m: bnfast.Moments(2**64, m.mean, m.m2), "ValueError: moments.count is"),
    "count's type": (lambda m: setattr(m, "count", "4"), "TypeError: count is '4'"),
    "count below zero": (lambda m: setattr(m, "count", -1), "ValueError: count is -1"),
    "m2's length": (lambda m: setattr(m, "m2", np.zeros(5)), "ValueError: m2 has shape (5,)"),
    "m2 below zero": (lambda m: setattr(m, "m2", -m.m2), "ValueError: m2 is -"),
    "m2's dtype": (lambda m: setattr(m, "m2", m.m2 + 0j), "TypeError: m2 has dtype complex128"),
    "no m2": (lambda m: delattr(m, "m2"), "AttributeError: "),
    "mean's shape": (lambda m: setattr(m, "mean", np.eye(3)), "ValueError: mean has shape (3, 3)"),
    "no mean": (lambda m: setattr(m, "mean", None), "TypeError: mean has dtype object"),
    "no moments": (lambda m: "moments", "TypeError: moments is 'moments'"),
}


def snapshot(layer):
    grads = {name: getattr(layer, name) for name in ("weight_grad", "bias_grad")}
    return {name: np.array(a) for name, a in {**layer.state_dict(), **grads}.items()}


def unchanged(before, layer):
    return all(np.array_equal(before[name], a) for name, a in snapshot(layer).items())


def forward(this):
    """A refused call, then a good one."""
    found = {}
    for name, (spoil, _) in FORWARD.items():
        for bad in ranks_at_fault(this):
            layer = SyncBatchNorm(3, momentum=MOMENTUM, group=this.group)
            layer(rows(this.rank))
            attributes, before = dict(vars(layer)), snapshot(layer)
            out = np.full((4, 3), UNWRITTEN, np.float32)
            call = {"x": rows(this.rank, 1), "residual": rows(this.rank, 2), "out": out}
            if this.rank == bad:
                spoil(layer, call)
            raised = tried(layer, **call)
            vars(layer).update(attributes)
            same = unchanged(before, layer) and bool((out == UNWRITTEN).all())
            y = layer(rows(this.rank, 1), rows(this.rank, 2))
            found[name, bad] = raised, same, y, layer.state_dict()
    return found


def backward(this):
    """A refused backward, then a good one, and another step."""
    found = {}
    for name, (spoil, _) in BACKWARD.items():
        for bad in ranks_at_fault(this):
            layer = SyncBatchNorm(3, momentum=MOMENTUM, group=this.group)
            layer(rows(this.rank), rows(this.rank, 2))
            attributes, before = dict(vars(layer)), snapshot(layer)
            call = {"dy": gradient(this.rank)}
            if this.rank == bad:
                spoil(layer, call)
            raised = tried(layer.backward, **call)
            vars(layer).update(attributes)
            same = unchanged(before, layer)
            dx, dresidual = layer.backward(gradient(this.rank))
            grads = layer.weight_grad.copy(), layer.bias_grad.copy()
            layer(rows(this.rank, 1))
            found[name, bad] = raised, same, dx, dresidual, grads, layer.state_dict()
    return found


def overwritten_input(this):
    """One rank's forward leaves no input for a backward; the next step must work on all ranks."""
    found = {}
    for bad in ranks_at_fault(this):
        layer = SyncBatchNorm(3, group=this.group)
        x = rows(this.rank)
        layer(x, out=x if this.rank == bad else None)
        raised = tried(layer.backward, gradient(this.rank))
        untouched = not layer.weight_grad.any()
        layer(rows(this.rank))
        found[bad] = raised, untouched, layer.backward(gradient(this.rank))
    return found


def moments_of_all(this):
    """A refused `all_reduce`, then a good one."""
    found = {}
    for name, (spoil, _) in ALL_REDUCE.items():
        for bad in ranks_at_fault(this):
            mine = bnfast.moments(rows(this.rank))
            if this.rank == bad:
                mine = spoil(mine) or mine
            raised = tried(all_reduce, mine, this.group)
            found[name, bad] = raised, all_reduce(bnfast.moments(rows(this.rank)), this.group)
    return found


def too_many_values_together(this):
    """Each rank's count is valid, but the sum of all is not."""
    mine = bnfast.Moments(2**62, [0.0], [1.0])
    raised = tried(all_reduce, mine, this.group)
    most = bnfast.Moments((2**63 - 1) // this.size, [0.0], [1.0])
    return raised, all_reduce(most, this.group)


def options_read_once(this):
    """Options are read once, before the exchange, and their values are used after it."""
    layer = SyncBatchNorm(3, group=this.group)
    layer.eps, layer.momentum, layer.ddof = Once(0.5), Once(MOMENTUM), Once(0)
    layer.weight, layer.activation = Once([1.0, 2.0, 3.0]), ("leaky_relu", Once(0.25))
    y = layer(rows(this.rank), update_stats=Once(True))
    return y, layer.running_mean, layer.running_var


def numbers_that_raise(this):
    """np.errstate(all="raise") on one rank must not let the ranks differ."""
    found = {}
    for bad in ranks_at_fault(this):
        large = SyncBatchNorm(3, group=this.group)
        tiny = SyncBatchNorm(3, group=this.group, dtype=np.float64)
        x = rows(this.rank).astype(float) * 1e-160  # with a subnormal variance

        def strict(layer, x, bad=bad):
            with np.errstate(all="raise" if this.rank == bad else "warn"):
                return layer(x)

        y = strict(large, rows(this.rank) * np.float32(1e30))
        strict(tiny, x)
        bnfast.recompute_statistics(partial(strict, tiny), [x], [tiny])
        found[bad] = np.isfinite(y).all(), large.state_dict(), tiny.state_dict()
    return found


def types_that_differ(this):
    """Each rank's results and statistics have its own type."""
    dtype = np.float64 if this.rank == 0 else np.float32
    layer = SyncBatchNorm(3, group=this.group, dtype=dtype)
    x = rows(this.rank).astype(dtype)
    y = layer(x)
    return y, layer.backward(gradient(this.rank).astype(dtype)), layer.running_mean


def a_bad_batch_of_recomputing(this):
    found = {}
    for bad in ranks_at_fault(this):
        layer = SyncBatchNorm(3, group=this.group).eval()
        batches = [rows(this.rank), rows(this.rank, 1)]
        spoiled = [batches[0], batches[1][:, :2] if this.rank == bad else batches[1]]
        raised = tried(bnfast.recompute_statistics, layer, spoiled, [layer])
        same = not layer.running_mean.any() and not layer.training
        bnfast.recompute_statistics(layer, batches, [layer])
        found[bad] = raised, same, layer.state_dict()
    return found


@contextmanager
def memory_for(more):
    """Limit this process to so many bytes more than it has now."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def memory_that_runs_out(this):
    """One rank has no memory for the output, or for the gradient."""
    if sys.platform != "linux":
        return None
    found = {}
    for bad in ranks_at_fault(this):
        large = this.rank == bad
        x = np.ones((2**22 if large else 4, 4), np.float32)
        x[::2] = 3
        layer = SyncBatchNorm(4, group=this.group)
        with memory_for(2**25) if large else nullcontext():
            refused = tried(layer, x)
        same = not layer.running_mean.any() and layer.num_batches_tracked == 0
        layer(x)
        with memory_for(2**25) if large else nullcontext():
            refused_too = tried(layer.backward, x)
        untouched = not layer.weight_grad.any()
        x = rows(this.rank)[:, [0, 1, 2, 0]]
        y, dx = layer(x), layer.backward(gradient(this.rank)[:, [0, 1, 2, 0]])
        found[bad] = refused, same, refused_too, untouched, y[:, :3], dx[:, :3]
    return found


def interrupted(this):
    """A signal handler raises while one rank waits for the others."""
    found = {}
    for bad in ranks_at_fault(this):
        layer = SyncBatchNorm(3, momentum=MOMENTUM, group=this.group)
        x, dy = rows(this.rank), gradient(this.rank)
        with interrupted_soon(this, bad, "forward") as start:
            raised = tried(layer, Interrupting(x, start))
        after_one = layer.state_dict()
        layer(x)
        with interrupted_soon(this, bad, "backward") as start:
            raised_back = tried(layer.backward, Interrupting(dy, start))
        dx = layer.backward(dy)
        found[bad] = raised, after_one, layer.state_dict(), raised_back, dx
    return found


def interrupted_between_gathers(this):
    """The same after sizes were gathered and before numbers are."""
    found, agree = {}, Merging._disagreement
    for bad in ranks_at_fault(this):
        layer = SyncBatchNorm(3, momentum=MOMENTUM, group=this.group)
        with interrupted_soon(this, bad, "between") as start:
            starts = iter([start])  # only once: it is called again after an interrupt

            def first(exchange, starts=starts):
                for start in starts:
                    start()
                return agree(exchange)

            Merging._disagreement = first
            try:
                raised = tried(layer, rows(this.rank))
            finally:
                Merging._disagreement = agree
        after_one = layer.state_dict()
        layer(rows(this.rank))
        found[bad] = raised, after_one, layer.state_dict()
    return found


SCENARIOS = [
    forward,
    backward,
    overwritten_input,
    moments_of_all,
    too_many_values_together,
    options_read_once,
    numbers_that_raise,
    types_that_differ,
    a_bad_batch_of_recomputing,
    memory_that_runs_out,
    interrupted,
    interrupted_between_gathers,
]
