# SPDX-License-Identifier: Apache-2.0
"""Between ROS messages and the core's types: stamps, images, camera_info, odometry in; occupancy frames out."""

from __future__ import annotations

import array
import functools
from collections.abc import Sequence

import cv2
import numpy as np
from builtin_interfaces.msg import Time
from nav_msgs.msg import OccupancyGrid, Odometry
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2, PointField
from std_msgs.msg import Header, MultiArrayDimension, UInt8MultiArray

from occflownet_core.camera import Camera
from occflownet_core.errors import CalibrationError, ImageError
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import CLASS_NAMES, CLASSES, COLORS_RGB, FREE
from occflownet_core.mesh import Mesh
from occflownet_core.occupancy_frame import OccupancyFrame, surface_voxels
from occflownet_core.preprocess import ImageTransform
from occflownet_ros import cdr
from occflownet_ros.calibration_source import Intrinsics
from occflownet_ros.camera_model import CameraModel
from occflownet_ros.image_encodings import bgr_image, raw_pixels

SMALLER_FIRST = {"rgb8": None, "bgr8": cv2.COLOR_BGR2RGB, "mono8": cv2.COLOR_GRAY2RGB}
_CLOUD_FIELDS = ("x", "y", "z", "rgb", "probability")
_VELOCITY_FIELDS = ("vx", "vy", "vz")
_PACKED_RGB = COLORS_RGB.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
_OPAQUE_RGBA = np.append(COLORS_RGB / 255.0, np.ones((len(COLORS_RGB), 1)), axis=1).astype(np.float32)
_WORD = 4  # bytes of a float32
_VOXELS_AT_A_TIME = 1 << 13  # what is read and written meanwhile stays in the cache

UNKNOWN, PASSABLE, BLOCKED = -1, 0, 100
"""nav_msgs/OccupancyGrid values."""


def nanoseconds(stamp: Time) -> int:
    """Nanoseconds since the epoch of a message's stamp."""
    return stamp.sec * 10**9 + stamp.nanosec


def time_message(stamp_ns: int) -> Time:
    return Time(sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)


def header_message(frame: OccupancyFrame) -> Header:
    return Header(stamp=time_message(frame.stamp_ns), frame_id=frame.frame_id)


RemapTables = tuple[np.ndarray, np.ndarray]


def network_image(
    message: CompressedImage | Image, transform: ImageTransform, rectification: RemapTables | None = None
) -> np.ndarray:
    """The network's view, uint8 RGB [height, width, 3], of an image message.

    Args:
        message: a compressed or a raw image.
        transform: from the camera's image to the network's.
        rectification: ``CameraModel.network_maps(transform)`` where the image is as the sensor saw it.

    Raises:
        ImageError: the image cannot be decoded, is cut short, is of another size than announced, or of an encoding
            that is not supported.
    """
    if rectification is not None:
        return cv2.cvtColor(
            cv2.remap(_reduced(message, transform), *rectification, cv2.INTER_LINEAR), cv2.COLOR_BGR2RGB
        )
    if isinstance(message, CompressedImage):
        return transform.jpeg(np.frombuffer(message.data, dtype=np.uint8))
    encoding, size_px = message.encoding, (message.width, message.height)
    if encoding in SMALLER_FIRST:
        # Colour is converted after the image has become small.
        small = transform.image(raw_pixels(message.data, encoding, *size_px, message.step))
        return cv2.cvtColor(small, SMALLER_FIRST[encoding]) if SMALLER_FIRST[encoding] is not None else small
    image = bgr_image(message.data, encoding, *size_px, message.step, bool(message.is_bigendian))
    return cv2.cvtColor(transform.image(image), cv2.COLOR_BGR2RGB)


def _reduced(message: CompressedImage | Image, transform: ImageTransform) -> np.ndarray:
    """uint8 BGR, smaller by the transform's ``decoding_factor``."""
    if isinstance(message, CompressedImage):
        return transform.reduced(np.frombuffer(message.data, dtype=np.uint8))
    size_px, factor = (message.width, message.height), transform.decoding_factor
    if size_px != (transform.source_width_px, transform.source_height_px):
        raise ImageError(
            f"the image is {size_px[0]} x {size_px[1]} but {transform.source_width_px} x {transform.source_height_px} was "
            "announced; make camera_info and images agree"
        )
    image = bgr_image(message.data, message.encoding, *size_px, message.step, bool(message.is_bigendian))
    if factor == 1:
        return image
    return cv2.resize(image, tuple(-(-length // factor) for length in size_px), interpolation=cv2.INTER_AREA)


def camera_info_message(serialised: bytes, topic: str) -> CameraInfo:
    """A camera_info that was received as bytes.

    Raises:
        CalibrationError: they are none.
    """
    try:
        return deserialize_message(serialised, CameraInfo)
    except Exception:  # rclpy does not export the type of what its middleware raises
        raise CalibrationError(
            f"{len(serialised)} bytes on {topic} are no sensor_msgs/CameraInfo; check what publishes there"
        ) from None


def intrinsics_from_info(message: CameraInfo, rectify: bool = False) -> Intrinsics:
    """The rectified image's intrinsics: P where it is filled in, else K (they agree for an undistorted camera).

    Args:
        message: of the camera.
        rectify: whether its images are as the sensor saw them and must be rectified.

    Raises:
        CalibrationError: they must, and it is for binned images or a part of the sensor.
    """
    projection = np.array(message.p, dtype=np.float64).reshape(3, 4)[:, :3]
    matrix = projection if projection.any() else np.array(message.k, dtype=np.float64).reshape(3, 3)
    model = CameraModel.from_message(message) if rectify else None
    return Intrinsics(message.header.frame_id, message.width, message.height, tuple(matrix.ravel().tolist()), model)


def pose_from_odometry(message: Odometry) -> tuple[np.ndarray, np.ndarray]:
    """Position [3], metres, and quaternion [4], scalar first, of the child frame in the odometry frame."""
    p, q = message.pose.pose.position, message.pose.pose.orientation
    return np.array([p.x, p.y, p.z]), np.array([q.w, q.x, q.y, q.z])


def voxel_centres_m(grid: VoxelGrid, flat_index: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Centres [n, 3] in the ego frame of cells given by C-order index [n] into [X, Y, Z]; written to ``out`` if given."""
    _, y, z = grid.shape
    centres_m = np.empty((len(flat_index), 3)) if out is None else out
    along = [grid.axis_centres_m(axis) for axis in range(3)]
    for start in range(0, len(flat_index), _VOXELS_AT_A_TIME):
        part = slice(start, start + _VOXELS_AT_A_TIME)
        column = flat_index[part] // z
        row = column // y
        for axis, index in enumerate((row, column - row * y, flat_index[part] - column * z)):
            centres_m[part, axis] = along[axis][index]
    return centres_m


def cloud_message(frame: OccupancyFrame) -> PointCloud2:
    """Every occupied voxel as a point: x, y, z, rgb, probability, (vx, vy, vz), label."""
    flat_index = np.flatnonzero(frame.labels != FREE)
    label = frame.labels.ravel()[flat_index]
    names = _CLOUD_FIELDS + (_VELOCITY_FIELDS if frame.velocity_mps is not None else ())
    # Little-endian words by name; the label is the low byte of the last, so that points are aligned as PCL likes it.
    points = np.empty((len(flat_index), len(names) + 1), dtype="<f4")
    voxel_centres_m(frame.grid, flat_index, out=points[:, 0:3])
    points.view("<u4")[:, 3] = _PACKED_RGB[label]
    points[:, 4] = 1.0 if frame.probability is None else frame.probability.ravel()[flat_index]
    if frame.velocity_mps is not None:
        points[:, 5:8] = frame.velocity_mps.reshape(-1, 3)[flat_index]
    points.view("<u4")[:, -1] = label
    message = PointCloud2(
        header=header_message(frame),
        height=1,
        width=len(points),
        fields=_point_fields(names),
        is_bigendian=False,
        point_step=_WORD * points.shape[1],
        row_step=points.nbytes,
        is_dense=True,
    )
    message.data = _byte_array(points)
    return message


@functools.cache
def _point_fields(names: tuple[str, ...]) -> list[PointField]:
    fields = [PointField(name=n, offset=_WORD * k, datatype=PointField.FLOAT32, count=1) for k, n in enumerate(names)]
    return [*fields, PointField(name="label", offset=_WORD * len(names), datatype=PointField.UINT8, count=1)]


def class_cubes(frame: OccupancyFrame, alpha: float, coloring: str = "class") -> list[cdr.CubeList]:
    """The surface voxels, one cube list per class present; marker id = label.

    Args:
        frame: whose voxels.
        alpha: opacity, 0..1.
        coloring: ``class`` gives a list its class's colour, ``height`` each cube that of its layer, from the grid's
            bottom (blue) to its top (red).
    """
    flat_index = np.flatnonzero(surface_voxels(frame.labels))
    label = frame.labels.ravel()[flat_index]
    order = np.argsort(label, kind="stable")
    flat_index, starts = flat_index[order], np.searchsorted(label[order], np.arange(FREE + 1))
    centres_m = voxel_centres_m(frame.grid, flat_index)
    layers = frame.grid.shape[2]
    colors = height_colors_rgba(layers, alpha)[flat_index % layers] if coloring == "height" else None
    return [
        cdr.CubeList(
            namespace=CLASS_NAMES[c],
            marker_id=c,
            centres_m=centres_m[starts[c] : starts[c + 1]],
            edge_m=frame.grid.voxel_size_m,
            color_rgba=(*(COLORS_RGB[c] / 255.0).tolist(), alpha),
            colors_rgba=None if colors is None else colors[starts[c] : starts[c + 1]],
        )
        for c in range(FREE)
        if starts[c + 1] > starts[c]
    ]


def height_colors_rgba(layers: int, alpha: float) -> np.ndarray:
    """Colours float32 [layers, 4], 0..1, of the layers' centres on the Turbo map (Mikhailov 2019): blue below, red above."""
    level = np.round(255 * (np.arange(layers) + 0.5) / layers).astype(np.uint8)
    bgr = cv2.applyColorMap(level[:, None], cv2.COLORMAP_TURBO)[:, 0]
    colors = np.full((layers, 4), alpha, dtype=np.float32)
    colors[:, :3] = bgr[:, ::-1] / 255.0
    return colors


def depth_message(frame: OccupancyFrame, frame_id: str, depth_m: np.ndarray) -> Image:
    """A depth image (REP 118) of float32 [height, width] metres, in a camera's optical frame, at the frame's stamp."""
    height, width = depth_m.shape
    message = Image(
        header=Header(stamp=time_message(frame.stamp_ns), frame_id=frame_id),
        height=height,
        width=width,
        encoding="32FC1",
        is_bigendian=False,
        step=_WORD * width,
    )
    message.data = _byte_array(depth_m.astype("<f4", copy=False))
    return message


def info_message(frame: OccupancyFrame, frame_id: str, camera: Camera) -> CameraInfo:
    """The camera_info of a rectified image of a camera, at the frame's stamp."""
    k = camera.intrinsic
    return CameraInfo(
        header=Header(stamp=time_message(frame.stamp_ns), frame_id=frame_id),
        height=camera.height_px,
        width=camera.width_px,
        distortion_model="plumb_bob",
        d=[0.0] * 5,
        k=k.ravel(),
        r=np.eye(3).ravel(),
        p=np.column_stack([k, np.zeros(3)]).ravel(),
    )


def _byte_array(values: np.ndarray) -> array.array:
    """What rclpy takes as uint8[] without a loop over its bytes; assigned to a message, not given to its constructor,
    which would copy it."""
    data = array.array("B")
    data.frombytes(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
    return data


def labels_message(frame: OccupancyFrame) -> UInt8MultiArray:
    """The dense labels [X, Y, Z] in C order.

    The message type has no header, so the labels of its dimensions carry stamp, frame and grid:
    ``x stamp_ns=1532402927612460000 frame_id=base_link lower_m=-40.0 voxel_size_m=0.4``, ``y lower_m=...``, ``z ...``.
    ``labels_from_message`` reads them back.
    """
    shape = frame.grid.shape
    strides = (shape[0] * shape[1] * shape[2], shape[1] * shape[2], shape[2])
    message = UInt8MultiArray()
    for axis, name in enumerate("xyz"):
        head = f"x stamp_ns={frame.stamp_ns} frame_id={frame.frame_id}" if axis == 0 else name
        label = f"{head} lower_m={frame.grid.lower_m[axis]!r} voxel_size_m={frame.grid.voxel_size_m!r}"
        message.layout.dim.append(MultiArrayDimension(label=label, size=shape[axis], stride=strides[axis]))
    message.data = _byte_array(frame.labels)
    return message


def labels_from_message(message: UInt8MultiArray) -> OccupancyFrame:
    """The frame (stamp, frame, grid, labels) that ``labels_message`` wrote.

    Raises:
        ValueError: the message was not written by ``labels_message``.
    """
    axes = [dict(pair.split("=", 1) for pair in dim.label.split()[1:]) for dim in message.layout.dim]
    try:
        size_m = float(axes[0]["voxel_size_m"])
        lower_m = tuple(float(axis["lower_m"]) for axis in axes)
        shape = tuple(dim.size for dim in message.layout.dim)
        upper_m = tuple(low + n * size_m for low, n in zip(lower_m, shape, strict=True))
        labels = np.frombuffer(message.data, dtype=np.uint8).reshape(shape)
        stamp_ns, frame_id = int(axes[0]["stamp_ns"]), axes[0]["frame_id"]
    except (KeyError, IndexError) as error:
        raise ValueError(f"the message's layout lacks {error}; it is not one of the node's ~/labels") from None
    return OccupancyFrame(stamp_ns, frame_id, VoxelGrid(lower_m, upper_m, size_m), labels)


BLOCKING_CLASSES: tuple[str, ...] = tuple(c.name for c in CLASSES if c.blocks_vehicle)
"""Classes that block a vehicle wherever they stand in its height band, unless told otherwise."""


def costmap_message(
    frame: OccupancyFrame, min_height_m: float, max_height_m: float, blocking: Sequence[str] = BLOCKING_CLASSES
) -> OccupancyGrid:
    """What blocks a vehicle: 100 where a blocking class has a voxel in the height band, 0 where anything else was seen
    (ground, or something above the band), -1 where the whole column is empty."""
    grid = frame.grid
    heights_m = grid.axis_centres_m(2)
    band = (heights_m >= min_height_m) & (heights_m <= max_height_m)
    blocked = np.isin(CLASS_NAMES, blocking)[frame.labels[:, :, band]].any(axis=2)
    seen = (frame.labels != FREE).any(axis=2)
    cells = np.where(blocked, BLOCKED, np.where(seen, PASSABLE, UNKNOWN)).astype(np.int8)  # [X, Y]
    message = OccupancyGrid(header=header_message(frame))
    message.info.map_load_time = message.header.stamp
    message.info.resolution = grid.voxel_size_m
    message.info.width, message.info.height = grid.shape[0], grid.shape[1]
    message.info.origin.position.x, message.info.origin.position.y = grid.lower_m[0], grid.lower_m[1]
    message.info.origin.orientation.w = 1.0
    message.data = array.array("b", cells.T.tobytes())  # rows run along x
    return message


def marker_bytes(frame: OccupancyFrame, cubes: Sequence[cdr.CubeList], delete_all: bool) -> bytes:
    """The serialised MarkerArray of the frame's cube lists."""
    return cdr.marker_array(frame.stamp_ns, frame.frame_id, cubes, delete_all)


def mesh_bytes(frame: OccupancyFrame, mesh: Mesh | None) -> bytes:
    """The serialised Marker of a frame's mesh; an empty one, or none, deletes the mesh before."""
    corners_m, colors_rgba = np.empty((0, 3)), np.empty((0, 4))
    if mesh is not None:
        corners = mesh.triangles.ravel()
        corners_m, colors_rgba = mesh.vertices_m[corners], _OPAQUE_RGBA[mesh.labels[corners]]
    return cdr.triangle_marker(frame.stamp_ns, frame.frame_id, cdr.TriangleList("mesh", corners_m, colors_rgba))
