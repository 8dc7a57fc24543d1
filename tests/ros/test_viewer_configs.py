# SPDX-License-Identifier: Apache-2.0
"""What ships for RViz and Foxglove: every topic exists and is of the type that its display takes; nothing is left out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import rclpy
import yaml
from rclpy.lifecycle import LifecycleNode

from occflownet_core.runtime.bundle import Bundle, load_bundle
from occflownet_ros.parameters import Settings
from occflownet_ros.publishers import Outputs
from occflownet_ros.share import share_path

ROOT = Path(__file__).parents[2]
# Displays of rviz_default_plugins (plugins_description.xml), the property that names their topic, and what they take.
RVIZ_DISPLAYS = {
    "rviz_default_plugins/Marker": ("Topic", "visualization_msgs/msg/Marker"),
    "rviz_default_plugins/MarkerArray": ("Topic", "visualization_msgs/msg/MarkerArray"),
    "rviz_default_plugins/PointCloud2": ("Topic", "sensor_msgs/msg/PointCloud2"),
    "rviz_default_plugins/Map": ("Topic", "nav_msgs/msg/OccupancyGrid"),
    "rviz_default_plugins/Image": ("Topic", "sensor_msgs/msg/Image"),
    "rviz_default_plugins/DepthCloud": ("Depth Map Topic", "sensor_msgs/msg/Image"),
    "rviz_default_plugins/Grid": (None, None),
    "rviz_default_plugins/TF": (None, None),
}
FOXGLOVE_PANELS = {"3D", "Image", "Plot", "DiagnosticSummary"}
NOT_TO_BE_LOOKED_AT = {"/occflownet/labels", "/occflownet/transition_event"}  # no viewer shows their types


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(share_path("demo", "bundle"))


@pytest.fixture(scope="module")
def cameras(bundle) -> tuple[str, ...]:
    return bundle.cameras


@pytest.fixture(scope="module")
def outputs(bundle) -> dict[str, str]:
    """Topics of the real node's outputs and their types."""
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=1 + os.getpid() % 100)
    node = LifecycleNode("occflownet", context=context)
    outputs = Outputs(node, Settings(), bundle, print)
    topics = {topic: types[0] for topic, types in node.get_publisher_names_and_types_by_node("occflownet", "/")}
    outputs.close()
    node.destroy_node()
    rclpy.shutdown(context=context)
    return {topic: kind for topic, kind in topics.items() if topic.startswith("/occflownet/")}


@pytest.fixture(scope="module")
def rviz() -> dict:
    return yaml.safe_load((ROOT / "config" / "occ.rviz").read_text())["Visualization Manager"]


@pytest.fixture(scope="module")
def foxglove() -> dict:
    return json.loads((ROOT / "config" / "foxglove.json").read_text())


def displays(group: dict) -> Iterator[dict]:
    for display in group["Displays"]:
        if display["Class"] == "rviz_common/Group":
            yield from displays(display)
        else:
            yield display


def topic_of(display: dict) -> str | None:
    value = display.get(RVIZ_DISPLAYS[display["Class"]][0])
    return value["Value"] if isinstance(value, dict) else value


def test_rviz_shows_topics_that_exist_with_displays_that_take_them(rviz, outputs, cameras):
    images = {f"/{camera}/image_rect/compressed" for camera in cameras}  # occ.launch.py remaps them
    for display in displays(rviz):
        topic, kind = topic_of(display), RVIZ_DISPLAYS[display["Class"]][1]
        if topic is not None and topic not in images:
            assert outputs[topic] == kind, display["Name"]
        assert display["Enabled"] == display["Value"]
    names = [display["Name"] for display in displays(rviz)]
    assert len(set(names)) == len(names)


def test_rviz_leaves_out_nothing(rviz, outputs, cameras):
    shown = {topic_of(display) for display in displays(rviz)}
    expected = {t for t in outputs if "/latency/" not in t and not t.endswith("/camera_info")} - NOT_TO_BE_LOOKED_AT
    assert expected | {f"/{camera}/image_rect/compressed" for camera in cameras} == shown - {None}


def test_rviz_does_not_stretch_depth_between_infinities(rviz):
    """RViz' own normalisation takes the largest value of the image, which is +inf here."""
    for display in displays(rviz):
        if display["Name"].startswith("Depth") and display["Class"].endswith("Image"):
            assert not display["Normalize Range"] and (display["Min Value"], display["Max Value"]) == (0, 40)


def leaves(layout: dict | str) -> Iterator[str]:
    if isinstance(layout, str):
        yield layout
    else:
        assert layout["direction"] in ("row", "column") and 0 < layout["splitPercentage"] < 100
        yield from leaves(layout["first"])
        yield from leaves(layout["second"])


def test_foxglove_lays_out_every_panel_once(foxglove):
    panels = list(leaves(foxglove["layout"]))
    assert sorted(panels) == sorted(foxglove["configById"])
    assert {panel.partition("!")[0] for panel in panels} == FOXGLOVE_PANELS


def strings(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield from strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from strings(entry)
    elif isinstance(value, str):
        yield value


def test_foxglove_shows_topics_that_exist_and_leaves_out_nothing(foxglove, outputs, cameras):
    shown = {text.removesuffix(".data") for text in strings(foxglove) if text.startswith("/")}
    inputs = {f"/{camera}/{end}" for camera in cameras for end in ("image_rect_compressed", "camera_info")}
    assert shown == (set(outputs) - NOT_TO_BE_LOOKED_AT) | inputs | {"/diagnostics"}


def test_the_launch_file_remaps_the_cameras_that_rviz_shows(rviz):
    text = (ROOT / "launch" / "occ.launch.py").read_text()
    for display in displays(rviz):
        if (topic_of(display) or "").endswith("/image_rect/compressed"):
            assert f'"{topic_of(display).split("/")[1]}"' in text
