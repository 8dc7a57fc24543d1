# SPDX-License-Identifier: Apache-2.0
"""MiniCity: a procedural city, recorded by a nuScenes-like vehicle and written in the nuScenes format."""

from training.data.minicity.generation import generate, scene_world

__all__ = ["generate", "scene_world"]
