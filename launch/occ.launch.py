# SPDX-License-Identifier: Apache-2.0
"""Start the node ``occflownet`` and drive it to active; with rviz:=true show what it sees."""

from __future__ import annotations

from pathlib import Path

import lifecycle_msgs.msg
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    LogInfo,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
    Shutdown,
)
from launch.conditions import IfCondition
from launch.event_handlers import OnProcessStart
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState

from launch import LaunchContext, LaunchDescription
from occflownet_ros.transport import MALLOC_ENVIRONMENT, fastdds_profile

Transition = lifecycle_msgs.msg.Transition

# The installed share directory of the package and a checkout look alike: launch/ and config/ lie side by side.
_SHARE = Path(__file__).resolve().parent.parent

_ARGUMENTS = (
    ("bundle", str(_SHARE / "demo" / "bundle"), "Folder of the model bundle; the demo's unless given."),
    ("params_file", str(_SHARE / "config" / "occ.yaml"), "YAML file with the node's parameters."),
    ("calibration_file", "", "YAML file with the cameras' extrinsics; empty: extrinsics from /tf_static."),
    ("camera_namespaces", "", "Comma-separated namespaces, in the bundle's order; empty: /<camera of the bundle>."),
    ("image_transport", "", "compressed or raw; empty: as params_file says."),
    ("ego_motion", "", "odometry, tf or none; empty: as params_file says (odometry)."),
    ("odom_topic", "", "nav_msgs/Odometry; empty: as params_file says (/odom)."),
    ("use_sim_time", "false", "true: time from /clock, as when a bag plays."),
    ("namespace", "", "Namespace of the node."),
    ("log_level", "info", "debug, info, warn, error."),
    ("rviz", "false", "true: RViz with cameras, voxels, depth images and tf."),
    (
        "fastdds_profile",
        fastdds_profile(),
        "Fast DDS profile with room for images; start the camera drivers with it too. Empty: Fast DDS's own.",
    ),
)

_RVIZ_CAMERAS = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_LEFT",
    "CAM_BACK",
    "CAM_BACK_RIGHT",
)


def generate_launch_description() -> LaunchDescription:
    """What ``ros2 launch occflownet_ros occ.launch.py bundle:=DIR`` runs."""
    return LaunchDescription(
        [
            *(DeclareLaunchArgument(name, default_value=d, description=text) for name, d, text in _ARGUMENTS),
            OpaqueFunction(function=_environment),
            OpaqueFunction(function=_node),
            Node(
                package="rviz2",
                executable="rviz2",
                arguments=["-d", str(_SHARE / "config" / "occ.rviz")],
                # RViz looks for the compressed images of <topic> at <topic>/compressed.
                remappings=[(f"/{c}/image_rect/compressed", f"/{c}/image_rect_compressed") for c in _RVIZ_CAMERAS],
                parameters=[{"use_sim_time": LaunchConfiguration("use_sim_time")}],
                condition=IfCondition(LaunchConfiguration("rviz")),
            ),
        ]
    )


def _environment(context: LaunchContext) -> list:
    profile = LaunchConfiguration("fastdds_profile").perform(context)
    variables = {**MALLOC_ENVIRONMENT, **({"FASTDDS_DEFAULT_PROFILES_FILE": profile} if profile else {})}
    return [SetEnvironmentVariable(name, value) for name, value in variables.items()]


def _node(context: LaunchContext) -> list:
    """The node, and the events that drive it: started -> configure -> inactive -> activate."""

    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    named = ("bundle", "calibration_file", "image_transport", "ego_motion", "odom_topic")
    parameters = {name: value(name) for name in named if value(name)}
    namespaces = [part.strip() for part in value("camera_namespaces").split(",") if part.strip()]
    if namespaces:
        parameters["camera_namespaces"] = namespaces
    node = LifecycleNode(
        package="occflownet_ros",
        executable="occflownet_node",
        name="occflownet",
        namespace=value("namespace"),
        output="screen",
        emulate_tty=True,
        parameters=[value("params_file"), {**parameters, "use_sim_time": value("use_sim_time").lower() == "true"}],
        arguments=["--ros-args", "--log-level", value("log_level")],
    )
    is_this = matches_action(node)
    configure = EmitEvent(
        event=ChangeState(lifecycle_node_matcher=is_this, transition_id=Transition.TRANSITION_CONFIGURE)
    )
    activate = EmitEvent(
        event=ChangeState(lifecycle_node_matcher=is_this, transition_id=Transition.TRANSITION_ACTIVATE)
    )
    refused = [LogInfo(msg="occflownet could not be configured; its last message above says why"), Shutdown()]
    return [
        # Registered before the node starts, so that no transition is missed.
        RegisterEventHandler(OnProcessStart(target_action=node, on_start=[configure])),
        RegisterEventHandler(
            OnStateTransition(
                target_lifecycle_node=node, start_state="configuring", goal_state="inactive", entities=[activate]
            )
        ),
        RegisterEventHandler(
            OnStateTransition(
                target_lifecycle_node=node, start_state="configuring", goal_state="unconfigured", entities=refused
            )
        ),
        node,
    ]
