# SPDX-License-Identifier: Apache-2.0
"""The environment of processes that exchange camera images; the launch file and the replay set it for their children."""

from __future__ import annotations

from occflownet_ros.share import share_path

MALLOC_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "268435456",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "67108864",
}
"""Big image buffers stay with the process: glibc would give each back to the system and page it in anew."""


def fastdds_profile() -> str:
    """Path of the Fast DDS profile with room for images in shared memory.

    Its default segment of 512 KB silently drops fragments of big images.
    """
    return str(share_path("config", "fastdds.xml"))


def image_environment() -> dict[str, str]:
    """All of it, as environment variables."""
    return {**MALLOC_ENVIRONMENT, "FASTDDS_DEFAULT_PROFILES_FILE": fastdds_profile()}
