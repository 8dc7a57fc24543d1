# SPDX-License-Identifier: Apache-2.0
"""The parts of bag_to_nuscenes on their own: poses over time, clouds, images, mappings, choosing keyframes."""

import struct
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from occflownet_core.errors import CalibrationError, ConfigError, ImageError
from occflownet_core.nuscenes_tables import NuscenesTables
from occflownet_core.poses import RecordedPose
from occflownet_ros.bag_scan import BagTopic
from occflownet_ros.camera_model import CameraModel, rectified_jpeg
from occflownet_ros.drive_plan import choose_stamps
from occflownet_ros.drive_recording import SensorStamps
from occflownet_ros.image_encodings import ENCODINGS, bgr_image
from occflownet_ros.point_cloud import sweep_of_cloud
from occflownet_ros.topic_guess import guess_topic_map
from occflownet_ros.topic_map import CameraTopics, EgoMotion, LidarTopic, TopicMap, load_topic_map, topic_map_yaml
from occflownet_ros.transform_tree import PoseTrack, TransformTree

MILLISECOND = 1_000_000
coordinates = st.floats(-1e3, 1e3, allow_nan=False, width=32)
angles = st.floats(-3, 3, allow_nan=False, width=32)


@st.composite
def recorded_poses(draw) -> RecordedPose:
    turn = Rotation.from_euler("ZYX", [draw(angles), draw(angles), draw(angles)])
    return RecordedPose([draw(coordinates) for _ in range(3)], np.roll(turn.as_quat(), 1))


@st.composite
def tracks(draw) -> dict[int, RecordedPose]:
    stamps = draw(st.lists(st.integers(0, 10**10), min_size=2, max_size=6, unique=True))
    return {stamp: draw(recorded_poses()) for stamp in sorted(stamps)}


# Poses over time


@given(tracks(), st.randoms())
def test_a_track_gives_recorded_poses_as_recorded(track, random):
    shuffled = list(track.items())
    random.shuffle(shuffled)
    poses_over_time = PoseTrack(shuffled, max_gap_ns=1)
    for stamp, pose in track.items():
        assert poses_over_time.at(stamp) is pose  # to the last bit, whatever the gaps
    stamps = list(track)
    assert poses_over_time.range_ns == (stamps[0], stamps[-1])
    assert poses_over_time.at(stamps[0] - 1) is None
    assert poses_over_time.at(stamps[-1] + 1) is None


@given(tracks(), st.floats(0, 1))
def test_a_track_interpolates_as_scipy_does(track, share):
    first, second = list(track)[:2]
    stamp = first + int(share * (second - first))
    assume(first < stamp < second)
    a, b = track[first], track[second]
    rotations = Rotation.from_matrix([a.matrix[:3, :3], b.matrix[:3, :3]])
    assume((rotations[0].inv() * rotations[1]).magnitude() < 3.1)  # half a turn can go either way
    fraction = (stamp - first) / (second - first)
    pose = PoseTrack(track.items(), max_gap_ns=10**10).at(stamp)
    between = Slerp([0, 1], rotations)(fraction).as_matrix()
    np.testing.assert_allclose(pose.matrix[:3, :3], between, atol=1e-6)
    np.testing.assert_allclose(
        pose.translation_m, (1 - fraction) * a.matrix[:3, 3] + fraction * b.matrix[:3, 3], atol=1e-9
    )


def test_a_track_does_not_bridge_gaps():
    still = RecordedPose((0, 0, 0), (1, 0, 0, 0))
    track = PoseTrack([(0, still), (100, still), (201, still)], max_gap_ns=100)
    assert track.at(50) is not None
    assert track.at(150) is None


@given(recorded_poses(), recorded_poses(), recorded_poses())
def test_a_tree_composes_up_and_down(world_from_base, base_from_arm, base_from_camera):
    tree = TransformTree()
    tree.add("world", "base", PoseTrack([(5, world_from_base)], 1))
    tree.add("base", "/arm", base_from_arm)  # old drivers write a slash
    tree.add("base", "camera", base_from_camera)
    assert tree.path("base", "camera").at(0) is base_from_camera
    world, arm, camera = (pose.matrix for pose in (world_from_base, base_from_arm, base_from_camera))
    scale = 1e-9 * (1 + np.abs(camera[:3, 3]).max() + np.abs(arm[:3, 3]).max())
    np.testing.assert_allclose(tree.path("arm", "camera").at(0).matrix, np.linalg.inv(arm) @ camera, atol=scale)
    np.testing.assert_allclose(tree.path("world", "camera").at(5).matrix, world @ camera, atol=scale)
    np.testing.assert_allclose(
        tree.path("camera", "world").at(5).matrix, np.linalg.inv(world @ camera), atol=scale * 10
    )
    assert tree.path("world", "camera").at(6) is None
    assert tree.path("world", "camera").range_ns == (5, 5)
    assert tree.path("world", "moon") is None
    assert tree.path("base", "camera").is_static
    assert not tree.path("world", "base").is_static


def test_frames_in_a_circle_do_not_hang():
    tree = TransformTree()
    still = RecordedPose((0, 0, 0), (1, 0, 0, 0))
    tree.add("a", "b", still)
    tree.add("b", "a", still)
    assert tree.path("c", "a") is None


# Choosing keyframes


@given(st.integers(10, 200), st.integers(20, 2000), st.integers(2, 200))
def test_stamps_are_chosen_at_the_rate(period_ms, interval_ms, count):
    stamps = [period_ms * MILLISECOND * i for i in range(count)]
    chosen = choose_stamps(stamps, interval_ms * MILLISECOND)
    assert chosen[0] == stamps[0]
    assert set(chosen) <= set(stamps)
    gaps = np.diff(chosen)
    assert (gaps >= interval_ms * MILLISECOND / 2).all()
    if interval_ms >= period_ms:
        # Even in time: nowhere further from the moments that are due than half a period of the sensor.
        due = np.arange(len(chosen)) * interval_ms * MILLISECOND
        assert np.abs(np.array(chosen) - due).max() <= period_ms * MILLISECOND / 2 + 1
    else:
        assert chosen == stamps


def test_keyframes_that_are_all_there_is_are_all_chosen():
    stamps = (np.array([0, 0.49, 1.0, 1.52, 1.99, 2.5]) * 1e9).astype(int).tolist()
    assert choose_stamps(stamps, 500 * MILLISECOND) == stamps
    assert choose_stamps([7], 1) == [7]
    assert choose_stamps([], 1) == []


@given(st.lists(st.integers(0, 1000), max_size=20), st.integers(-50, 1050), st.integers(0, 300))
def test_nearest_stamp_is_the_nearest(stamps_ms, asked_ms, limit_ms):
    sensor = SensorStamps("/x", [ms * MILLISECOND for ms in stamps_ms])
    sensor.finish()
    found = sensor.nearest(asked_ms * MILLISECOND, limit_ms)
    distances = [abs(ms - asked_ms) for ms in stamps_ms if ms > 0]  # a stamp of 0 is none
    if not distances or min(distances) > limit_ms:
        assert found is None
    else:
        assert abs(found // MILLISECOND - asked_ms) == min(distances)


# Point clouds

_CODES = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 8: "d"}


@given(st.data())
def test_clouds_of_any_layout_are_read_as_struct_reads_them(data):
    names = ["x", "y", "z", *data.draw(st.lists(st.sampled_from(["intensity", "ring", "extra"]), unique=True))]
    kinds = [data.draw(st.sampled_from([7, 8] if name in "xyz" else sorted(_CODES))) for name in names]
    order = data.draw(st.sampled_from("<>"))
    offsets, at = [], 0
    for kind in kinds:
        at += data.draw(st.integers(0, 3))
        offsets.append(at)
        at += struct.calcsize(_CODES[kind])
    step = at + data.draw(st.integers(0, 4))
    width, height, padding = (data.draw(st.integers(low, 4)) for low in (1, 1, 0))
    row_step = width * step + padding
    buffer, expected = bytearray(row_step * height), []
    for row in range(height):
        for column in range(width):
            point = {name: data.draw(st.integers(1, 100)) for name in names}
            for name, kind, offset in zip(names, kinds, offsets, strict=True):
                struct.pack_into(order + _CODES[kind], buffer, row * row_step + column * step + offset, point[name])
            expected.append([point.get(name, 0) for name in ("x", "y", "z", "intensity", "ring")])
    fields = [SimpleNamespace(name=n, offset=o, datatype=k) for n, o, k in zip(names, offsets, kinds, strict=True)]
    message = SimpleNamespace(
        fields=fields, is_bigendian=order == ">", point_step=step, row_step=row_step, width=width, height=height
    )
    message.data = np.frombuffer(bytes(buffer), np.uint8)
    sweep = sweep_of_cloud(message, 0, LidarTopic("/points"))
    np.testing.assert_array_equal(sweep.points, np.array(expected, dtype=np.float32))
    assert sweep.points.dtype == np.float32
    assert sweep.dropped == 0


def small_cloud(**columns: np.ndarray) -> SimpleNamespace:
    table = np.zeros(len(columns["x"]), dtype=[(name, values.dtype) for name, values in columns.items()])
    for name, values in columns.items():
        table[name] = values
    codes = {
        np.dtype(kind): code for code, kind in enumerate(("i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8"), start=1)
    }
    fields = [
        SimpleNamespace(name=name, offset=table.dtype.fields[name][1], datatype=codes[table.dtype.fields[name][0]])
        for name in table.dtype.names
    ]
    size = table.dtype.itemsize
    return SimpleNamespace(
        fields=fields,
        is_bigendian=False,
        point_step=size,
        row_step=size * len(table),
        width=len(table),
        height=1,
        data=np.frombuffer(table.tobytes(), np.uint8),
    )


@pytest.mark.parametrize(
    ("times", "unit_s"),
    [
        (np.array([-0.05, 0.0, 0.02], dtype="f4"), 1.0),  # Velodyne: seconds before the stamp
        (np.array([0, 20_000_000, 50_000_000], dtype="u4"), 1e-9),  # Ouster: nanoseconds after it
        (np.array([1.7e9 + 5, 1.7e9 + 5.02, 1.7e9 + 5.05]), 1.0),  # Hesai: since the epoch
    ],
)
def test_times_are_relative_or_absolute(times, unit_s):
    one = np.ones(3, dtype="f4")
    stamp_ns = 1_700_000_005_000_000_000
    sweep = sweep_of_cloud(small_cloud(x=one, y=one, z=one, t=times), stamp_ns, LidarTopic("/p", "", {}, "t", unit_s))
    seconds = times * unit_s if times.max() * unit_s < 1e6 else times - 1.7e9 - 5
    np.testing.assert_allclose((sweep.time_ns - stamp_ns) / 1e9, seconds, atol=1e-6)


# Images


def test_every_encoding_gives_the_same_picture():
    """Pixels come back as they were, whatever the encoding's order, width and rows' padding."""
    rng = np.random.default_rng(1)
    bgr = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    grey = np.repeat(bgr[..., :1], 3, axis=2)
    alpha = np.full((4, 6, 1), 9, np.uint8)
    sent = {
        "bgr8": bgr,
        "8UC3": bgr,
        "rgb8": bgr[..., ::-1],
        "bgra8": np.concatenate([bgr, alpha], axis=2),
        "8UC4": np.concatenate([bgr, alpha], axis=2),
        "rgba8": np.concatenate([bgr[..., ::-1], alpha], axis=2),
        "mono8": grey[..., :1],
        "8UC1": grey[..., :1],
    }
    wide = {name[:-1] + "16": name for name in ("bgr8", "rgb8", "bgra8", "rgba8", "mono8")}
    for encoding in [*sent, *wide]:
        pixels = sent[wide.get(encoding, encoding)]
        for big in (False, True):
            if encoding in wide:
                pixels16 = pixels.astype(np.uint16) * 256 + 77
                rows = pixels16.astype(">u2" if big else "<u2").reshape(4, -1).view(np.uint8)
            else:
                rows = pixels.reshape(4, -1)
            data = np.pad(rows, ((0, 0), (0, 3)))
            image = bgr_image(data.ravel(), encoding, 6, 4, data.shape[1], big)
            np.testing.assert_array_equal(image, grey if "mono" in encoding or encoding == "8UC1" else bgr, encoding)


@pytest.mark.parametrize("depth", ["8", "16"])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_patterns_name_their_first_two_rows(pattern, depth):
    """A picture of one colour gives each filter its own value; away from the edges that colour comes back."""
    color = {"r": 200, "g": 120, "b": 40}
    tile = np.array([[color[pattern[0]], color[pattern[1]]], [color[pattern[2]], color[pattern[3]]]], dtype=np.uint8)
    mosaic = np.tile(tile, (4, 4))
    data = mosaic if depth == "8" else (mosaic.astype("<u2") * 256).view(np.uint8)
    image = bgr_image(np.ascontiguousarray(data).ravel(), f"bayer_{pattern}{depth}", 8, 8, data.shape[1])
    np.testing.assert_array_equal(image[2:-2, 2:-2], np.broadcast_to([40, 120, 200], (4, 4, 3)))


@pytest.mark.parametrize(
    ("encoding", "bytes_of_two_pixels"),
    [
        ("yuv422", (90, 100, 240, 100)),
        ("uyvy", (90, 100, 240, 100)),
        ("yuv422_yuy2", (100, 90, 100, 240)),
        ("yuyv", (100, 90, 100, 240)),
    ],
)
def test_yuv_is_that_of_itu_r_bt_601(encoding, bytes_of_two_pixels):
    """Y = 100, U = 90, V = 240: R = 1.164 (Y - 16) + 1.596 (V - 128) and so on."""
    data = np.tile(np.array(bytes_of_two_pixels, dtype=np.uint8), 8)
    image = bgr_image(data, encoding, 4, 4, 8)
    red = 1.164 * (100 - 16) + 1.596 * (240 - 128)
    green = 1.164 * (100 - 16) - 0.813 * (240 - 128) - 0.391 * (90 - 128)
    blue = 1.164 * (100 - 16) + 2.018 * (90 - 128)
    np.testing.assert_allclose(image[1, 1], np.clip([blue, green, red], 0, 255), atol=2)


@given(st.sampled_from([*ENCODINGS, "32FC1", ""]), st.binary(max_size=64), *[st.integers(0, 9)] * 3)
def test_wrong_image_messages_raise_one_error(encoding, data, width, height, step):
    try:
        image = bgr_image(data, encoding, width, height, step)
    except ImageError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert image.shape == (height, width, 3)


def model(**changes: object) -> CameraModel:
    values = {
        "frame_id": "optical",
        "width_px": 160,
        "height_px": 120,
        "distortion_model": "plumb_bob",
        "distortion": (0.0,) * 5,
        "matrix": (120.0, 0, 80, 0, 121.0, 60, 0, 0, 1),
        "rectification": (1.0, 0, 0, 0, 1, 0, 0, 0, 1),
        "projection": (110.0, 0, 78, 0, 0, 112.0, 61, 0, 0, 0, 1, 0),
    }
    return CameraModel(**(values | changes))


LENSES = {
    "plumb_bob": (-0.25, 0.08, 0.001, -0.002, -0.01),
    "rational_polynomial": (0.3, 0.1, 0.001, -0.001, 0.02, 0.5, 0.2, 0.03),
    "equidistant": (-0.02, 0.01, -0.003, 0.001),
}


@pytest.mark.parametrize("lens", LENSES)
def test_a_dot_goes_where_the_pinhole_sees_it(lens):
    """A point projected through the lens makes a dot; after rectification it is where P projects the point."""
    camera = model(distortion_model=lens, distortion=LENSES[lens])
    matrix, coefficients = np.array(camera.matrix).reshape(3, 3), np.array(LENSES[lens])
    for point in [(0.1, -0.05, 1.0), (-0.4, 0.3, 1.0), (0.45, 0.2, 1.0), (0.0, 0.0, 1.0)]:
        project = cv2.fisheye.projectPoints if lens == "equidistant" else cv2.projectPoints
        ray = np.array([[point]])
        if lens == "equidistant":
            pixel, _ = project(ray, np.zeros(3), np.zeros(3), matrix, coefficients)
        else:
            pixel, _ = project(ray, np.zeros(3), np.zeros(3), matrix, coefficients)
        u, v = pixel.ravel()
        grid_v, grid_u = np.mgrid[:120, :160]
        dot = 255 * np.exp(-((grid_u - u) ** 2 + (grid_v - v) ** 2) / (2 * 2.0**2))
        image = np.repeat(dot[..., None], 3, axis=2).round().astype(np.uint8)
        message = SimpleNamespace(
            encoding="bgr8", width=160, height=120, step=480, is_bigendian=0, data=np.ascontiguousarray(image).ravel()
        )
        data, unchanged = rectified_jpeg(message, camera, is_rectified=False, quality=100)
        assert not unchanged
        seen = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE).astype(float)
        seen[seen < 40] = 0
        centre = np.array([(seen * grid_u).sum(), (seen * grid_v).sum()]) / seen.sum()
        np.testing.assert_allclose(centre, [110 * point[0] + 78, 112 * point[1] + 61], atol=0.35)


def test_jpegs_are_kept_unless_they_need_rectification():
    data = cv2.imencode(".jpg", np.zeros((120, 160, 3), np.uint8))[1].ravel()
    message = SimpleNamespace(format="rgb8; jpeg compressed bgr8", data=data)
    plain = model(projection=(0.0,) * 12)
    assert rectified_jpeg(message, plain, is_rectified=False, quality=90) == (data.tobytes(), True)
    np.testing.assert_array_equal(plain.intrinsic.ravel(), plain.matrix)
    curved = model(distortion=LENSES["plumb_bob"])
    assert rectified_jpeg(message, curved, is_rectified=True, quality=90) == (data.tobytes(), True)
    assert not rectified_jpeg(message, curved, is_rectified=False, quality=90)[1]
    assert not rectified_jpeg(message, model(), is_rectified=False, quality=90)[1]  # P differs from K
    with pytest.raises(ImageError, match="cut short"):
        rectified_jpeg(SimpleNamespace(format="jpeg", data=data[:-20]), plain, False, 90)
    with pytest.raises(ImageError, match="160 x 120 px and the camera_info of optical says 161 x 120"):
        rectified_jpeg(message, model(width_px=161, projection=(0.0,) * 12), False, 90)


def test_binned_images_are_refused():
    region = SimpleNamespace(width=0)
    header = SimpleNamespace(frame_id="f")
    with pytest.raises(CalibrationError, match="binned"):
        CameraModel.from_message(SimpleNamespace(header=header, roi=region, binning_x=2, binning_y=2, width=8))


# Mappings


def topic(name: str, kind: str, count: int = 10) -> BagTopic:
    package = {"Odometry": "nav_msgs", "TFMessage": "tf2_msgs", "Header": "std_msgs"}.get(kind, "sensor_msgs")
    return BagTopic(name, f"{package}/msg/{kind}", "cdr", count)


def test_guesses_of_common_vehicles():
    guess = guess_topic_map(
        [
            topic("/front/image_raw", "Image"),
            topic("/front/image_raw/compressed", "CompressedImage"),
            topic("/front/camera_info", "CameraInfo"),
            topic("/camera/rear_left/image_color", "Image"),
            topic("/camera/rear_left/image_rect_color", "Image"),
            topic("/camera/rear_left/camera_info", "CameraInfo"),
            topic("/zed/depth/image_rect", "Image"),
            topic("/usb_cam/image_raw", "Image"),
            topic("/silent/image_raw", "Image", 0),
            topic("/radar/points", "PointCloud2", 500),
            topic("/occflownet/occupancy", "PointCloud2", 500),
            topic("/livox/lidar", "PointCloud2", 300),
            topic("/wheel/odom", "Odometry", 900),
            topic("/odometry/filtered", "Odometry", 100),
            topic("/tf", "TFMessage"),
        ]
    )
    assert guess.cameras == {
        "CAM_FRONT": CameraTopics("/front/image_raw/compressed", "/front/camera_info"),
        "CAM_BACK_LEFT": CameraTopics("/camera/rear_left/image_rect_color", "/camera/rear_left/camera_info"),
        "CAM_USB_CAM": CameraTopics("/usb_cam/image_raw", ""),
    }
    assert guess.lidar.topic == "/livox/lidar"
    assert guess.ego_motion == EgoMotion(odometry="/odometry/filtered")
    assert guess_topic_map([topic("/tf", "TFMessage")], {"map", "base_link"}).ego_motion == EgoMotion(tf="map")


def test_guesses_of_two_cameras_that_look_the_same_way_stay_apart():
    names = [f"/{side}/front/image_raw" for side in ("narrow", "wide")]
    guess = guess_topic_map([topic(name, "Image") for name in names])
    assert set(guess.cameras) == {"CAM_NARROW_FRONT", "CAM_WIDE_FRONT"}


def test_nuscenes_names_are_kept():
    guess = guess_topic_map(
        [topic("/CAM_BACK_RIGHT/image_rect_compressed", "CompressedImage"), topic("/keyframe", "Header")]
    )
    assert list(guess.cameras) == ["CAM_BACK_RIGHT"]
    assert guess.cameras["CAM_BACK_RIGHT"].are_rectified
    assert guess.keyframes == "/keyframe"


names = st.text("abcdefgh_/", min_size=1, max_size=12)
numbers = st.floats(0.1, 1e4)


@given(
    st.dictionaries(
        st.text("ABC_", min_size=1).filter(lambda t: t.strip("_")),
        st.builds(CameraTopics, names, names, st.sampled_from([None, True, False]), numbers),
        max_size=3,
    ),
    st.one_of(st.builds(EgoMotion, odometry=names), st.builds(EgoMotion, tf=names)),
    st.one_of(
        st.none(),
        st.builds(
            LidarTopic, names, names, st.dictionaries(st.integers(0, 300), st.sampled_from(["noise", "vehicle.car"]))
        ),
    ),
    names,
    numbers,
)
def test_mappings_are_read_as_written(tmp_path_factory, cameras, ego_motion, lidar, base_frame, gap_ms):
    written = TopicMap(cameras, ego_motion, lidar, base_frame, max_pose_gap_ms=gap_ms)
    path = tmp_path_factory.mktemp("map") / "topics.yaml"
    path.write_text(topic_map_yaml(written))
    assert load_topic_map(path) == written


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "the file is None; give a table"),
        ("- a", "the file is ['a']; give a table"),
        ("cameras: {}", "ego_motion is missing; add it"),
        ("cameras: {A: {image: 3}}\nego_motion: {tf: map}", "cameras.A.image is 3; give text"),
        ("cameras: {1: {image: a}}\nego_motion: {tf: map}", "cameras's key is 1; give text"),
        ("cameras: {A: {image: a, rectified: 1}}\nego_motion: {tf: map}", "rectified is 1; give true or false"),
        ("camera: {}", "unknown key camera; the keys there are cameras, ego_motion, lidar"),
        ("cameras: [a]\nego_motion: {tf: map}", "cameras is ['a']; give a table"),
        ("cameras: {}\nego_motion: {tf: map}\nmax_pose_gap_ms: 0", "both must be positive"),
        ("lidar: {topic: a, label_names: {x: noise}}\ncameras: {}\nego_motion: {tf: map}", "give a whole number"),
        ("{", "cannot be read"),
    ],
)
def test_wrong_mappings_say_where(tmp_path, content, sentence):
    (tmp_path / "topics.yaml").write_text(content)
    with pytest.raises(ConfigError) as refused:
        load_topic_map(tmp_path / "topics.yaml")
    assert sentence in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


# Tables


def test_rows_of_a_chain_know_their_neighbours(tmp_path):
    tables = NuscenesTables("test")
    tables.add_scene("s", "scene", "log", [("k0", 1), ("k1", 2), ("k2", 3)])
    tables.add_scene("t", "other", "log", [("l0", 4)])
    for token, chain in (("a", 1), ("b", 2), ("c", 1)):
        tables.add_measurement(token, "k0", "m", 1, "x.jpg", (0, 0, 0), (1, 0, 0, 0), chain)
    links = {row["token"]: (row["prev"], row["next"]) for row in tables.rows["sample"] + tables.rows["sample_data"]}
    assert links == {
        "k0": ("", "k1"),
        "k1": ("k0", "k2"),
        "k2": ("k1", ""),
        "l0": ("", ""),
        "a": ("", "c"),
        "b": ("", ""),
        "c": ("a", ""),
    }
    tables.write(tmp_path, "v")
    written = {path.stem for path in (tmp_path / "v").iterdir()}
    assert len(written) == 13
    assert "lidarseg" not in written
