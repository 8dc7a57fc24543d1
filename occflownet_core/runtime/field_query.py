# SPDX-License-Identifier: Apache-2.0
"""Queries without PyTorch: the field of one frame at any points, by a bundle's second graph on ONNX Runtime.

engine.keep_field = True
prediction = engine.infer(images, previous_from_current)
field = FieldQuery(bundle).field(prediction.field_features)
field.samples(points_m).probability
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from occflownet_core.errors import BundleError, EngineError, GeometryError
from occflownet_core.grid import VoxelGrid
from occflownet_core.query import POINTS_AT_A_TIME, FieldSamples, batches, require_points
from occflownet_core.runtime.bundle import Bundle
from occflownet_core.runtime.onnx_engine import session_options

_NO_POINTS = np.zeros((0, 3), dtype=np.float32)


@dataclass(frozen=True)
class FrameField:
    """The field of one frame, for NumPy points (``query.QueryableField``).

    Attributes:
        grid: its box, and the cells of its features.
    """

    grid: VoxelGrid
    _run: Callable[[np.ndarray, np.ndarray], list[np.ndarray]]

    def probability(self, points_m: np.ndarray) -> np.ndarray:
        """Probability float32 [N] of being occupied at points [N, 3], ego frame; zero outside the box.

        Raises:
            GeometryError: the points are not [N, 3], or one is NaN.
            EngineError: ONNX Runtime failed.
        """
        points_m, inside = self._checked(points_m)
        probability = np.zeros(len(points_m), dtype=np.float32)
        within_m = points_m[inside]
        parts = [self._run(within_m[part], _NO_POINTS)[0] for part in batches(len(within_m), POINTS_AT_A_TIME)]
        probability[inside] = np.concatenate(parts)
        return probability

    def samples(self, points_m: np.ndarray, gradient: bool = False) -> FieldSamples:
        """Probability, logits and, if asked for, the gradient at points [N, 3]; errors as for ``probability``."""
        points_m, inside = self._checked(points_m)
        within_m = points_m[inside]
        parts = [self._run(_NO_POINTS, within_m[part])[1:] for part in batches(len(within_m), POINTS_AT_A_TIME)]
        found = [np.concatenate(column) for column in zip(*parts, strict=True)]
        everywhere = [np.zeros((len(points_m), *values.shape[1:]), dtype=np.float32) for values in found]
        for values, within in zip(everywhere, found, strict=True):
            values[inside] = within
        probability, logits, gradient_per_m = everywhere
        return FieldSamples(probability, logits, inside, gradient_per_m if gradient else None)

    def _checked(self, points_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points_m = np.asarray(points_m, dtype=np.float32)
        require_points(points_m)
        # In the points' own precision, or those on the lower faces would be outside or not as its rounding goes.
        lower_m, upper_m = np.float32(self.grid.lower_m), np.float32(self.grid.upper_m)
        return points_m, ((points_m >= lower_m) & (points_m < upper_m)).all(axis=1)


class FieldQuery:
    """The second graph of a bundle.

    Args:
        bundle: from ``load_bundle``, exported with its field.
        threads: CPU threads.

    Raises:
        BundleError: the bundle carries no such graph.
        EngineError: ONNX Runtime refuses it.
    """

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        if bundle.field_graph_path is None:
            raise BundleError(f"bundle {bundle.directory} has no graph for queries; export the model again")
        self.bundle = bundle
        try:
            self._session = ort.InferenceSession(
                str(bundle.field_graph_path), session_options(threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's own exceptions share no narrower base
            raise EngineError(f"ONNX Runtime {ort.__version__} refuses {bundle.field_graph_path}: {error}") from None

    def field(self, features: np.ndarray) -> FrameField:
        """The field of the frame that these features are of.

        Args:
            features: ``Prediction.field_features``.

        Raises:
            GeometryError: they are of another shape than the bundle's.
        """
        if features.shape != self.bundle.field_features_shape:
            raise GeometryError(
                f"the field's features have shape {features.shape}, model '{self.bundle.name}' has "
                f"{self.bundle.field_features_shape}; take them from an engine of the same bundle"
            )
        features = np.ascontiguousarray(features)

        def run(points_m: np.ndarray, detailed_points_m: np.ndarray) -> list[np.ndarray]:
            inputs = {"features": features, "points_m": points_m, "detailed_points_m": detailed_points_m}
            try:
                return self._session.run(None, inputs)
            except Exception as error:
                raise EngineError(f"ONNX Runtime failed at a query of '{self.bundle.name}': {error}") from None

        return FrameField(self.bundle.lift.grid, run)
