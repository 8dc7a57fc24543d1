# SPDX-License-Identifier: Apache-2.0
"""The tensors at a graph's boundary: what a bundle describes, what an engine has, and whether they are the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from occflownet_core.camera_matrices import PARAMETERS
from occflownet_core.errors import EngineError
from occflownet_core.runtime.bundle import FIELD_FEATURES, Bundle


@dataclass(frozen=True)
class Tensor:
    """One input or output.

    Attributes:
        name: in the graph.
        shape: of it; -1 where it is not fixed.
        dtype: NumPy's name.
        is_input: or an output.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_input: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def described_tensors(bundle: Bundle) -> list[Tensor]:
    """Inputs and outputs that a bundle's graph must have (DESIGN: graph boundary), inputs first."""
    tables = _table_shapes(bundle)
    outputs = {
        "labels": (bundle.grid.shape, "uint8"),
        "occupancy_probability": (bundle.grid.shape, "float32"),
        "velocity": ((*bundle.grid.shape, 3), "float32"),
    }
    return [
        Tensor("images", (len(bundle.cameras), bundle.image_height_px, bundle.image_width_px, 3), "uint8", True),
        *(Tensor(name, *tables[name], True) for name in bundle.lift.inputs),
        Tensor("previous_from_current", (4, 4), "float32", True),
        Tensor("occupancy_threshold", (), "float32", True),
        *(Tensor(state.input, state.shape, state.dtype, True) for state in bundle.recurrent),
        *(Tensor(name, *outputs[name], False) for name in bundle.outputs),
        *([Tensor(FIELD_FEATURES, bundle.field_features_shape, "float32", False)] if bundle.field_channels else []),
        *(Tensor(state.output, state.shape, state.dtype, False) for state in bundle.recurrent),
    ]


def _table_shapes(bundle: Bundle) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of the inputs that depend on calibration alone; those of the bundle's way of lifting."""
    lift, cameras = bundle.lift, len(bundle.cameras)
    voxels, slots = lift.grid.size, lift.slots
    points = cameras * lift.depth_bins.count * lift.feature_height * lift.feature_width
    lifting = {
        "gather": {
            "pixel_index": ((voxels, slots), "int32"),
            "depth_index": ((voxels, slots, 2), "int32"),
            "depth_weight": ((voxels, slots, 2), "float32"),
        },
        "splat": {
            "pixel_index": ((points,), "int32"),
            "depth_index": ((points,), "int32"),
            "voxel_first": ((voxels + 1,), "int32"),
        },
    }
    return lifting[lift.method] | {
        "image_from_ego": ((cameras, 4, 4), "float32"),
        "ego_from_image": ((cameras, 4, 4), "float32"),
        "camera_parameters": ((cameras, PARAMETERS), "float32"),
    }


def require_described(bundle: Bundle, found: Iterable[Tensor]) -> None:
    """Refuse tensors that are not those of the bundle.

    Args:
        bundle: what it describes.
        found: what an engine has.

    Raises:
        EngineError: names, a shape or a type differ; the sentence lacks its subject, for the caller to put before.
    """
    found = list(found)
    described = described_tensors(bundle)
    for kind, is_input in (("inputs", True), ("outputs", False)):
        ours = {t.name for t in described if t.is_input == is_input}
        theirs = {t.name for t in found if t.is_input == is_input}
        if ours != theirs:
            raise EngineError(
                f"has the {kind} {', '.join(sorted(theirs))} where the bundle describes {', '.join(sorted(ours))}"
            )
    by_name = {tensor.name: tensor for tensor in described}
    for tensor in found:
        expected = by_name[tensor.name]
        if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            raise EngineError(
                f"has {tensor.name} of {tensor.dtype} {tensor.shape} where the bundle describes {expected.dtype} "
                f"{expected.shape}"
            )


def graph_tensors(nodes: Sequence[object], is_input: bool) -> list[Tensor]:
    """ONNX Runtime's ``NodeArg`` of a session as tensors."""
    return [
        Tensor(n.name, tuple(d if isinstance(d, int) else -1 for d in n.shape), _NUMPY.get(n.type, n.type), is_input)
        for n in nodes
    ]


_NUMPY = {
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
}
