"""ONNX Runtime: inference of a model of one batch normalization, with bound arrays.

On a CPU its operator takes channels on axis 1 only, and no halves; those cases are left out. It
has its own threads. OpenMP's threads spin for some milliseconds after each call and would occupy
the cores that it needs, so it rests before its turn.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.harness import compiled
from bench.harness.cases import EPS, Buffers, Case, Data, Run

try:
    import onnxruntime
    from onnx import helper, numpy_helper
except ImportError as error:
    raise compiled.Missing(f"{error.name} is not installed") from error


class OnnxRuntime:
    name = "onnxruntime"
    rest = 10e-3
    version = onnxruntime.__version__

    def set_threads(self, n: int) -> None:
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = n
        self.options.inter_op_num_threads = 1
        self.options.log_severity_level = 3
        # Otherwise its threads keep spinning during the others' turns.
        self.options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session: tuple[Data, Any] | None = None

    def runs(self, data: Data, buffers: Buffers, step: str) -> dict[str, Run]:
        if step != "inference" or data.case.layout == "nhwc" or data.case.half:
            return {}
        if self.session is None or self.session[0] is not data:
            self.session = data, self._session(data)
        binding = self.session[1].io_binding()
        inputs = {"x": buffers.x} | ({"residual": buffers.residual} if data.case.adds else {})
        for name, array in inputs.items():
            binding.bind_input(name, *_place(array))
        binding.bind_output("y", *_place(buffers.out))
        run = self.session[1].run_with_iobinding
        return {"onnxruntime": Run(lambda: run(binding), lambda _: [buffers.out])}

    def _session(self, data: Data) -> Any:
        model = _model(data).SerializeToString()
        return onnxruntime.InferenceSession(model, self.options, ["CPUExecutionProvider"])


def _place(array: np.ndarray) -> tuple[Any, ...]:
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data


# By activation: the nodes from z to y, as kind, inputs and result.
ACTIVATIONS: dict[str | None, list[tuple[str, list[str], str]]] = {
    None: [],
    "relu": [("Relu", ["z"], "y")],
    "silu": [("Sigmoid", ["z"], "s"), ("Mul", ["z", "s"], "y")],
}


def _nodes(case: Case) -> list[Any]:
    """Return the normalization and the nodes that follow it in the variant."""
    norm = ("BatchNormalization", ["x", "weight", "bias", "mean", "var"])
    if case.adds:
        nodes = [(*norm, "normalized"), ("Add", ["normalized", "residual"], "z")]
    elif case.activation:
        nodes = [(*norm, "z")]
    else:
        nodes = [(*norm, "y")]
    nodes += ACTIVATIONS[case.activation]
    made = [helper.make_node(kind, inputs, [result]) for kind, inputs, result in nodes]
    made[0].attribute.append(helper.make_attribute("epsilon", EPS))
    return made


def _model(data: Data) -> Any:
    case = data.case
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
    tensors = ("x", *(["residual"] if case.adds else []), "y")
    *inputs, y = (helper.make_tensor_value_info(name, kind, case.memory) for name in tensors)
    vectors = ("weight", "bias", "mean", "var")
    constants = [numpy_helper.from_array(getattr(data, name), name) for name in vectors]
    graph = helper.make_graph(_nodes(case), "batch_norm", inputs, [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
