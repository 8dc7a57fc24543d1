# SPDX-License-Identifier: Apache-2.0
"""Damaged, lying and random messages: every decoder gives a value that holds what it promises, or one OccflownetError.

Never another exception, never memory for a size that a message merely claims (the limit below), never a crash.
"""

from __future__ import annotations

import array
import contextlib
import resource
from types import SimpleNamespace

import cv2
import numpy as np
import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from nav_msgs.msg import Odometry
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import BagError, CalibrationError, GeometryError, ImageError, OccflownetError
from occflownet_core.grid import VoxelGrid
from occflownet_core.lift_tables import DepthBins, LiftSpec, build_lift_tables
from occflownet_core.preprocess import ImageTransform
from occflownet_ros import conversions, nuscenes_messages
from occflownet_ros.bag import BagMessage
from occflownet_ros.bag_decoding import decode, stamp_of
from occflownet_ros.bag_survey import recorded_pose
from occflownet_ros.calibration_source import CalibrationSource
from occflownet_ros.camera_model import rectified_jpeg
from occflownet_ros.ego_motion import EgoMotion, PoseBuffer
from occflownet_ros.image_encodings import ENCODINGS
from occflownet_ros.point_cloud import deskewed, sweep_of_cloud
from occflownet_ros.topic_map import LidarTopic
from occflownet_ros.transform_tree import PoseTrack, TransformTree

WIDTH_PX, HEIGHT_PX = 160, 96
NETWORK = ImageTransform.fit(WIDTH_PX, HEIGHT_PX, 64, 32)
SHIFT = tuple(
    np.meshgrid(np.arange(64, dtype=np.float32) + 3, np.arange(32, dtype=np.float32))
)  # a rectification: any table will do
STAMP_NS = 1_532_402_927_612_460_000
ROOM_BYTES = 1 << 29

uint32 = st.one_of(
    st.integers(0, 40), st.sampled_from([WIDTH_PX, HEIGHT_PX, 2**16, 2**31 - 1, 2**32 - 1]), st.integers(0, 2**32 - 1)
)
number = st.one_of(
    st.floats(),
    st.sampled_from([0.0, 1.0, -1.0, 1260.0, 80.0, 48.0, 1e-300, 1e300, float("nan"), float("inf")]),
)


@pytest.fixture(autouse=True, scope="module")
def _little_room():
    """An allocation of more than half a gigabyte fails here, as it would on a small vehicle computer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """The message cut short, with bytes overwritten, taken out or put in, a length replaced by an absurd one, or noise."""
    how = draw(st.sampled_from(["cut", "overwrite", "remove", "insert", "absurd", "noise"]))
    at = draw(st.integers(0, len(whole) - 1))
    if how == "cut":
        return whole[:at]
    if how == "remove":
        return whole[:at] + whole[at + draw(st.integers(1, 64)) :]
    if how == "insert":
        return whole[:at] + draw(st.binary(min_size=1, max_size=16)) + whole[at:]
    if how == "absurd":
        at -= at % 4
        return (
            whole[:at]
            + draw(st.sampled_from([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0"]))
            + whole[at + 4 :]
        )
    if how == "noise":
        return draw(st.binary(max_size=300))
    changed = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        changed[draw(st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    return bytes(changed)


def picture() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    return cv2.resize(coarse, (WIDTH_PX, HEIGHT_PX), interpolation=cv2.INTER_CUBIC)


JPEG = cv2.imencode(".jpg", picture())[1].tobytes()
PROGRESSIVE = cv2.imencode(".jpg", picture(), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 2])[1]
PNG = cv2.imencode(".png", picture())[1].tobytes()


def is_image_or_refused(message, transform: ImageTransform = NETWORK) -> None:
    for rectification in (None, SHIFT):
        try:
            image = conversions.network_image(message, transform, rectification)
        except ImageError:
            continue
        assert image.dtype == np.uint8 and image.shape == (32, 64, 3)


@given(st.one_of(damaged(JPEG), damaged(PROGRESSIVE.tobytes()), damaged(PNG)))
@example(b"\xff\xd8" + b"\xff\xd9")
@example(JPEG[:2] + JPEG[-2:])
@example(b"\x89PNG\r\n\x1a\n")
@example(b"BM" + bytes(100))
@example(b"P6 99999 99999 255\n")
def test_compressed_images(data):
    message = CompressedImage(format="jpeg", data=array.array("B", data))
    is_image_or_refused(message)
    camera = SimpleNamespace(width_px=WIDTH_PX, height_px=HEIGHT_PX, frame_id="CAM", changes_images=False)
    try:
        jpeg, _ = rectified_jpeg(SimpleNamespace(format="jpeg", data=np.frombuffer(data, np.uint8)), camera, True, 90)
        assert jpeg[:2] == b"\xff\xd8"
    except ImageError:
        pass


@given(
    st.one_of(st.sampled_from(ENCODINGS), st.text(max_size=8)),
    st.tuples(uint32, uint32, uint32),
    st.booleans(),
    st.binary(max_size=256),
    st.booleans(),
)
@example("rgb8", (2**32 - 1, 2**32 - 1, 2**32 - 1), False, b"", True)
@example("mono8", (1, 200, 1), False, bytes(200), True)
@example("mono8", (200, 1, 200), False, bytes(200), True)
@example("bayer_rggb8", (1, 1, 1), False, b"x", True)
@example("yuv422", (3, 3, 6), False, bytes(18), True)
def test_raw_images(encoding, sizes, is_bigendian, data, was_announced):
    width, height, step = sizes
    message = Image(encoding=encoding, width=width, height=height, step=step, is_bigendian=is_bigendian)
    message.data = array.array("B", data)
    try:
        # Whether camera_info tells the same lie or not.
        transform = ImageTransform.fit(width, height, 64, 32) if was_announced else NETWORK
    except ImageError:
        return
    is_image_or_refused(message, transform)


@given(st.sampled_from(ENCODINGS), st.integers(1, 9), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_raw_images_of_every_encoding_and_size_that_do_hold_what_they_say(encoding, width, height, padding, announced):
    depth = 2 if encoding.endswith("16") else 1
    channels = {"rgb": 3, "bgr": 3, "rgba": 4, "bgra": 4, "8UC3": 3, "8UC4": 4, "yuv422": 2, "uyvy": 2}
    channels |= {"yuv422_yuy2": 2, "yuyv": 2}
    step = width * channels.get(encoding, channels.get(encoding.rstrip("168"), 1)) * depth + padding
    message = Image(encoding=encoding, width=width, height=height, step=step)
    message.data = array.array("B", bytes(step * height))
    is_image_or_refused(message, ImageTransform.fit(width, height, 64, 32) if announced else NETWORK)


CAMERA = Camera("CAM", WIDTH_PX, HEIGHT_PX, np.array([[80.0, 0, 80], [0, 80, 48], [0, 0, 1]]), np.eye(4))
LIFT = LiftSpec(VoxelGrid((0, 0, 0), (4, 4, 4), 1.0), DepthBins(1.0, 5.0, 1.0), feature_height=2, feature_width=4)


COEFFICIENTS = {"plumb_bob": 5, "rational_polynomial": 8, "thin_prism": 12, "equidistant": 4, "": 0, "mystery": 3}


@given(
    st.sampled_from(sorted(COEFFICIENTS)),
    st.lists(st.tuples(st.sampled_from("krpd"), st.integers(0, 11), number), max_size=4),
    st.one_of(st.just((WIDTH_PX, HEIGHT_PX)), st.tuples(uint32, uint32)),
    st.sampled_from([0, 0, 0, 1, -1, 9]),
    st.booleans(),
)
@example("plumb_bob", [("p", 0, 80.0), ("p", 5, 1e-300)], (WIDTH_PX, HEIGHT_PX), 0, True)
@example("equidistant", [("k", 0, 0.0), ("k", 4, 0.0)], (WIDTH_PX, HEIGHT_PX), 0, True)
@example("plumb_bob", [("r", 0, 0.0), ("r", 4, 0.0)], (WIDTH_PX, HEIGHT_PX), 0, True)
@example("plumb_bob", [], (2**32 - 1, 2**32 - 1), 0, True)
def test_camera_info_makes_a_rig_with_tables_or_a_sentence(model, changes, size, more_coefficients, rectify):
    """All that the node does with it: assembling the rig, lift tables, and the maps that rectify."""
    values = {
        "k": [80.0, 0, 80, 0, 80, 48, 0, 0, 1],
        "r": [1.0, 0, 0, 0, 1, 0, 0, 0, 1],
        "p": [80.0, 0, 80, 0, 0, 80, 48, 0, 0, 0, 1, 0],
        "d": [0.01] * max(COEFFICIENTS[model] + more_coefficients, 0),
    }
    for name, place, value in changes:
        if values[name]:
            values[name][place % len(values[name])] = value
    message = CameraInfo(width=size[0], height=size[1], distortion_model=model, **values)
    source = CalibrationSource(("CAM",), ("/c",), (CAMERA,), None, False)
    try:
        source.set_intrinsics(0, conversions.intrinsics_from_info(message, rectify))
        if source.rig is None:
            assert source.problem
            return
        transform = ImageTransform.fit(source.rig[0].width_px, source.rig[0].height_px, 64, 32)
        tables = build_lift_tables(CameraRig((transform.camera(source.rig[0]),)), LIFT)
        maps = None if source.models[0] is None else source.models[0].network_maps(transform)
    except OccflownetError:
        assert changes or more_coefficients or model == "mystery" or size != (WIDTH_PX, HEIGHT_PX)
        return
    assert np.isfinite(tables.depth_weight).all() and (tables.depth_weight >= 0).all()
    assert maps is None or maps[0].shape == (32, 64, 2)


@given(
    st.lists(
        st.tuples(st.integers(0, 400), st.lists(number, min_size=7, max_size=7), st.booleans(), st.booleans()),
        max_size=12,
    )
)
def test_odometry_moves_the_memory_rigidly_or_not_at_all(messages):
    buffer, ego_motion = PoseBuffer(200.0), EgoMotion(2.0, 60.0, 3.0)
    for at_ms, values, good_position, good_rotation in messages:
        message = Odometry()
        p, q = message.pose.pose.position, message.pose.pose.orientation
        p.x, p.y, p.z = (0.0, 0.0, 0.0) if good_position else values[:3]
        q.x, q.y, q.z, q.w = (0.0, 0.0, 0.0, 1.0) if good_rotation else values[3:]
        stamp_ns = STAMP_NS + at_ms * 1_000_000
        with contextlib.suppress(GeometryError):
            buffer.add(stamp_ns, *conversions.pose_from_odometry(message))
        motion = ego_motion.step(stamp_ns + 7_000_000, buffer.at(stamp_ns + 7_000_000))
        if motion is not None:
            poses.require_rigid(motion, "motion")
            assert np.linalg.norm(motion[:3, 3]) < 60 * 0.4 + 1
    assert buffer.counters["received"] == len(messages)


frame = st.sampled_from(["base_link", "/base_link", "odom", "map", "lidar", "camera", ""])


@given(
    st.lists(
        st.tuples(frame, frame, st.lists(number, min_size=7, max_size=7), st.integers(0, 5), st.booleans()), max_size=12
    ),
    st.tuples(frame, frame),
)
@example([("a", "b", [1.0] * 7, 0, True), ("b", "a", [1.0] * 7, 0, True)], ("a", "c"))
@example([("a", "a", [1.0] * 7, 0, True)], ("a", "b"))
def test_transforms_lead_somewhere_or_nowhere_even_in_a_ring(transforms, ends):
    tree, refused = TransformTree(), 0
    for parent, child, values, at, is_static in transforms:
        translation = SimpleNamespace(**dict(zip("xyz", values[:3], strict=True)))
        rotation = SimpleNamespace(**dict(zip("xyzw", values[3:], strict=True)))
        try:
            pose = recorded_pose(translation, rotation)
        except GeometryError:
            refused += 1
            continue
        tree.add(parent, child, pose if is_static else PoseTrack([(STAMP_NS + at, pose)], 10**9))
    path = tree.path(*ends)
    moment = path.at(STAMP_NS) if path is not None else None
    assert refused <= len(transforms)
    assert moment is None or np.isfinite(moment.matrix).all()


def cloud(names, formats, offsets, **values) -> SimpleNamespace:
    fields = [
        SimpleNamespace(name=n, datatype=f, offset=o, count=1) for n, f, o in zip(names, formats, offsets, strict=True)
    ]
    return SimpleNamespace(fields=fields, **values)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["x", "y", "z", "intensity", "ring", "label", "t", "", "x "]),
            st.integers(0, 10),
            st.one_of(st.integers(0, 32), uint32),
        ),
        max_size=8,
    ),
    st.tuples(uint32, uint32),
    st.tuples(uint32, uint32),
    st.booleans(),
    st.binary(max_size=256),
    st.booleans(),
    st.booleans(),
)
@example([("x", 8, 0), ("y", 8, 8), ("z", 8, 16)], (2**32 - 1, 2**32 - 1), (24, 0), False, b"", False, False)
@example([("x", 7, 0), ("y", 7, 4), ("z", 7, 2**32 - 1)], (1, 1), (12, 12), False, bytes(12), False, False)
@example([("x", 7, 0), ("y", 7, 4), ("z", 7, 8), ("t", 8, 12)], (2, 1), (20, 40), False, b"\x7f" * 40, False, True)
def test_point_clouds(fields, size, steps, is_bigendian, data, with_labels, with_times):
    message = cloud(
        *(zip(*fields, strict=True) if fields else ((), (), ())),
        width=size[0], height=size[1], point_step=steps[0], row_step=steps[1], is_bigendian=is_bigendian,
        data=np.frombuffer(data, np.uint8),
    )  # fmt: skip
    topic = LidarTopic("/points", "label" if with_labels else "", {}, "t" if with_times else "", 1e-9)
    try:
        sweep = sweep_of_cloud(message, STAMP_NS, topic)
    except OccflownetError:
        return
    assert np.isfinite(sweep.points[:, :3]).all() and sweep.points.shape[1] == 5
    assert (sweep.raw_label is not None) == with_labels and (sweep.time_ns is not None) == with_times
    if with_times:
        assert np.isfinite(deskewed(sweep, STAMP_NS, lambda stamp_ns: np.eye(4))[:, :3]).all()


POSE = poses.RecordedPose((1.0, 2.0, 3.0), (1.0, 0.0, 0.0, 0.0))
SERIALISED = {
    "sensor_msgs/msg/CompressedImage": nuscenes_messages.compressed_image(STAMP_NS, "CAM", JPEG[:40]),
    "sensor_msgs/msg/CameraInfo": nuscenes_messages.camera_info(STAMP_NS, CAMERA),
    "sensor_msgs/msg/PointCloud2": nuscenes_messages.point_cloud(STAMP_NS, "LIDAR", np.ones((3, 5), np.float32)),
    "nav_msgs/msg/Odometry": nuscenes_messages.odometry(STAMP_NS, POSE, np.zeros(3), np.zeros(3)),
    "tf2_msgs/msg/TFMessage": nuscenes_messages.transforms(STAMP_NS, "base_link", {"CAM": POSE}),
    "std_msgs/msg/UInt8MultiArray": nuscenes_messages.label_array(np.zeros((2, 3, 4), np.uint8)),
}


@given(st.sampled_from(sorted(SERIALISED)).flatmap(lambda kind: st.tuples(st.just(kind), damaged(SERIALISED[kind]))))
def test_serialised_messages_of_a_bag(kind_and_data):
    kind, data = kind_and_data
    message = BagMessage("/topic", kind, STAMP_NS, data)
    for read in (decode, stamp_of):
        try:
            read(message)
        except BagError as error:
            assert "/topic" in str(error)


@pytest.mark.parametrize("kind", sorted(SERIALISED))
def test_whole_messages_are_read(kind):
    message = BagMessage("/topic", kind, STAMP_NS, SERIALISED[kind])
    decode(message)
    if kind not in ("tf2_msgs/msg/TFMessage", "std_msgs/msg/UInt8MultiArray"):
        assert stamp_of(message) == STAMP_NS


@given(damaged(bytes(serialize_message(CameraInfo(width=5, height=4, d=[0.0] * 5)))))
def test_camera_info_that_arrives_as_bytes(data):
    with contextlib.suppress(CalibrationError):
        assert isinstance(conversions.camera_info_message(data, "/c/camera_info"), CameraInfo)
