"""A training step of a masked batch norm in Flax or Keras: `python judges.py flax OPTIONS`.

OPTIONS are those of bnfast's layer, as JSON. Reads `inputs.npz` in the working directory and
writes what the library's layer makes of each case into `judged_<library>.npz`. In a separate
process, as the writers of checkpoints: these libraries start threads at import. Flax computes in
float64, so that rounding hides nothing; Keras has no float64 on JAX.
"""

import json
import os
import sys

import numpy as np

os.environ |= {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}


def cases():
    """Return the arrays of each case, by name."""
    found = {}
    with np.load("inputs.npz") as file:
        for key, a in file.items():
            case, name = key.split("/")
            found.setdefault(case, {})[name] = a
    return found


def step_of_flax(options, x, dy, mask, weight, bias, running_mean, running_var):
    import flax.linen as nn
    import jax

    layer = nn.BatchNorm(
        use_running_average=False,
        axis=options["axis"],
        momentum=1 - options["momentum"],
        epsilon=options["eps"],
        use_fast_variance=False,
        param_dtype=np.float64,
    )
    statistics = {"mean": running_mean, "var": running_var}

    def forward(parameters, x):
        variables = {"params": parameters, "batch_stats": statistics}
        y, changed = layer.apply(variables, x, mask=mask[..., None], mutable=["batch_stats"])
        return y, changed["batch_stats"]

    y, pull_back, changed = jax.vjp(forward, {"scale": weight, "bias": bias}, x, has_aux=True)
    gradients, dx = pull_back(dy)
    return y, dx, gradients["scale"], gradients["bias"], changed["mean"], changed["var"]


def step_of_nnx(options, x, dy, mask, weight, bias, running_mean, running_var):
    """Only what it computes forward: the gradients are JAX's."""
    from flax import nnx

    layer = nnx.BatchNorm(
        len(weight),
        axis=options["axis"],
        momentum=1 - options["momentum"],
        epsilon=options["eps"],
        use_fast_variance=False,
        param_dtype=np.float64,
        rngs=nnx.Rngs(0),
    )
    given = {"scale": weight, "bias": bias, "mean": running_mean, "var": running_var}
    for name, value in given.items():
        setattr(layer, name, type(getattr(layer, name))(np.array(value)))
    y = layer(x, use_running_average=False, mask=mask[..., None])
    read = [np.asarray(getattr(layer, name)[...]) for name in ("mean", "var")]
    return y, None, None, None, *read


def keras_layer(options, x, **more):
    """A layer that was built for x."""
    import keras

    layer = keras.layers.BatchNormalization(
        axis=options["axis"], momentum=1 - options["momentum"], epsilon=options["eps"], **more
    )
    layer.build(x.shape)
    return layer


def step_of(layer, x, dy, mask, parameters, state):
    """One step of a Keras layer, whose variables that are not trained have these values by name."""
    import jax

    names = [variable.name for variable in layer.non_trainable_variables]

    def forward(parameters, x):
        values = [state[name] for name in names]
        return layer.stateless_call(parameters, values, x, training=True, mask=mask)

    y, pull_back, changed = jax.vjp(forward, parameters, x, has_aux=True)
    gradients, dx = pull_back(dy.astype(y.dtype))
    return y, dx, *gradients, dict(zip(names, changed, strict=True))


def step_of_keras(options, x, dy, mask, weight, bias, running_mean, running_var):
    state = {"moving_mean": running_mean, "moving_variance": running_var}
    *step, changed = step_of(keras_layer(options, x), x, dy, mask, [weight, bias], state)
    return *step, changed["moving_mean"], changed["moving_variance"]


def step_of_renorm(options, x, dy, mask, weight, bias, running_mean, running_var):
    """Keras' batch renormalization averages deviations, not variances: that is left out."""
    clipping = {"rmin": 1 / options["rmax"], "rmax": options["rmax"], "dmax": options["dmax"]}
    layer = keras_layer(options, x, renorm=True, renorm_clipping=clipping)
    deviation = np.sqrt(running_var + options["eps"])
    state = {
        "moving_mean": running_mean,
        "moving_variance": running_var,
        "renorm_mean": running_mean,
        "renorm_stddev": deviation,
        "moving_stddev": deviation,
    }
    *step, changed = step_of(layer, x, dy, mask, [weight, bias], state)
    return *step, changed["moving_mean"], None


NAMES = ("y", "dx", "weight_grad", "bias_grad", "running_mean", "running_var")
STEPS = {
    "flax": step_of_flax,
    "nnx": step_of_nnx,
    "keras": step_of_keras,
    "renorm": step_of_renorm,
}

if __name__ == "__main__":
    library, options = sys.argv[1], json.loads(sys.argv[2])
    results = {}
    for case, arrays in cases().items():
        for name, a in zip(NAMES, STEPS[library](options, **arrays), strict=True):
            if a is not None:
                results[f"{case}/{name}"] = np.asarray(a)
    np.savez(f"judged_{library}.npz", **results)
