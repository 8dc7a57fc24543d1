# SPDX-License-Identifier: Apache-2.0
"""CDR bytes of visualization_msgs/Marker and MarkerArray, laid out by NumPy: a thousand times faster than Point objects in a
loop. And the stamp of a message that is not worth decoding.

CDR (OMG formal/02-06-51, section 15.3) writes fields in order, each primitive aligned to its size counted from the end
of a 4-byte encapsulation header; strings and sequences carry their length as uint32 first.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_LITTLE_ENDIAN = b"\x00\x01\x00\x00"
_WHITE = (1.0, 1.0, 1.0, 1.0)
_ADD, _DELETE, _DELETE_ALL = 0, 2, 3
_CUBE_LIST, _TRIANGLE_LIST = 6, 11


@dataclass(frozen=True)
class CubeList:
    """One marker: cubes of one size and colour.

    Attributes:
        namespace: the marker's ``ns``; RViz shows a check box for each.
        marker_id: the marker's ``id``.
        centres_m: [n, 3] cube centres in the header's frame, metres.
        edge_m: edge of a cube.
        color_rgba: four numbers 0..1.
        colors_rgba: float32 [n, 4], a colour of its own for each cube; None leaves all to ``color_rgba``.
    """

    namespace: str
    marker_id: int
    centres_m: np.ndarray
    edge_m: float
    color_rgba: tuple[float, float, float, float]
    colors_rgba: np.ndarray | None = None


@dataclass(frozen=True)
class TriangleList:
    """One marker: triangles with a colour at each corner.

    Attributes:
        namespace: the marker's ``ns``.
        corners_m: [3 T, 3], three by three, in the header's frame, metres.
        colors_rgba: float32 [3 T, 4], 0..1.
    """

    namespace: str
    corners_m: np.ndarray
    colors_rgba: np.ndarray


def header_stamp_ns(serialised: bytes) -> int:
    """Stamp, in nanoseconds, of a serialised message that begins with a std_msgs/Header (or is one); it is not decoded."""
    order = "<" if serialised[1] & 1 else ">"
    seconds, nanoseconds = struct.unpack_from(f"{order}iI", serialised, len(_LITTLE_ENDIAN))
    return seconds * 10**9 + nanoseconds


class CdrWriter:
    """Collects primitives of a little-endian CDR stream; arrays are copied once, when it is finished."""

    def __init__(self) -> None:
        self._parts: list[bytes | memoryview] = [_LITTLE_ENDIAN]
        self._size = 0  # counted from the end of the encapsulation header, as alignment is

    def align(self, size: int) -> None:
        self._append(b"\x00" * (-self._size % size))

    def pack(self, form: str, *values: float) -> None:
        """Values of one primitive type (``struct`` letter), aligned to its size."""
        self.align(struct.calcsize("<" + form[-1]))
        self._append(struct.pack("<" + form, *values))

    def string(self, text: str) -> None:
        encoded = text.encode() + b"\x00"
        self.pack("I", len(encoded))
        self._append(encoded)

    def points(self, points: np.ndarray) -> None:
        """A sequence of geometry_msgs/Point from [n, 3]."""
        self.pack("I", len(points))
        if len(points):
            self.align(8)
            self._append(np.ascontiguousarray(points, dtype="<f8").data.cast("B"))

    def colors(self, colors: np.ndarray | None) -> None:
        """A sequence of std_msgs/ColorRGBA from [n, 4]; None is the empty one."""
        self.pack("I", 0 if colors is None else len(colors))
        if colors is not None and len(colors):
            self._append(np.ascontiguousarray(colors, dtype="<f4").data.cast("B"))

    def finish(self) -> bytes:
        return b"".join(self._parts)

    def _append(self, data: bytes | memoryview) -> None:
        self._parts.append(data)
        self._size += len(data)


def marker_array(stamp_ns: int, frame_id: str, cube_lists: Iterable[CubeList], delete_all: bool) -> bytes:
    """A serialised MarkerArray.

    Args:
        stamp_ns: stamp of every marker.
        frame_id: frame of every marker.
        cube_lists: one CUBE_LIST marker each.
        delete_all: begin with a DELETEALL marker, so that markers which are not repeated disappear.
    """
    cube_lists = list(cube_lists)
    writer = CdrWriter()
    writer.pack("I", len(cube_lists) + delete_all)
    if delete_all:
        nothing = CubeList("", 0, np.empty((0, 3)), 0.0, (0.0, 0.0, 0.0, 0.0))
        _marker(writer, stamp_ns, frame_id, 0, _DELETE_ALL, nothing)
    for cubes in cube_lists:
        _marker(writer, stamp_ns, frame_id, _CUBE_LIST, _ADD, cubes)
    return writer.finish()


def triangle_marker(stamp_ns: int, frame_id: str, triangles: TriangleList) -> bytes:
    """A serialised Marker; without triangles it deletes the one that was shown before."""
    writer = CdrWriter()
    action = _ADD if len(triangles.corners_m) else _DELETE
    _head(writer, stamp_ns, frame_id, triangles.namespace, (0, _TRIANGLE_LIST, action))
    _body(writer, 1.0, _WHITE, triangles.corners_m, triangles.colors_rgba)
    return writer.finish()


def _marker(writer: CdrWriter, stamp_ns: int, frame_id: str, kind: int, action: int, cubes: CubeList) -> None:
    _head(writer, stamp_ns, frame_id, cubes.namespace, (cubes.marker_id, kind, action))
    _body(writer, cubes.edge_m, cubes.color_rgba, cubes.centres_m, cubes.colors_rgba)


def _head(
    writer: CdrWriter, stamp_ns: int, frame_id: str, namespace: str, id_kind_action: tuple[int, int, int]
) -> None:
    writer.pack("i", stamp_ns // 10**9)
    writer.pack("I", stamp_ns % 10**9)
    writer.string(frame_id)
    writer.string(namespace)
    writer.pack("3i", *id_kind_action)


def _body(
    writer: CdrWriter,
    scale_m: float,
    color_rgba: tuple[float, float, float, float],
    points_m: np.ndarray,
    colors_rgba: np.ndarray | None,
) -> None:
    writer.pack("7d", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)  # pose: position, orientation
    writer.pack("3d", scale_m, scale_m, scale_m)
    writer.pack("4f", *color_rgba)
    writer.pack("i", 0)  # lifetime.sec: forever
    writer.pack("I", 0)  # lifetime.nanosec
    writer.pack("?", False)  # frame_locked
    writer.points(points_m)
    writer.colors(colors_rgba)
    writer.string("")  # texture_resource
    writer.pack("i", 0)  # texture.header.stamp.sec
    writer.pack("I", 0)  # texture.header.stamp.nanosec
    writer.string("")  # texture.header.frame_id
    writer.string("")  # texture.format
    writer.pack("I", 0)  # texture.data
    writer.pack("I", 0)  # uv_coordinates
    writer.string("")  # text
    writer.string("")  # mesh_resource
    writer.string("")  # mesh_file.filename
    writer.pack("I", 0)  # mesh_file.data
    writer.pack("?", False)  # mesh_use_embedded_materials
