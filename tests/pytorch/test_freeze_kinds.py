"""`bnfast.torch.freeze`: other libraries' batch norms, and ways to export a model."""

import copy
import io
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from test_freeze_values import apart, trained
from torch import nn

from bnfast.torch import freeze, report


def of(library, kind):
    """Make a class look as if that library had defined it."""
    kind.__module__ = f"{library}.layers"
    return kind


class FrozenBatchNorm2d(nn.Module):
    """Like torchvision's and detectron2's: buffers only."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-3
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[None, :, None, None] + shift[None, :, None, None]


class BatchNormAct2d(nn.BatchNorm2d):
    """Like timm's: followed by dropout and an activation."""

    def __init__(self, channels, drop=None, act=None):
        super().__init__(channels)
        self.drop, self.act = drop or nn.Identity(), act or nn.Identity()

    def forward(self, x):
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )
        return self.act(self.drop(y))


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


KINDS = {
    "torchvision": (of("torchvision", FrozenBatchNorm2d), {}, nn.Identity),
    "timm": (of("timm", BatchNormAct2d), {}, nn.Identity),
    "timm, activation": (BatchNormAct2d, {"act": nn.SiLU()}, nn.SiLU),
    "timm, both": (BatchNormAct2d, {"act": nn.SiLU(), "drop": nn.Dropout()}, nn.Sequential),
    "timm, frozen": (of("timm", FrozenBatchNormAct2d), {}, nn.ReLU),
}


@pytest.mark.parametrize("name", KINDS)
def test_other_libraries_batch_norms(name):
    kind, options, stands_for_it = KINDS[name]
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), kind(4, **options), nn.Conv2d(4, 2, 1)))
    model = model.double()
    frozen = freeze(model, example=torch.randn(2, 3, 8, 8).double())
    assert report(frozen).folded == {"1": "0"}
    assert type(frozen[1]) is stands_for_it
    assert not any(m.training for m in frozen.modules())
    assert apart(model, frozen, torch.randn(1, 3, 5, 9).double()) < 1e-12


def test_activation_not_moved_after_next_layer():
    model = trained(nn.Sequential(BatchNormAct2d(3, act=nn.ReLU()), nn.Conv2d(3, 4, 1)))
    frozen = freeze(model, example=torch.randn(2, 3, 4, 4))
    assert report(frozen).left == {"0": "it has an activation or dropout behind it"}


def test_same_class_name_from_other_library_unknown():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.ones(4))

        def forward(self, x):
            return x * 7

    model = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d())
    frozen = freeze(model, example=torch.randn(2, 3, 8, 8))
    assert report(frozen).folded == report(frozen).left == {}
    assert len(list(frozen[1].buffers())) == 4


def test_transformers_frozen_batch_norm():
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    norm = detr.DetrFrozenBatchNorm2d(4)
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), norm)).double()
    frozen = freeze(model, example=torch.randn(2, 3, 8, 8).double())
    assert report(frozen).folded == {"1": "0"}


def test_a_scripted_part():
    part = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval())
    model = trained(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), part))
    frozen = freeze(model, example=torch.randn(2, 3, 8, 8))
    assert report(frozen).folded == {"1": "0"}
    assert report(frozen).left == {"2.1": "it is scripted"}


# ---- Without bnfast

MODEL = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(
                nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
            )
            self.head, self.bn = nn.Linear(4, 5), nn.BatchNorm1d(5)

        def forward(self, x):
            return self.bn(self.head(self.features(x).mean((2, 3))))
"""
LOAD = """
    import sys
    sys.modules["bnfast"] = None  # importing it is an ImportError
    import torch
    from torch import nn

    x, want = torch.load("data.pt")
    model = torch.load("model.pt", weights_only=False)
    assert type(model).__module__ == "net"
    assert type(model.features[3]) is nn.Identity
    torch.testing.assert_close(model(x), want)
    assert model._bnfast_frozen["folded"] == {"features.3": "features.2", "bn": "head"}
    program = torch.export.load("program.pt2").module()
    for rows in (x, x[:1]):
        torch.testing.assert_close(program(rows), model(rows))
    assert not [name for name in sys.modules if name.startswith("bnfast.")]
"""


def test_saved_models_load_without_bnfast(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(textwrap.dedent(MODEL))
    (tmp_path / "load.py").write_text(textwrap.dedent(LOAD))
    monkeypatch.syspath_prepend(tmp_path)
    import net

    from bnfast.torch import convert

    frozen = freeze(convert(trained(net.Net())))
    assert list(report(frozen).left) == ["features.0"]
    x = torch.randn(2, 3, 8, 8)
    torch.save(frozen, tmp_path / "model.pt")
    torch.save((x, frozen(x)), tmp_path / "data.pt")
    shapes = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(frozen, (x,), dynamic_shapes=(shapes,))
    torch.export.save(program, tmp_path / "program.pt2")
    done = subprocess.run(
        [sys.executable, "load.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_copies_and_pickles_keep_report():
    frozen = freeze(trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    saved = io.BytesIO()
    torch.save(frozen, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(frozen),
        pickle.loads(pickle.dumps(frozen)),
        torch.load(saved, weights_only=False),
    ):
        assert report(other) == report(frozen)
        assert report(other).folded == {"1": "0"}


class Own(nn.Sequential):
    """A class that is not PyTorch's."""


@pytest.mark.parametrize("kind", [nn.Sequential, Own])
def test_remaining_batch_norms_are_fused(kind):
    """By the backend, which pickles and copies do not have, and torch.export does not use."""

    def fused():
        return report().compiled.get("batch norm + relu", 0)

    torch._dynamo.reset()
    model = trained(kind(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)))
    frozen = freeze(model)
    x = torch.randn(2, 3, 8, 8)
    want, before = model(x), fused()
    torch.testing.assert_close(frozen(x), want)
    assert fused() == before + 1
    torch.testing.assert_close(torch.export.export(frozen, (x,)).module()(x), want)
    torch.testing.assert_close(copy.deepcopy(frozen)(x), want)
    torch.testing.assert_close(pickle.loads(pickle.dumps(frozen))(x), want)
    assert fused() == before + 1
    torch.testing.assert_close(torch.jit.trace(frozen, x)(x), want)
    torch.testing.assert_close(torch.compile(frozen, backend="aot_eager")(x), want)
