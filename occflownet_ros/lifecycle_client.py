# SPDX-License-Identifier: Apache-2.0
"""Driving another process's lifecycle node: change its state and wait for it, with time-outs."""

from __future__ import annotations

import time

from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from occflownet_core.errors import OccflownetError

CONFIGURE, ACTIVATE = Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE
DEACTIVATE, CLEANUP = Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_CLEANUP
UNCONFIGURED, INACTIVE = State.PRIMARY_STATE_UNCONFIGURED, State.PRIMARY_STATE_INACTIVE
ACTIVE, FINALIZED = State.PRIMARY_STATE_ACTIVE, State.PRIMARY_STATE_FINALIZED

_NAMES = {CONFIGURE: "configure", ACTIVATE: "activate", DEACTIVATE: "deactivate", CLEANUP: "cleanup"}
_GOALS = {CONFIGURE: INACTIVE, ACTIVATE: ACTIVE, DEACTIVATE: INACTIVE, CLEANUP: UNCONFIGURED}
_POLL_S = 0.02
_ANSWER_S = 3.0
_TRANSITION_S = 8.0


class LifecycleError(OccflownetError):
    """A lifecycle node refused a transition, or did not answer in time."""


def change_state(node: Node, target: str, transition: int, timeout_s: float) -> None:
    """Ask a lifecycle node for a transition and wait until it is done.

    Requests and answers may be lost while the two sides are still getting to know each other: where no answer comes, the
    node's state tells whether it was done, and it is asked again where it was not.

    Args:
        node: who asks; spun meanwhile, so it must not be in another executor.
        target: the lifecycle node's name, e.g. ``occflownet``.
        transition: one of CONFIGURE, ACTIVATE, DEACTIVATE, CLEANUP (``lifecycle_msgs/Transition``).
        timeout_s: for the node to appear and to finish, in all.

    Raises:
        LifecycleError: it did not appear or answer in time, or the transition failed.
    """
    name = _NAMES.get(transition, f"transition {transition}")
    request = ChangeState.Request(transition=Transition(id=transition))
    until_s, answer, was_lost = time.monotonic() + timeout_s, None, False
    while answer is None and (left_s := until_s - time.monotonic()) > 0:
        answer = _call(node, ChangeState, f"{target}/change_state", request, min(left_s, _TRANSITION_S))
        was_lost |= answer is None
        left_s = until_s - time.monotonic()
        is_open = was_lost and (answer is None or not answer.success) and left_s > 0
        if is_open and state_of(node, target, left_s) == _GOALS.get(transition):
            return
    if answer is None:
        raise LifecycleError(f"{target} did not finish '{name}' within {timeout_s:g} s; is the node running?")
    if not answer.success:
        raise LifecycleError(f"{target} refused '{name}'; its log says why")


def state_of(node: Node, target: str, timeout_s: float) -> int:
    """The id of a lifecycle node's primary state (``lifecycle_msgs/State``).

    Raises:
        LifecycleError: the node did not answer in time.
    """
    until_s, answer = time.monotonic() + timeout_s, None
    while answer is None and (left_s := until_s - time.monotonic()) > 0:
        # An answer may be lost while the two sides are still getting to know each other; asking again does no harm.
        answer = _call(node, GetState, f"{target}/get_state", GetState.Request(), min(left_s, _ANSWER_S))
    if answer is None:
        raise LifecycleError(f"{target} did not tell its state within {timeout_s:g} s; is the node running?")
    return answer.current_state.id


def wait_for_state(node: Node, target: str, state: int, timeout_s: float) -> None:
    """Wait until a lifecycle node is in a primary state, whoever drives it there.

    Raises:
        LifecycleError: it was not, within the time.
    """
    until_s = time.monotonic() + timeout_s
    while (found := state_of(node, target, max(until_s - time.monotonic(), _POLL_S))) != state:
        if time.monotonic() > until_s:
            raise LifecycleError(f"{target} is in state {found} after {timeout_s:g} s, not in {state}; see its log")
        time.sleep(_POLL_S)


def _call(node: Node, kind: type, service: str, request: object, timeout_s: float) -> object | None:
    """The service's answer, None if none came in time."""
    until_s = time.monotonic() + timeout_s
    client = node.create_client(kind, service)
    executor = SingleThreadedExecutor(context=node.context)
    executor.add_node(node)
    try:
        if not client.wait_for_service(timeout_sec=timeout_s):
            return None
        future = client.call_async(request)
        executor.spin_until_future_complete(future, timeout_sec=max(until_s - time.monotonic(), 0))
        return future.result() if future.done() else None
    finally:
        executor.remove_node(node)
        executor.shutdown()
        node.destroy_client(client)
