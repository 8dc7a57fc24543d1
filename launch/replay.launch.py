# SPDX-License-Identifier: Apache-2.0
"""Evaluate the replay of a bag: player, node and recorder in one go; with rviz:=true watch it meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    ExecuteProcess,
    LogInfo,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
)
from launch.conditions import IfCondition
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.substitutions import ExecutableInPackage

from launch import LaunchContext, LaunchDescription
from occflownet_ros.transport import MALLOC_ENVIRONMENT, fastdds_profile

# The installed share directory of the package and a checkout look alike: launch/ and config/ lie side by side.
_SHARE = Path(__file__).resolve().parent.parent

_ARGUMENTS = (
    ("bag", str(_SHARE / "demo" / "bag"), "rosbag2 folder, or a .mcap or .db3 file; the demo's unless given."),
    ("bundle", str(_SHARE / "demo" / "bundle"), "Folder of the model bundle; the demo's unless given."),
    ("out", "replay_evaluation", "Folder to make for report.html, report.json and node.log."),
    ("gt", "", "Root with Occ3D's gts/; empty: the ground truth that the bag carries."),
    ("mode", "lockstep", "lockstep: every keyframe once, exactly; realtime: as on the vehicle, drops and all."),
    ("rate", "", "realtime: bag seconds per second; empty: 1."),
    (
        "calibration",
        "",
        "YAML file with the cameras' extrinsics; empty: calibration.yaml in the bag, else its /tf_static.",
    ),
    ("force", "false", "true: replace an older evaluation in out."),
    (
        "domain_id",
        os.environ.get("ROS_DOMAIN_ID", "97"),
        "ROS domain of player, node and RViz; 97 keeps clear of a vehicle's own graph.",
    ),
    ("rviz", "false", "true: RViz with cameras, voxels, cloud and tf."),
)
_OPTIONS = ("bag", "bundle", "out", "gt", "mode", "rate", "calibration")


def generate_launch_description() -> LaunchDescription:
    """What ``ros2 launch occflownet_ros replay.launch.py bag:=BAG bundle:=DIR out:=DIR`` runs."""
    return LaunchDescription(
        [
            *(DeclareLaunchArgument(name, default_value=d, description=text) for name, d, text in _ARGUMENTS),
            SetEnvironmentVariable("ROS_DOMAIN_ID", LaunchConfiguration("domain_id")),
            SetEnvironmentVariable("FASTDDS_DEFAULT_PROFILES_FILE", fastdds_profile()),
            *(SetEnvironmentVariable(name, value) for name, value in MALLOC_ENVIRONMENT.items()),
            OpaqueFunction(function=_evaluation),
            Node(
                package="rviz2",
                executable="rviz2",
                arguments=["-d", str(_SHARE / "config" / "occ.rviz")],
                condition=IfCondition(LaunchConfiguration("rviz")),
            ),
        ]
    )


def _evaluation(context: LaunchContext) -> list:
    """The evaluation, which starts player and node itself; its end is the launch's."""

    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    arguments = [part for name in _OPTIONS if value(name) for part in (f"--{name}", value(name))]
    if value("force").lower() == "true":
        arguments.append("--force")
    command = [ExecutableInPackage("replay_evaluation", "occflownet_ros"), *arguments]
    evaluation = ExecuteProcess(cmd=command, output="screen", emulate_tty=True)

    def ended(event, _context: LaunchContext) -> list:
        page = Path(value("out")) / "report.html"
        said = f"see {page}" if event.returncode == 0 else "replay_evaluation failed; its last message above says why"
        return [LogInfo(msg=said), EmitEvent(event=Shutdown(reason="the evaluation has ended"))]

    return [RegisterEventHandler(OnProcessExit(target_action=evaluation, on_exit=ended)), evaluation]
