"""convert(fuse=True): what is merged, what is refused, and that nobody can tell the difference."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import by_direction
from layers import SmallResNet, channels_last, dense
from torch import nn

import bnfast.torch
from bnfast import _core


def fused(model):
    return bnfast.torch.convert(copy.deepcopy(model), fuse=True)


LAYOUTS = {dense: "planar", channels_last: "interleaved"}


def check_same(model, other, arrange=dense, args=(), calls=None, backwards=None):
    """Two programs of one formula, in float64, so that only mistakes are visible.

    All calls of batch norms in the other one, one a layer unless told, run on bnfast; backwards,
    too, unless told how many do.
    """
    calls = len(bnfast.torch.report(other).converted) if calls is None else calls
    backwards = calls if backwards is None else backwards
    x = arrange(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    for training in (True, False):
        ours, theirs = copy.deepcopy(other).double(), copy.deepcopy(model).double()
        results = []
        for m in (ours, theirs):
            torch.manual_seed(3)
            given = x.clone().requires_grad_()
            _core.reset_dispatches()
            y = m.train(training)(given, *args)
            y.pow(2).sum().backward()
            ran = {(d, t, y, v): n for (d, t, y, _, v), n in _core.dispatches().items()}
            want = {"forward" if training else "inference": calls, "backward": backwards}
            assert by_direction(ran) == {k: n for k, n in want.items() if n and m is ours}
            assert {layout for _, _, layout, _ in ran} <= {LAYOUTS[arrange]}
            results.append(
                (
                    y,
                    given.grad,
                    [p.grad for p in m.parameters() if p.grad is not None],
                    m.state_dict(),
                )
            )
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("arrange", [dense, channels_last])
def test_a_resnet(arrange, ran):
    model = SmallResNet()
    ours = fused(model)
    check_same(model, ours, arrange=arrange)
    ran()
    ours(arrange(torch.randn(4, 3, 8, 8))).sum().backward()
    layout = "planar" if arrange is dense else "interleaved"
    assert ran() == {
        (direction, "float32", layout, variant): times
        for direction in ("forward", "backward")
        for variant, times in (("plain", 1), ("relu", 3), ("relu+residual", 2))
    }
    report = bnfast.torch.report(ours)
    assert report.fused["blocks.1.bn2"] == "addition and relu"
    assert report.fused["stem.1"] == "relu"
    assert "blocks.1.downsample.1" not in report.fused


class Net(nn.Module):
    """A convolution, a batch norm, and a tail to be given."""

    def __init__(self, tail):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.tail = tail

    def forward(self, x):
        return self.tail(self, self.bn(self.conv(x)), x)


def add_in_place(a, b):
    a += b
    return a


VARIANTS = {
    None: "plain",
    "relu": "relu",
    "relu6": "relu6",
    "addition": "residual",
    "addition and relu": "relu+residual",
    **{f"('leaky_relu', {slope})": "leaky_relu" for slope in (0.01, 0.3, 0.2)},
}


@pytest.mark.parametrize(
    ("tail", "what"),
    [
        (lambda m, y, x: F.relu(y), "relu"),
        (lambda m, y, x: F.relu(y, inplace=True), "relu"),
        (lambda m, y, x: m.relu(y), "relu"),
        (lambda m, y, x: torch.relu(y), "relu"),
        (lambda m, y, x: y.relu_(), "relu"),
        (lambda m, y, x: F.relu6(y), "relu6"),
        (lambda m, y, x: F.leaky_relu(y), "('leaky_relu', 0.01)"),
        (lambda m, y, x: F.leaky_relu(y, negative_slope=0.3), "('leaky_relu', 0.3)"),
        (lambda m, y, x: F.leaky_relu(y, 0.2), "('leaky_relu', 0.2)"),
        (lambda m, y, x: y + x, "addition"),
        (lambda m, y, x: F.relu(y + x), "addition and relu"),
        (lambda m, y, x: F.relu(x + y), "addition and relu"),
        (lambda m, y, x: F.relu(add_in_place(y, x)), "addition and relu"),
        (lambda m, y, x: F.relu(torch.add(x, y)), "addition and relu"),
        (lambda m, y, x: F.relu(torch.add(y, x, alpha=1)), "addition and relu"),
        (lambda m, y, x: y.add_(x).relu(), "addition and relu"),
        (lambda m, y, x: y.sigmoid(), None),
        (lambda m, y, x: F.relu(y) + y, None),
        (lambda m, y, x: F.leaky_relu(y, -0.5), None),
        (lambda m, y, x: torch.add(y, x, alpha=2), None),
        (lambda m, y, x: y + y, None),
        (lambda m, y, x: y + 1, None),
    ],
)
def test_every_form(tail, what, ran):
    model = Net(tail)
    ours = fused(model)
    assert bnfast.torch.report(ours).fused.get("bn") == what
    check_same(model, ours)
    ran()
    ours(torch.randn(4, 3, 8, 8))
    assert {variant for *_, variant in ran()} == {VARIANTS[what]}


def test_refusals_say_why():
    used = bnfast.torch.report(fused(Net(lambda m, y, x: F.relu(y) + y)))
    assert "used elsewhere" in used.unfused["bn"]
    hooked = Net(lambda m, y, x: m.relu(y))
    hooked.bn.register_forward_hook(lambda *a: None)
    assert "hooks" in bnfast.torch.report(fused(hooked)).unfused["bn"]
    branching = Net(lambda m, y, x: F.relu(y) if x.sum() > 0 else y)
    report = bnfast.torch.report(fused(branching))
    assert "control flow" in report.unfused["(model)"]
    check_same(branching, fused(branching))


def copied_between(m, y, x):
    mean = m.bn.running_mean.clone()
    return F.relu(y) + mean.view(1, -1, 1, 1)


def called_again_between(m, y, x):
    z = m.bn(3 * x)
    return F.relu(y) + z.sigmoid()


@pytest.mark.parametrize(("tail", "calls"), [(copied_between, 1), (called_again_between, 2)])
def test_statistics_move_in_the_models_order(tail, calls):
    model = Net(tail)
    ours = fused(model)
    assert "statistics" in bnfast.torch.report(ours).unfused["bn"]
    check_same(model, ours, calls=calls)


def no_grad_tail(m, y, x):
    with torch.no_grad():
        z = F.relu(y)
    return z + x


def remembering_tail(m, y, x):
    m.last = F.relu(y)
    return m.last


@pytest.mark.parametrize("tail", [no_grad_tail, remembering_tail])
def test_what_a_graph_cannot_hold_is_refused(tail):
    model = Net(tail)
    ours = fused(model)
    assert not bnfast.torch.report(ours).fused
    assert "last" not in vars(ours)
    if tail is no_grad_tail:
        check_same(model, ours, backwards=0)


def test_modes_that_differ_run_as_they_are():
    def tail(m, y, x):
        y = F.relu(y)
        return F.dropout(y, 0.5, m.training) if m.training else y * 2

    model = Net(tail)
    check_same(model, fused(model))


def test_later_changes_are_seen(ran):
    model = SmallResNet()
    ours = fused(model).eval()
    x = torch.randn(2, 3, 8, 8)
    ours(x)
    seen = []
    handle = ours.blocks[0].relu.register_forward_hook(lambda *a: seen.append(1))
    ours(x)
    assert len(seen) == 2
    handle.remove()
    ours.stem = nn.Conv2d(3, 8, 3, padding=1)
    want = copy.deepcopy(ours)
    bnfast.torch.revert(want)
    ran()
    torch.testing.assert_close(ours(x), want(x))
    assert by_direction(ran()) == {"inference": 5}  # want is PyTorch's
    ours.blocks[0].eval()
    ours.blocks[1].train()
    want.load_state_dict(ours.state_dict())
    want.blocks[1].train()
    ran()
    torch.testing.assert_close(ours(x), want(x))
    assert by_direction(ran()) == {"inference": 2, "forward": 3}


def test_options_left_at_their_defaults():
    class Optional(Net):
        def forward(self, x, scale=None):
            y = F.relu(self.bn(self.conv(x)))
            return y if scale is None else y * scale

    model = Optional(None)
    ours = fused(model)
    assert bnfast.torch.report(ours).fused == {"bn": "relu"}
    check_same(model, ours)
    check_same(model, ours, args=(3,))


def test_copies_and_pickles_are_fused_and_reverting_gives_the_model_back(ran):
    ours = fused(SmallResNet())
    x = torch.randn(4, 3, 8, 8)
    want = copy.deepcopy(ours)(x)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        ran()
        assert torch.equal(copied(x), want)
        assert ("forward", "float32", "planar", "relu+residual") in ran()
        assert type(copied) is type(ours)
        assert isinstance(copied, SmallResNet)
    reverted = bnfast.torch.revert(ours)
    assert type(reverted) is SmallResNet
    ran()
    torch.testing.assert_close(reverted(x), want)
    assert not ran()
