# SPDX-License-Identifier: Apache-2.0
"""A bundle's graph in the precision in which an engine shall run it."""

from __future__ import annotations

from occflownet_core.errors import EngineError
from occflownet_core.runtime.bundle import Bundle
from occflownet_core.runtime.engine import HALF, SINGLE


def graph_bytes(bundle: Bundle, precision: str) -> bytes:
    """The serialised ONNX graph.

    Args:
        bundle: from ``load_bundle``.
        precision: ``fp32`` is the graph as exported; ``fp16`` is rewritten by ``half_precision.to_half``.

    Raises:
        EngineError: the graph cannot be rewritten, or the package onnx is missing.
    """
    content = bundle.graph_path.read_bytes()
    if precision == SINGLE:
        return content
    if precision != HALF:
        raise EngineError(f"there is no precision '{precision}'; use {SINGLE} or {HALF}")
    try:
        import onnx

        from occflownet_core.runtime.half_precision import to_half
    except ImportError:
        raise EngineError("precision fp16 rewrites the graph, which needs the package onnx: pip install onnx") from None
    try:
        graph = onnx.load_from_string(content)
    except Exception as error:  # protobuf's own
        raise EngineError(f"{bundle.graph_path} cannot be read as ONNX ({error}); export the model again") from None
    return to_half(graph).SerializeToString()
