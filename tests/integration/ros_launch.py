# SPDX-License-Identifier: Apache-2.0
"""Launch files as a ROS installation runs them, for tests that need one."""

from __future__ import annotations

import sys

import pytest
from ros_processes import ROOT

_RUN = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
service = LaunchService()
source = PythonLaunchDescriptionSource(sys.argv[1])
arguments = [tuple(argument.split(":=", 1)) for argument in sys.argv[2:]]
service.include_launch_description(LaunchDescription([IncludeLaunchDescription(source, launch_arguments=arguments)]))
sys.exit(service.run())
"""


def launch_command(file: str, **arguments: object) -> list[str]:
    """The command that launches a file of ``launch/`` with ``name:=value`` arguments."""
    given = [f"{name}:={value}" for name, value in arguments.items()]
    return [sys.executable, "-c", _RUN, str(ROOT / "launch" / file), *given]


def skip_unless_built() -> None:
    """Launch finds a package's executables where colcon has put them."""
    from ament_index_python.packages import PackageNotFoundError, get_package_prefix

    try:
        get_package_prefix("occflownet_ros")
    except PackageNotFoundError:
        pytest.skip("the package is not built with colcon here, so launch cannot find its executables")
