# SPDX-License-Identifier: Apache-2.0
"""The sensor suite: nuScenes' calibration of vehicle n015 (scene-0061), its trigger times, and its spinning LiDAR."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from occflownet_core import poses
from occflownet_core.camera import Camera

FULL_SIZE_PX = (1600, 900)
"""Width and height that the intrinsics below belong to."""

KEYFRAME_INTERVAL_US = 500_000


@dataclass(frozen=True)
class CameraCalibration:
    """One camera as nuScenes' calibrated_sensor table has it, and when it fires.

    Attributes:
        translation_m, rotation_wxyz: the camera's pose in the ego frame.
        focal_px, centre_px: intrinsics at 1600 x 900.
        offset_us: exposure time relative to the keyframe's LIDAR_TOP timestamp: a camera fires when the LiDAR's beam
            passes the centre of its view.
    """

    translation_m: tuple[float, float, float]
    rotation_wxyz: tuple[float, float, float, float]
    focal_px: float
    centre_px: tuple[float, float]
    offset_us: int


CAMERAS: dict[str, CameraCalibration] = {
    "CAM_FRONT": CameraCalibration(
        (1.70079118954, 0.0159456324149, 1.51095763913),
        (0.4998015430569128, -0.5030316162024876, 0.4997798114386805, -0.49737083824542755),
        1266.417203046554,
        (816.2670197447984, 491.50706579294757),
        -35_491,
    ),
    "CAM_FRONT_RIGHT": CameraCalibration(
        (1.5508477543, -0.493404796419, 1.49574800619),
        (0.2060347966337182, -0.2026940577919598, 0.6824507824531167, -0.6713610884174485),
        1260.8474446004698,
        (807.968244525554, 495.3344268742088),
        -27_612,
    ),
    "CAM_BACK_RIGHT": CameraCalibration(
        (1.0148780988, -0.480568219723, 1.56239545128),
        (0.12280980120078765, -0.132400842670559, -0.7004305821388234, 0.690496031265798),
        1259.5137405846733,
        (807.2529053838625, 501.19579884916527),
        -20_058,
    ),
    "CAM_BACK": CameraCalibration(
        (0.0283260309358, 0.00345136761476, 1.57910346144),
        (0.5037872666382278, -0.49740249788611096, -0.4941850223835201, 0.5045496097725578),
        809.2209905677063,
        (829.2196003259838, 481.77842384512485),
        -10_426,
    ),
    "CAM_BACK_LEFT": CameraCalibration(
        (1.03569100218, 0.484795032713, 1.59097014818),
        (0.6924185592174665, -0.7031619420114925, -0.11648342771943819, 0.11203317912370753),
        1256.7414812095406,
        (792.1125740759628, 492.7757465151356),
        -528,
    ),
    "CAM_FRONT_LEFT": CameraCalibration(
        (1.52387798135, 0.494631336551, 1.50932822144),
        (0.6757265034669446, -0.6736266522251881, 0.21214015046209478, -0.21122827103904068),
        1272.5979470598488,
        (826.6154927353808, 479.75165386361925),
        -43_107,
    ),
}

LIDAR_CHANNEL = "LIDAR_TOP"
LIDAR_TRANSLATION_M = (0.943713, 0.0, 1.84023)
LIDAR_ROTATION_WXYZ = (0.7077955119163518, -0.006492242056004365, 0.010646214713995808, -0.7063073142877817)
EGO_FROM_LIDAR = poses.pose(np.array(LIDAR_TRANSLATION_M), np.array(LIDAR_ROTATION_WXYZ))

SWEEP_US = 50_000
"""A revolution at 20 Hz; the sweep's timestamp is its end."""

LIDAR_RINGS = 32
LIDAR_COLUMNS = 1084
LIDAR_ELEVATION_DEG = np.linspace(-30.67, 10.67, LIDAR_RINGS)
"""HDL-32E beams, lowest first, as nuScenes numbers its rings."""

LIDAR_START_YAW_DEG = 104.4
"""Ego heading at which a sweep begins and ends: between CAM_BACK_LEFT (fires last) and CAM_FRONT_LEFT (first)."""

LIDAR_RANGE_M = 100.0
LIDAR_NOISE_M = 0.015

EGO_LENGTH_M, EGO_WIDTH_M, EGO_REAR_OVERHANG_M = 4.084, 1.730, 0.64
"""The recording vehicle's outline (Renault Zoe); the ego frame lies at its rear axle."""


def camera(name: str, width_px: int, height_px: int) -> Camera:
    """The named camera with its intrinsics scaled to the given image size."""
    calibration = CAMERAS[name]
    (cx, cy), f = calibration.centre_px, calibration.focal_px
    full = Camera(
        name=name,
        width_px=FULL_SIZE_PX[0],
        height_px=FULL_SIZE_PX[1],
        intrinsic=np.array([[f, 0, cx], [0, f, cy], [0, 0, 1.0]]),
        ego_from_camera=poses.pose(np.array(calibration.translation_m), np.array(calibration.rotation_wxyz)),
    )
    return full.resized(width_px, height_px)
