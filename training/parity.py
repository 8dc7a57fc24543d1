# SPDX-License-Identifier: Apache-2.0
"""A network and its exported graph side by side, over a made-up drive: images and ego motion that change."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import ExportError
from occflownet_core.lift_tables import build_lift_tables
from occflownet_core.model import DeployedModel, ModelConfig, OccFlowNet
from occflownet_core.runtime.bundle import Bundle
from occflownet_core.runtime.comparison import SINGLE_PRECISION, EngineOutput, Parity, difference, worst
from occflownet_core.runtime.engine import Prediction
from occflownet_core.runtime.onnx_engine import OnnxEngine

PARITY_FRAMES = 6


def check_parity(
    model: OccFlowNet, bundle: Bundle, required: Parity = SINGLE_PRECISION, frames: int = PARITY_FRAMES
) -> Parity:
    """Run the network and its bundle side by side over frames with changing images and ego motion.

    The threshold is the first frame's mean probability, so that occupied and free voxels are both put to the test.

    Raises:
        ExportError: they disagree by more than ``required`` allows.
    """
    rig = ring_rig(model.config)
    engine = OnnxEngine(bundle, threads=torch.get_num_threads())
    engine.calibrate(rig)
    images, _ = next(drive(model.config, 1))
    engine.occupancy_threshold = float(engine.infer(images, None).probability.mean())
    engine.reset()

    deployed = DeployedModel(model).eval()
    tables = table_tensors(rig, model)
    threshold, memory = torch.tensor(engine.occupancy_threshold), deployed.empty_memory()
    parities = []
    for frame, (images, previous_from_current) in enumerate(drive(model.config, frames)):
        graph = EngineOutput(engine.infer(images, previous_from_current))
        motion = torch.from_numpy(previous_from_current).float()
        with torch.no_grad():
            results = deployed(torch.from_numpy(images), *tables, motion, threshold, *memory)
        results, memory = results[: -len(memory)], results[-len(memory) :]
        named = {name: result.numpy() for name, result in zip(deployed.outputs, results, strict=False)}
        network = EngineOutput(Prediction.from_outputs(named))
        parities.append(difference(str(frame), network, graph).parity)
    parity = worst(parities)
    if not required.allows(parity):
        raise ExportError(
            f"the exported graph is not the network: {parity.label_agreement:.4%} of labels agree, probabilities "
            f"or velocities differ by up to {parity.probability_error:.2g}; nothing was written"
        )
    return parity


def ring_rig(config: ModelConfig) -> CameraRig:
    """Cameras at 1.6 m height that look outwards at equal angles, with the network's own image size."""
    width, height = config.image_width_px, config.image_height_px
    focal_px = config.depth.reference_focal_px or 0.8 * width
    intrinsic = np.array([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1]])
    cameras = []
    for name, yaw in zip(config.cameras, np.linspace(0, 2 * np.pi, len(config.cameras), endpoint=False), strict=True):
        ego_from_camera = np.eye(4)
        right, down = (np.sin(yaw), -np.cos(yaw), 0), (0, 0, -1)
        ego_from_camera[:3, :3] = np.stack([right, down, (np.cos(yaw), np.sin(yaw), 0)], axis=1)
        ego_from_camera[2, 3] = 1.6
        cameras.append(Camera(name, width, height, intrinsic, ego_from_camera))
    return CameraRig(tuple(cameras))


def drive(config: ModelConfig, frames: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Made-up input: blocks of colour that drift through the images while the vehicle drives a wavy line.

    Yields:
        images uint8 [N, H, W, 3], previous_from_current float64 [4, 4] (identity at first).
    """
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (len(config.cameras), config.image_height_px // 8, config.image_width_px // 8, 3))
    images = blocks.repeat(8, axis=1).repeat(8, axis=2) + rng.integers(-20, 20, (1, 1, 1, 3))
    for frame in range(frames):
        drifted = np.roll(images, 5 * frame, axis=2) + rng.integers(-10, 10, images.shape)
        yaw = 0.1 * np.sin(frame) if frame else 0.0
        step_m = np.array([0.7 * frame, 0.1 * frame, 0.02]) if frame else np.zeros(3)
        yield np.clip(drifted, 0, 255).astype(np.uint8), poses.pose(step_m, (np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)))


def table_tensors(rig: CameraRig, model: OccFlowNet) -> tuple[torch.Tensor, ...]:
    """A rig's lift tables as the deployed network takes them."""
    tables = build_lift_tables(rig, model.lift_spec)
    return tuple(torch.from_numpy(array) for array in tables.arrays().values())
