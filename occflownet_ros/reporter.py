# SPDX-License-Identifier: Apache-2.0
"""Once a second on /diagnostics: what an active node knows about its engine, calibration, ego motion, meshes and cameras."""

from __future__ import annotations

import time
from collections import Counter

from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from occflownet_core.runtime.engine import Engine
from occflownet_ros import diagnostics
from occflownet_ros.diagnostics import Complaints
from occflownet_ros.inputs import Inputs
from occflownet_ros.parameters import Settings
from occflownet_ros.pipeline import Pipeline, PipelineReport
from occflownet_ros.publishers import Outputs

_PERIOD_S = 1.0


class Reporter:
    """Publishes the diagnostics of an active node. One per activation.

    Args:
        node: whose timer and clock are used.
        publisher: of /diagnostics.
        settings: as configured.
        engine, inputs, pipeline, outputs: what is reported on.
        complain: takes (subject, sentence) about trouble.
    """

    def __init__(
        self,
        node: Node,
        publisher,
        settings: Settings,
        engine: Engine,
        inputs: Inputs,
        pipeline: Pipeline,
        outputs: Outputs,
        complain: Complaints,
    ) -> None:
        self._node = node
        self._publisher = publisher
        self._settings = settings
        self._engine = engine
        self._inputs = inputs
        self._pipeline = pipeline
        self._outputs = outputs
        self._complain = complain
        self._reported_s = self._calibrated_s = time.monotonic()
        self._last, self._last_meshes = pipeline.report(), outputs.mesh_report()
        self._timer = node.create_timer(_PERIOD_S, self._report, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def close(self) -> None:
        self._node.destroy_timer(self._timer)
        self._timer = None  # it holds this object, and this object the engine: freed here and now

    def _report(self) -> None:
        now_s, report, meshes = time.monotonic(), self._pipeline.report(), self._outputs.mesh_report()
        calibration, bundle = self._inputs.calibration, self._engine.bundle
        if not calibration.problem:
            self._calibrated_s = now_s
        elif (waited_s := now_s - self._calibrated_s) > self._settings.calibration_timeout_s:
            self._complain(calibration.problem, f"no calibration for {waited_s:.0f} s: {calibration.problem}")
        statuses = [
            diagnostics.engine_status(
                f"{bundle.name} on {self._engine.name}",
                report.sets,
                report.sets - self._last.sets,
                self._pipeline.latency,
            ),
            diagnostics.calibration_status(
                calibration.problem or report.calibration_problem,
                calibration.changes,
                self._inputs.calibration_sources,
            ),
            diagnostics.ego_motion_status(self._ego_motion(now_s, report)),
            diagnostics.mesh_status(meshes, meshes.counters - self._last_meshes.counters),
            *(diagnostics.camera_status(camera) for camera in self._cameras(now_s, report)),
        ]
        stamp = self._node.get_clock().now().to_msg()
        self._publisher.publish(diagnostics.diagnostic_array(stamp, self._node.get_name(), bundle.name, statuses))
        self._last, self._last_meshes, self._reported_s = report, meshes, now_s

    def _ego_motion(self, now_s: float, report: PipelineReport) -> diagnostics.EgoMotionReport:
        last_s = report.last_pose_s
        return diagnostics.EgoMotionReport(
            self._inputs.ego_motion_source,
            self._inputs.ego_motion_trouble() if last_s is None else "",
            None if last_s is None else now_s - last_s,
            report.poses,
            report.poses - self._last.poses,
            report.resets,
            report.resets - self._last.resets,
            report.reset_reason,
        )

    def _cameras(self, now_s: float, report: PipelineReport) -> list[diagnostics.CameraReport]:
        reports = []
        for camera, name in enumerate(self._engine.bundle.cameras):
            last_s = report.last_image_s[camera]
            recent: Counter[str] = report.images[camera] - self._last.images[camera]
            reports.append(
                diagnostics.CameraReport(
                    name,
                    self._inputs.image_topics[camera],
                    None if last_s is None else now_s - last_s,
                    recent["received"] / (now_s - self._reported_s),
                    report.images[camera],
                    recent,
                    report.cadences[camera],
                    self._ahead_of_anchor_s(camera, now_s, report),
                )
            )
        return reports

    def _ahead_of_anchor_s(self, camera: int, now_s: float, report: PipelineReport) -> float:
        """Of a camera's newest stamp; 0 while the anchor camera is silent, or either has sent nothing."""
        anchor = self._pipeline.anchor
        anchor_ns, newest_ns = report.cadences[anchor].newest_ns, report.cadences[camera].newest_ns
        if anchor_ns is None or newest_ns is None or now_s - report.last_image_s[anchor] > diagnostics.CAMERA_TIMEOUT_S:
            return 0.0
        return (newest_ns - anchor_ns) / 1e9
