# SPDX-License-Identifier: Apache-2.0
"""Data sets in the nuScenes format: readers, rays, and the procedural MiniCity."""
