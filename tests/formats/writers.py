"""Write checkpoints with the libraries themselves: `python writers.py keras` and so on.

Each writes its files, and `expected_<library>.npz` with inputs of its batch norms and their outputs
in inference, into the working directory. They run in separate processes: these libraries start
threads at import, which would disturb a test run that forks.
"""

import os
import sys

import numpy as np

RNG = np.random.default_rng(20150304)


def trained(channels, dtype=np.float32):
    """Return weight, bias, running mean and variance of some layer."""
    values = (*RNG.normal(size=(3, channels)), RNG.uniform(0.1, 4, channels))
    return [a.astype(dtype) for a in values]


def resnet(dtype=np.float32):
    """Return two batch norms and a convolution under PyTorch's names."""
    state = {"layer1.0.conv1.weight": RNG.normal(size=(6, 3, 3, 3)).astype(np.float32)}
    for path, channels in (("layer1.0.bn1.", 6), ("layer1.0.bn2.", 4)):
        names = ("weight", "bias", "running_mean", "running_var")
        state |= {path + name: a for name, a in zip(names, trained(channels, dtype), strict=True)}
        state[path + "num_batches_tracked"] = np.array(17)
    return state


def write_safetensors():
    import ml_dtypes
    from safetensors.numpy import save_file

    state = resnet()
    save_file(state, "model.safetensors")
    save_file(resnet(np.float16), "half.safetensors")
    save_file(resnet(ml_dtypes.bfloat16), "bfloat16.safetensors")
    np.savez("expected_safetensors.npz", **state)


def write_numpy():
    state = resnet()
    np.savez("model.npz", **state)
    np.savez("expected_numpy.npz", **state)


def write_torch():
    import torch

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6))
    with torch.no_grad():
        model(torch.from_numpy(RNG.normal(2, 3, size=(8, 3, 7, 7)).astype(np.float32)))
        bn = model[1].eval()
        x = RNG.normal(size=(2, 6, 5, 5)).astype(np.float32)
        y = bn(torch.from_numpy(x)).numpy()
    state = {f"layer1.0.bn1.{key}": value for key, value in bn.state_dict().items()}
    torch.save(state, "model.pth")
    np.savez("expected_torch.npz", x=x, y=y)


def write_keras():
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    stem = keras.layers.BatchNormalization(name="stem_bn", epsilon=0.01, momentum=0.9)
    head = keras.layers.BatchNormalization(name="head_bn", scale=False)
    plain = keras.layers.BatchNormalization(name="plain_bn", center=False)
    inner = keras.Sequential([keras.Input((5,)), head, plain], name="inner")
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, use_bias=False),
            stem,
            keras.layers.Flatten(),
            keras.layers.Dense(5),
            inner,
        ]
    )
    model.compile("sgd", "mse")
    model.fit(RNG.normal(2, 3, (64, 8, 8, 3)), RNG.normal(size=(64, 5)), epochs=2, verbose=0)
    model.save("model.keras")
    model.save_weights("model.weights.h5")
    expected = {}
    for layer, shape in ((stem, (2, 6, 6, 4)), (head, (7, 5)), (plain, (7, 5))):
        x = RNG.normal(size=shape).astype(np.float32)
        expected[f"{layer.name}_x"] = x
        expected[f"{layer.name}_y"] = np.asarray(layer(x, training=False))
    np.savez("expected_keras.npz", **expected)


def write_flax():
    import flax.linen as nn
    import flax.serialization
    import jax
    from flax import nnx

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), use_bias=False)(x)
            return nn.BatchNorm(use_running_average=False, name="stem_bn")(x)

    x = RNG.normal(2, 3, (8, 6, 6, 3)).astype(np.float32)
    variables = Net().init(jax.random.key(0), x)
    variables |= Net().apply(variables, x, mutable=["batch_stats"])[1]
    with open("model.msgpack", "wb") as file:
        file.write(flax.serialization.to_bytes(variables))

    x = RNG.normal(size=(2, 5, 5, 4)).astype(np.float32)
    own = {key: tree["stem_bn"] for key, tree in variables.items()}
    y = nn.BatchNorm(use_running_average=True).apply(own, x)

    model = nnx.Dict(stem_bn=nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    model.stem_bn(RNG.normal(2, 3, (8, 4)).astype(np.float32))
    state = nnx.to_pure_dict(nnx.state(model))
    with open("nnx.msgpack", "wb") as file:
        file.write(flax.serialization.msgpack_serialize(jax.tree.map(np.asarray, state)))
    model.stem_bn.use_running_average = True
    nnx_y = model.stem_bn(x)
    np.savez("expected_flax.npz", x=x, y=np.asarray(y), nnx_y=np.asarray(nnx_y))


if __name__ == "__main__":
    {
        "safetensors": write_safetensors,
        "numpy": write_numpy,
        "torch": write_torch,
        "keras": write_keras,
        "flax": write_flax,
    }[sys.argv[1]]()
