"""Every architecture on bnfast, in float64: the results of plain PyTorch, and all batch norms."""

import functools

import pytest
import totals
from architectures import ARCHITECTURES
from ways import FORMATS, MODES, WAYS, differences, laid_out, modes, plain, there, weights

# Warnings of these libraries and of their dependencies are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")
TABLE = totals.read()
CASES = [
    (name, form)
    for name, architecture in ARCHITECTURES.items()
    for form in FORMATS
    if form == "contiguous" or len(architecture.shape) > 3
]


@functools.lru_cache(maxsize=1)
def model_of(name, form):
    return laid_out(ARCHITECTURES[name].model(), ARCHITECTURES[name].input(), form)


@functools.lru_cache(maxsize=2)
def plain_outcome(name, form, training):
    return plain(*model_of(name, form), training)[0]


def modes_of(name, form, way):
    """Compiling takes the most time: train in one format then, and evaluate in the other.

    The two alternate. An architecture with only one format is compiled for both modes.
    """
    if way != "backend" or (name, "channels_last") not in CASES:
        return modes(way)
    odd = list(ARCHITECTURES).index(name) % 2
    mode = list(MODES)[list(FORMATS).index(form) ^ odd]
    return {mode: MODES[mode]}


@pytest.mark.parametrize("way", there())
@pytest.mark.parametrize(("name", "form"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_it_gives_what_plain_pytorch_does(name, form, way):
    for mode, training in modes_of(name, form, way).items():
        found, became = WAYS[way](*model_of(name, form), training)
        assert not differences(found, plain_outcome(name, form, training)), mode
        assert way in TABLE[name], "not counted yet: python tests/zoo/totals.py"
        assert became == TABLE[name][way][mode], mode


def test_the_table_has_every_architecture_and_every_batch_norm_of_it():
    assert TABLE.keys() == ARCHITECTURES.keys()
    for name, ways in TABLE.items():
        assert sum(ways["enabled"]["training"].values()), name


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_is_off_by_little_is_seen(mode):
    model, x = model_of("timm lcnet_050", "contiguous")
    expected = plain_outcome("timm lcnet_050", "contiguous", MODES[mode])
    x = x + 1e-7 * weights(x)
    assert differences(plain(model, x, MODES[mode])[0], expected)
