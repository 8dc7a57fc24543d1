# SPDX-License-Identifier: Apache-2.0
"""Names, tokens and timestamps of a scene: all of them follow from the seed and the numbers of scene and keyframe."""

from __future__ import annotations

from dataclasses import dataclass

from occflownet_core.nuscenes_tables import stable_token
from training.data.minicity import calibration

VERSION = "v1.0-mini"
_EPOCH_US = 1_600_000_000_000_000
_SCENE_US = 10_000_000_000


def token(*parts: object) -> str:
    """A nuScenes token (32 hexadecimal digits) that depends on its parts alone."""
    return stable_token("minicity", *parts)


@dataclass(frozen=True)
class Naming:
    """Everything that is called something in one scene."""

    seed: int
    scene: int

    @property
    def name(self) -> str:
        return f"minicity-{self.seed}-{self.scene:04d}"

    def timestamp_us(self, keyframe: int, channel: str = calibration.LIDAR_CHANNEL) -> int:
        """When a channel measured; a sample's own timestamp is that of LIDAR_TOP."""
        offset = 0 if channel == calibration.LIDAR_CHANNEL else calibration.CAMERAS[channel].offset_us
        return _EPOCH_US + self.scene * _SCENE_US + keyframe * calibration.KEYFRAME_INTERVAL_US + offset

    def sample(self, keyframe: int) -> str:
        return token(self.name, "sample", keyframe)

    def sample_data(self, keyframe: int, channel: str) -> str:
        return token(self.name, "sample_data", keyframe, channel)

    def instance(self, actor: int) -> str:
        return token(self.name, "instance", actor)

    def annotation(self, keyframe: int, actor: int) -> str:
        return token(self.name, "annotation", keyframe, actor)

    def camera_file(self, keyframe: int, channel: str) -> str:
        return f"samples/{channel}/{self.name}__{channel}__{self.timestamp_us(keyframe, channel)}.jpg"

    def lidar_file(self, keyframe: int) -> str:
        channel = calibration.LIDAR_CHANNEL
        return f"samples/{channel}/{self.name}__{channel}__{self.timestamp_us(keyframe)}.pcd.bin"

    def occupancy_file(self, keyframe: int) -> str:
        return f"gts/{self.name}/{self.sample(keyframe)}/labels.npz"
