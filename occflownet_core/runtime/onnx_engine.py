# SPDX-License-Identifier: Apache-2.0
"""OnnxEngine: a bundle's graph on ONNX Runtime's CPU provider, its memory kept in place between runs."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from occflownet_core.errors import BundleError, EngineError
from occflownet_core.lift_tables import LiftTables
from occflownet_core.runtime.bundle import Bundle
from occflownet_core.runtime.engine import Engine, Prediction

_TABLES = ("pixel_index", "depth_index", "depth_weight")


class OnnxEngine(Engine):
    """Runs ``model.onnx``.

    The recurrent memory is a pair of buffers that take turns as the graph's input and output, so it is never copied.

    Args:
        bundle: from ``load_bundle``.
        threads: CPU threads.

    Raises:
        EngineError: ONNX Runtime refuses the graph.
        BundleError: the graph's inputs or outputs are not those that the bundle describes.
    """

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        super().__init__(bundle)
        try:
            self._session = ort.InferenceSession(
                str(bundle.graph_path), session_options(threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's own exceptions share no narrower base
            raise EngineError(f"ONNX Runtime {ort.__version__} refuses {bundle.graph_path}: {error}") from None
        self._require_contract()
        self._binding = self._session.io_binding()
        self._inputs: dict[str, ort.OrtValue] = {}
        self._memory = [self._zeros(), self._zeros()]

    def reset(self) -> None:
        self._memory[0] = self._zeros()

    def memory(self) -> dict[str, np.ndarray]:
        return {name: value.numpy().copy() for name, value in self._memory[0].items()}

    def _load_tables(self, tables: LiftTables) -> None:
        for name in _TABLES:
            self._bind_input(name, np.ascontiguousarray(getattr(tables, name)))

    def _forward(self, images: np.ndarray, previous_from_current: np.ndarray) -> Prediction:
        read, write = self._memory
        self._bind_input("images", images)
        self._bind_input("previous_from_current", previous_from_current)
        self._bind_input("occupancy_threshold", np.array(self.occupancy_threshold, np.float32))
        for state in self.bundle.recurrent:
            self._binding.bind_ortvalue_input(state.input, read[state.output])
            self._binding.bind_ortvalue_output(state.output, write[state.output])
        for name in self.bundle.outputs:
            self._binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed while running '{self.bundle.name}': {error}") from None
        self._memory.reverse()
        names = [*(state.output for state in self.bundle.recurrent), *self.bundle.outputs]
        results = dict(zip(names, self._binding.get_outputs(), strict=True))
        # Copied, because .numpy() of a buffer on the CPU may be a view that dies with the OrtValue.
        arrays = {name: results[name].numpy().copy() for name in self.bundle.outputs}
        return Prediction(arrays["labels"], arrays.get("occupancy_probability"), arrays.get("velocity"))

    def _bind_input(self, name: str, array: np.ndarray) -> None:
        # Held here, because an OrtValue on the CPU borrows the array's memory and the binding holds neither.
        self._inputs[name] = ort.OrtValue.ortvalue_from_numpy(array)
        self._binding.bind_ortvalue_input(name, self._inputs[name])

    def _zeros(self) -> dict[str, ort.OrtValue]:
        return {
            state.output: ort.OrtValue.ortvalue_from_numpy(np.zeros(state.shape, state.dtype))
            for state in self.bundle.recurrent
        }

    def _require_contract(self) -> None:
        recurrent = self.bundle.recurrent
        inputs = {"images", *_TABLES, "previous_from_current", "occupancy_threshold", *(s.input for s in recurrent)}
        outputs = {*self.bundle.outputs, *(s.output for s in recurrent)}
        for kind, described, found in (
            ("inputs", inputs, {i.name for i in self._session.get_inputs()}),
            ("outputs", outputs, {o.name for o in self._session.get_outputs()}),
        ):
            if described != found:
                raise BundleError(
                    f"{self.bundle.graph_path} has the {kind} {', '.join(sorted(found))} where the bundle describes "
                    f"{', '.join(sorted(described))}; export the model again"
                )


def session_options(threads: int) -> ort.SessionOptions:
    """Options for one graph that shares its cores with image decoding and with ROS."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Idle threads that spin would take the cores from image decoding between two runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options
