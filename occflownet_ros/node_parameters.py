# SPDX-License-Identifier: Apache-2.0
"""The table of parameters as ROS parameters of a node: declared, checked at configure, changed while it runs."""

from __future__ import annotations

from collections.abc import Callable

from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult
from rclpy.node import Node

from occflownet_ros import parameters
from occflownet_ros.parameters import ParameterError, Settings


class NodeParameters:
    """Declares every parameter of the table on a node and keeps the settings that are in force.

    Args:
        node: whose parameters they are.
        on_change: takes the new settings after a parameter changed while the node is configured.

    Attributes:
        settings: in force since ``read``; None while the node is not configured, when any value may be set.
    """

    def __init__(self, node: Node, on_change: Callable[[Settings], None]) -> None:
        self.settings: Settings | None = None
        self._node = node
        self._on_change = on_change
        for name, default in parameters.defaults().items():
            text, limits = parameters.describe(name)
            # Typed and checked by our own table at configure: rclpy would refuse with an exception at construction.
            descriptor = ParameterDescriptor(description=text, additional_constraints=limits, dynamic_typing=True)
            node.declare_parameter(name, default, descriptor)
        for name in node._parameter_overrides:
            if not node.has_parameter(name) and "." not in name:
                node.get_logger().warning(parameters.unknown_parameter(name))
        node.add_on_set_parameters_callback(self._on_set)

    def read(self) -> Settings:
        """The settings that the parameters' values make, in force from now on.

        Raises:
            ParameterError: see ``Settings.from_values``.
        """
        self.settings = self._with({})
        return self.settings

    def release(self) -> None:
        """Nothing is in force any more."""
        self.settings = None

    def _with(self, changed: dict[str, object]) -> Settings:
        current = {name: self._node.get_parameter(name).value for name in parameters.NAMES}
        return Settings.from_values({**current, **changed})

    def _on_set(self, changes: list) -> SetParametersResult:
        changed = {change.name: change.value for change in changes if change.name in parameters.NAMES}
        if self.settings is None:
            return _checked_one_by_one(changed)
        # What stays as it is may be set again: ``ros2 param load`` sends every parameter of a file.
        is_new = {name for name, value in changed.items() if value != self._node.get_parameter(name).value}
        fixed = sorted(is_new - parameters.LIVE)
        if fixed:
            reason = (
                f"{', '.join(fixed)} is fixed while the node is configured; clean it up, change it, configure again"
            )
            return SetParametersResult(successful=False, reason=reason)
        if not changed:
            return SetParametersResult(successful=True)
        try:
            self.settings = self._with(changed)
        except ParameterError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self._on_change(self.settings)
        return SetParametersResult(successful=True)


def _checked_one_by_one(changed: dict[str, object]) -> SetParametersResult:
    """Before configure the order of changes must not matter: whether values go together is checked there."""
    try:
        for name, value in changed.items():
            parameters.check_value(name, value)
    except ParameterError as error:
        return SetParametersResult(successful=False, reason=str(error))
    return SetParametersResult(successful=True)
