# SPDX-License-Identifier: Apache-2.0
"""The node and its engine: which one and why stands in the node's log; build_only builds one and ends."""

from __future__ import annotations

import logging
import time

import pytest
import rclpy
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.logging import get_logger
from rclpy.parameter import Parameter

from occflownet_core.runtime import cuda_device, tensorrt_build
from occflownet_ros.core_log import core_messages
from occflownet_ros.node import OccflownetNode
from occflownet_ros.parameters import ParameterError, Settings
from occflownet_ros.private_graph import private_domain
from tests.core.graph_by_hand import hand_made_graph, write
from tests.core.nvidia_twins import CudaTwin, TensorRTTwin

DOMAIN_ID = private_domain()


@pytest.fixture
def make(tmp_path, ros_environment_here):
    made = []

    def build(**values) -> OccflownetNode:
        context = Context()
        rclpy.init(context=context, domain_id=DOMAIN_ID)
        bundle = write(tmp_path / "bundle", hand_made_graph().SerializeToString())
        values = {"bundle": str(bundle.directory), "odom_topic": "", "threads": 1, **values}
        values |= {"calibration_file": "", "engine_cache": str(tmp_path / "engines")}
        overrides = [Parameter(name, value=value) for name, value in values.items()]
        made.append(OccflownetNode(context=context, parameter_overrides=overrides))
        return made[-1]

    yield build
    for node in made:
        node.release()
        node.destroy_node()
        rclpy.try_shutdown(context=node.context)


@pytest.fixture
def ros_environment_here(monkeypatch):
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    # Extrinsics would come from tf; what these tests are about comes after that is settled.
    monkeypatch.setattr("occflownet_ros.node._require_tf", lambda settings: None)


def test_the_log_says_which_engine_and_why(make, capfd):
    node = make()
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    said = capfd.readouterr().err
    assert "engine: onnxruntime-" in said and "ONNX Runtime is installed" in said
    assert "configured: model 'by hand' on onnxruntime" in said


def test_build_only_builds_once_and_ends_the_node(make, monkeypatch, tmp_path, capfd):
    cuda = CudaTwin()
    trt = TensorRTTwin(cuda)
    monkeypatch.setattr(cuda_device, "cuda_runtime", lambda: cuda)
    monkeypatch.setattr(tensorrt_build, "tensorrt", lambda: trt)
    for words in ("was built in", "was there already"):
        node = make(build_only=True)
        executor = SingleThreadedExecutor(context=node.context)
        executor.add_node(node)
        assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
        until_s = time.monotonic() + 10
        try:
            while node.context.ok() and time.monotonic() < until_s:
                executor.spin_once(timeout_sec=0.1)
        except ExternalShutdownException:
            pass
        assert not node.context.ok()
        executor.shutdown()
        said = capfd.readouterr().err
        assert words in said and "build_only is true, so the node ends" in said
    (path,) = (tmp_path / "engines").glob("*.engine")
    assert str(path) in said and trt.builds == 1


def test_build_only_without_tensorrt_is_refused_in_one_sentence(make, capfd):
    try:
        import tensorrt  # noqa: F401

        pytest.skip("TensorRT is installed here")
    except ImportError:
        pass
    node = make(build_only=True)
    assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
    said = capfd.readouterr().err
    assert "TensorRT is not installed; pip install tensorrt" in said and "Traceback" not in said
    assert node.context.ok()


def test_build_only_needs_the_backend_that_is_built():
    with pytest.raises(
        ParameterError, match="build_only builds an engine of the backend tensorrt, and backend is torch"
    ):
        Settings.from_values({"build_only": True, "backend": "torch"})
    assert Settings.from_values({"build_only": True, "backend": "tensorrt", "precision": "fp16"}).build_only


def test_the_cores_messages_pass_for_as_long_as_they_should(capfd):
    core = logging.getLogger("occflownet_core.runtime.factory")
    with core_messages(get_logger("a_node")):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            core.log(level, "level %d", level)
    core.info("afterwards")
    said = capfd.readouterr().err
    assert [f"level {level}" in said for level in (10, 20, 30, 40)] == [False, True, True, True]
    assert "afterwards" not in said and "[a_node]" in said
    assert not logging.getLogger("occflownet_core").handlers
