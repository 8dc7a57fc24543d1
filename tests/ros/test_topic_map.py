# SPDX-License-Identifier: Apache-2.0
"""Which topic of a bag is which camera, LiDAR and ego motion: guesses, and mappings as files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from occflownet_core.errors import ConfigError
from occflownet_ros.bag_scan import BagTopic
from occflownet_ros.topic_guess import guess_topic_map
from occflownet_ros.topic_map import CameraTopics, EgoMotion, LidarTopic, TopicMap, load_topic_map, topic_map_yaml


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
