# SPDX-License-Identifier: Apache-2.0
"""Messages in and out, against rclpy's own (de)serialisation and against values worked out by hand."""

from __future__ import annotations

import array

import cv2
import numpy as np
import pytest
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import Point, Pose, Quaternion, Vector3
from hypothesis import given
from hypothesis import strategies as st
from nav_msgs.msg import Odometry
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import ColorRGBA, Header
from visualization_msgs.msg import Marker, MarkerArray

from benchmarks.outputs import obvious_mesh
from occflownet_core.errors import ImageError
from occflownet_core.grid import OCC3D_GRID, VoxelGrid
from occflownet_core.labels import CLASS_NAMES, COLORS_RGB, FREE
from occflownet_core.mesh import Mesh
from occflownet_core.occupancy_frame import OccupancyFrame
from occflownet_core.preprocess import ImageTransform
from occflownet_ros import cdr, conversions

STAMP_NS = 1_532_402_927_612_460_001
GRID = VoxelGrid((-1.0, -2.0, 0.0), (1.0, 2.0, 1.5), 0.5)  # 4 x 8 x 3 cells


def frame_of(labels: np.ndarray, grid: VoxelGrid = GRID, **extra) -> OccupancyFrame:
    return OccupancyFrame(STAMP_NS, "base_link", grid, labels, **extra)


def empty(grid: VoxelGrid = GRID) -> np.ndarray:
    return np.full(grid.shape, FREE, dtype=np.uint8)


def slow_marker_array(frame: OccupancyFrame, alpha: float, delete_all: bool, coloring: str = "class") -> MarkerArray:
    """The slow, obvious twin: one Point object after another, cells visited one by one."""
    header = Header(stamp=Time(sec=STAMP_NS // 10**9, nanosec=STAMP_NS % 10**9), frame_id=frame.frame_id)
    identity = Pose(orientation=Quaternion(w=1.0))
    message = MarkerArray()
    if delete_all:
        message.markers.append(Marker(header=header, action=Marker.DELETEALL, pose=identity))
    size, shape = frame.grid.voxel_size_m, frame.grid.shape
    for label, name in enumerate(CLASS_NAMES[:FREE]):
        marker = Marker(header=header, ns=name, id=label, type=Marker.CUBE_LIST, action=Marker.ADD, pose=identity)
        marker.scale = Vector3(x=size, y=size, z=size)
        red, green, blue = (COLORS_RGB[label] / 255.0).tolist()
        marker.color = ColorRGBA(r=red, g=green, b=blue, a=alpha)
        marker.lifetime = Duration()
        for cell in zip(*np.nonzero(frame.labels == label), strict=True):
            neighbours = [
                tuple(np.add(cell, step))
                for step in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
            ]
            if all(
                all(0 <= i < n for i, n in zip(at, shape, strict=True)) and frame.labels[at] != FREE
                for at in neighbours
            ):
                continue
            x, y, z = (float(frame.grid.lower_m[axis] + (cell[axis] + 0.5) * size) for axis in range(3))
            marker.points.append(Point(x=x, y=y, z=z))
            if coloring == "height":
                share = (z - frame.grid.lower_m[2]) / (frame.grid.upper_m[2] - frame.grid.lower_m[2])
                bgr = cv2.applyColorMap(np.full((1, 1), round(255 * share), np.uint8), cv2.COLORMAP_TURBO)[0, 0]
                blue, green, red = (bgr / 255.0).tolist()
                marker.colors.append(ColorRGBA(r=red, g=green, b=blue, a=alpha))
        if marker.points:
            message.markers.append(marker)
    return message


@given(
    st.integers(0, 2**32 - 1),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from(["base_link", "ego", "a/b_c", ""]),
    st.sampled_from(["class", "height"]),
)
def test_marker_bytes_equal_the_slow_twin(seed, free_share, delete_all, frame_id, coloring):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(GRID.shape) < free_share, FREE, rng.integers(0, FREE, GRID.shape)).astype(np.uint8)
    frame = OccupancyFrame(STAMP_NS, frame_id, GRID, labels)
    data = conversions.marker_bytes(frame, conversions.class_cubes(frame, 0.75, coloring), delete_all)
    twin = slow_marker_array(frame, 0.75, delete_all, coloring)
    # Serialised once, so that the twin's colours are float32 too.
    assert deserialize_message(data, MarkerArray) == deserialize_message(serialize_message(twin), MarkerArray)
    assert sum(len(m.points) for m in twin.markers) or (labels == FREE).all()


def test_marker_bytes_are_as_long_as_rclpys_own():
    labels = empty()
    labels[0, 0, 0] = 4
    frame = frame_of(labels)
    data = conversions.marker_bytes(frame, conversions.class_cubes(frame, 1.0), True)
    theirs = serialize_message(slow_marker_array(frame, 1.0, True))
    # Not compared byte by byte: rclpy leaves in its padding what was in memory.
    assert len(data) == len(theirs)


def slow_mesh_marker(mesh: Mesh) -> Marker:
    """The slow, obvious twin, with all that a marker has beside its corners."""
    marker = obvious_mesh(mesh)
    stamp = Time(sec=STAMP_NS // 10**9, nanosec=STAMP_NS % 10**9)
    marker.header, marker.pose = Header(stamp=stamp, frame_id="base_link"), Pose(orientation=Quaternion(w=1.0))
    marker.action = Marker.ADD if len(mesh.triangles) else Marker.DELETE
    marker.color = ColorRGBA(r=1.0, g=1.0, b=1.0, a=1.0)
    return marker


@pytest.mark.parametrize("triangles", [0, 1, 50])
def test_mesh_bytes_equal_the_slow_twin(triangles):
    rng = np.random.default_rng(triangles)
    vertices_m, labels = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(0, FREE, 20, dtype=np.uint8)
    mesh = Mesh(vertices_m, rng.integers(0, 20, (triangles, 3), dtype=np.int32), labels, None)
    data = conversions.mesh_bytes(frame_of(empty()), mesh)
    theirs = serialize_message(slow_mesh_marker(mesh))
    assert deserialize_message(data, Marker) == deserialize_message(theirs, Marker) and len(data) == len(theirs)


def test_no_mesh_deletes_the_one_before():
    marker = deserialize_message(conversions.mesh_bytes(frame_of(empty()), None), Marker)
    assert (marker.ns, marker.id, marker.action, len(marker.points)) == ("mesh", 0, Marker.DELETE, 0)


def test_height_runs_from_blue_to_red_as_others_draw_it():
    colors = conversions.height_colors_rgba(16, 0.5)
    assert colors.shape == (16, 4) and (colors[:, 3] == 0.5).all()
    red, green, blue = colors[:, :3].T
    assert blue[1] > 2 * red[1] and red[14] > 2 * blue[14] and green[8] > max(red[8], blue[8])
    matplotlib = pytest.importorskip("matplotlib")
    theirs = matplotlib.colormaps["turbo"]((np.arange(16) + 0.5) / 16)[:, :3]
    np.testing.assert_allclose(colors[:, :3], theirs, atol=0.02)


def test_cubes_of_one_height_share_their_color():
    labels = empty()
    labels[0, 0, 0], labels[3, 5, 0], labels[1, 1, 2] = 4, 4, 16
    car, vegetation = conversions.class_cubes(frame_of(labels), 1.0, "height")
    layers = conversions.height_colors_rgba(3, 1.0)
    assert (car.colors_rgba == layers[0]).all() and len(car.colors_rgba) == 2
    assert (vegetation.colors_rgba == layers[2]).all() and not np.array_equal(layers[0], layers[2])


def test_cloud_holds_every_occupied_voxel():
    labels = empty()
    labels[0, 0, 0], labels[3, 7, 2] = 4, 16
    probability = np.linspace(0, 1, labels.size, dtype=np.float32).reshape(labels.shape)
    message = conversions.cloud_message(frame_of(labels, probability=probability))
    message = deserialize_message(serialize_message(message), type(message))
    assert conversions.nanoseconds(message.header.stamp) == STAMP_NS and message.header.frame_id == "base_link"
    assert (message.width, message.height, message.point_step, message.row_step) == (2, 1, 24, 48)
    formats = {7: "<f4", 2: "u1"}
    layout = np.dtype(
        {
            "names": [f.name for f in message.fields],
            "formats": [formats[f.datatype] for f in message.fields],
            "offsets": [f.offset for f in message.fields],
            "itemsize": message.point_step,
        }
    )
    points = np.frombuffer(message.data, dtype=layout)
    assert layout.names == ("x", "y", "z", "rgb", "probability", "label")
    assert points["x"].tolist() == [-0.75, 0.75]
    assert points["y"].tolist() == [-1.75, 1.75]
    assert points["z"].tolist() == [0.25, 1.25]
    assert points["label"].tolist() == [4, 16]
    assert points["probability"].tolist() == [0.0, 1.0]
    # car is (255, 158, 0), vegetation (0, 175, 0): 0x00RRGGBB, as PCL packs it
    assert points["rgb"].view("<u4").tolist() == [0xFF9E00, 0x00AF00]


def test_cloud_carries_velocity_where_there_is_one():
    labels = empty()
    labels[1, 2, 1] = 4
    velocity = np.zeros((*GRID.shape, 3), dtype=np.float32)
    velocity[1, 2, 1] = (3, -2, 0.5)
    message = conversions.cloud_message(frame_of(labels, velocity_mps=velocity))
    offsets = {f.name: f.offset for f in message.fields}
    values = [np.frombuffer(message.data, "<f4", 1, offsets[name])[0] for name in ("vx", "vy", "vz")]
    assert values == [3, -2, 0.5]
    assert np.frombuffer(message.data, "<f4", 1, offsets["probability"])[0] == 1


def test_empty_space_gives_empty_messages():
    frame = frame_of(empty())
    assert conversions.cloud_message(frame).width == 0
    assert conversions.class_cubes(frame, 1.0) == []
    markers = deserialize_message(conversions.marker_bytes(frame, [], True), MarkerArray).markers
    assert [m.action for m in markers] == [Marker.DELETEALL]


@given(st.integers(0, 2**32 - 1))
def test_labels_come_back_with_stamp_frame_and_grid(seed):
    labels = np.random.default_rng(seed).integers(0, FREE + 1, GRID.shape, dtype=np.uint8)
    message = conversions.labels_message(frame_of(labels))
    message = deserialize_message(serialize_message(message), type(message))
    assert [dim.size for dim in message.layout.dim] == [4, 8, 3]
    assert [dim.stride for dim in message.layout.dim] == [96, 24, 3]
    assert message.data[2 * 24 + 5 * 3 + 1] == labels[2, 5, 1]
    frame = conversions.labels_from_message(message)
    assert (frame.stamp_ns, frame.frame_id, frame.grid) == (STAMP_NS, "base_link", GRID)
    assert np.array_equal(frame.labels, labels)


def test_labels_of_the_benchmark_grid_and_of_strangers():
    frame = conversions.labels_from_message(conversions.labels_message(frame_of(empty(OCC3D_GRID), OCC3D_GRID)))
    assert frame.grid == OCC3D_GRID
    message = conversions.labels_message(frame_of(empty()))
    message.layout.dim[0].label = "x"
    with pytest.raises(ValueError, match="not one of the node's ~/labels"):
        conversions.labels_from_message(message)


def test_costmap_knows_blocked_passable_and_unknown():
    labels = empty()
    car, road, tree = 4, 11, 16
    labels[0, 0, 0] = road  # seen ground
    labels[1, 0, 0] = car  # below the band: centre at 0.25 m
    labels[2, 0, 1] = car  # in the band
    labels[3, 0, 2] = tree  # above the band: centre at 1.25 m
    labels[3, 1, 1] = road  # a ramp in the band does not block
    message = conversions.costmap_message(frame_of(labels), min_height_m=0.5, max_height_m=1.0)
    assert (message.info.width, message.info.height, message.info.resolution) == (4, 8, 0.5)
    assert (message.info.origin.position.x, message.info.origin.position.y) == (-1.0, -2.0)
    assert message.data[:8].tolist() == [0, 0, 100, 0, -1, -1, -1, 0]  # row y = 0, then y = 1; along x
    assert set(message.data[8:]) == {-1}
    assert message.header.frame_id == "base_link"
    message = conversions.costmap_message(frame_of(labels), 0.5, 1.0, ["driveable_surface"])
    assert message.data[:8].tolist() == [0, 0, 0, 0, -1, -1, -1, 100]  # a rover that must keep off the road


def test_raw_images_lose_their_padding_and_become_rgb():
    transform = ImageTransform.fit(4, 2, 4, 2)
    rgb = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    padded = np.full((2, 16), 255, dtype=np.uint8)
    padded[:, :12] = rgb.reshape(2, 12)
    message = Image(height=2, width=4, encoding="rgb8", step=16, data=array.array("B", padded.tobytes()))
    assert np.array_equal(conversions.network_image(message, transform), rgb)
    message.encoding = "bgr8"
    assert np.array_equal(conversions.network_image(message, transform), rgb[:, :, ::-1])
    grey = np.arange(8, dtype=np.uint8).reshape(2, 4)
    message = Image(height=2, width=4, encoding="mono8", step=4, data=array.array("B", grey.tobytes()))
    assert np.array_equal(conversions.network_image(message, transform), np.repeat(grey[:, :, None], 3, axis=2))


@pytest.mark.parametrize(("encoding", "is_bigendian"), [("bgr16", True), ("rgb16", False), ("rgba8", False)])
def test_other_encodings_become_the_same_image(encoding, is_bigendian):
    rgb = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    ordered = rgb[:, :, ::-1] if encoding.startswith("bgr") else rgb
    if encoding == "rgba8":
        raw = np.dstack([ordered, np.full((2, 4), 7, np.uint8)])
    else:
        raw = (ordered.astype(np.uint16) * 256 + 99).astype(">u2" if is_bigendian else "<u2")
    data = array.array("B", raw.tobytes())
    message = Image(height=2, width=4, encoding=encoding, step=len(data) // 2, is_bigendian=is_bigendian, data=data)
    assert np.array_equal(conversions.network_image(message, ImageTransform.fit(4, 2, 4, 2)), rgb)


@pytest.mark.parametrize(("pattern", "red"), [("rggb", (0, 0)), ("bggr", (1, 1)), ("gbrg", (1, 0)), ("grbg", (0, 1))])
def test_bayer_patterns_are_named_by_their_first_two_rows(pattern, red):
    """A sensor that sees only red: its red cells are bright, and the image's middle is red and nothing else."""
    cells = np.zeros((8, 8), np.uint8)
    cells[red[0] :: 2, red[1] :: 2] = 200
    message = Image(height=8, width=8, encoding=f"bayer_{pattern}8", step=8, data=array.array("B", cells.tobytes()))
    middle = conversions.network_image(message, ImageTransform.fit(8, 8, 8, 8))[2:6, 2:6]
    assert (middle == (200, 0, 0)).all()


def test_yuv_images_are_grey_where_their_colour_is_neutral():
    uyvy = np.empty((2, 4, 2), np.uint8)
    uyvy[..., 0], uyvy[..., 1] = 128, np.array([16, 235, 16, 235])  # video range: black, white
    message = Image(height=2, width=4, encoding="yuv422", step=8, data=array.array("B", uyvy.tobytes()))
    image = conversions.network_image(message, ImageTransform.fit(4, 2, 4, 2))
    assert image[0].tolist() == [[0, 0, 0], [255, 255, 255]] * 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"encoding": "16UC1"}, "encoding '16UC1' are not supported; send one of bgr8, "),
        ({"step": 11}, "rows of 11 bytes holds 24 bytes"),
        ({"data": array.array("B", bytes(23))}, "holds 23 bytes, expected 24"),
        ({"data": array.array("B")}, "holds 0 bytes"),
        ({"height": 0, "data": array.array("B")}, "holds 0 bytes"),
        ({"width": 3, "step": 12}, "the image is 3 x 2 but 4 x 2 was announced"),
    ],
)
def test_broken_raw_images_are_refused(change, sentence):
    message = Image(height=2, width=4, encoding="rgb8", step=12, data=array.array("B", bytes(24)))
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(ImageError, match=sentence):
        conversions.network_image(message, ImageTransform.fit(4, 2, 4, 2))


@given(st.binary(max_size=300))
def test_garbage_never_does_more_than_an_image_error(data):
    message = CompressedImage(format="jpeg", data=array.array("B", data))
    with pytest.raises(ImageError):
        conversions.network_image(message, ImageTransform.fit(1600, 900, 352, 128))


def test_jpeg_of_a_message_is_what_opencv_decodes():
    image = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 16, 3), dtype=np.uint8), (352, 128))
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    message = CompressedImage(format="jpeg", data=array.array("B", data.tobytes()))
    decoded = conversions.network_image(message, ImageTransform.fit(352, 128, 352, 128))
    assert np.array_equal(decoded[:, :, ::-1], cv2.imdecode(data, cv2.IMREAD_COLOR))


def test_camera_info_gives_the_rectified_intrinsics():
    message = CameraInfo(width=1600, height=900)
    message.header.frame_id = "CAM_FRONT"
    message.k = [1300.0, 0, 810, 0, 1301, 490, 0, 0, 1]
    assert conversions.intrinsics_from_info(message).array()[0].tolist() == [1300, 0, 810]
    message.p = [1260.0, 0, 800, 0, 0, 1261, 480, 0, 0, 0, 1, 0]
    intrinsics = conversions.intrinsics_from_info(message)
    assert intrinsics.array().tolist() == [[1260, 0, 800], [0, 1261, 480], [0, 0, 1]]
    assert (intrinsics.frame_id, intrinsics.width_px, intrinsics.height_px) == ("CAM_FRONT", 1600, 900)


def test_odometry_gives_position_and_scalar_first_quaternion():
    message = Odometry()
    message.pose.pose.position = Point(x=1.0, y=2.0, z=3.0)
    message.pose.pose.orientation = Quaternion(x=0.1, y=0.2, z=0.3, w=0.9)
    position, quaternion = conversions.pose_from_odometry(message)
    assert position.tolist() == [1, 2, 3] and quaternion.tolist() == [0.9, 0.1, 0.2, 0.3]


@given(st.integers(0, 2**31 * 10**9 - 1))
def test_stamps_round_trip(stamp_ns):
    assert conversions.nanoseconds(conversions.time_message(stamp_ns)) == stamp_ns


def test_a_long_list_of_cubes_arrives_whole():
    centres_m = np.random.default_rng(0).random((40_000, 3))
    data = cdr.marker_array(0, "base_link", [cdr.CubeList("car", 4, centres_m, 0.4, (1, 0, 0, 1))], False)
    points = deserialize_message(data, MarkerArray).markers[0].points
    assert len(points) == 40_000
    assert (points[-1].x, points[-1].y, points[-1].z) == tuple(centres_m[-1])
