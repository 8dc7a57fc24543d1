# SPDX-License-Identifier: Apache-2.0
"""Where the package's launch, config and demo files are: in a checkout, or installed in its share directory."""

from __future__ import annotations

from pathlib import Path

from occflownet_core.errors import OccflownetError

_CHECKOUT = Path(__file__).resolve().parent.parent


def share_path(*parts: str) -> Path:
    """A file or folder that the package ships, e.g. ``share_path("config", "fastdds.xml")``.

    Raises:
        OccflownetError: it is neither in a checkout nor installed.
    """
    beside = _CHECKOUT.joinpath(*parts)
    if (_CHECKOUT / "package.xml").is_file() and beside.exists():
        return beside
    try:
        from ament_index_python.packages import get_package_share_directory

        installed = Path(get_package_share_directory("occflownet_ros")).joinpath(*parts)
    except (ImportError, LookupError):
        installed = beside
    if not installed.exists():
        raise OccflownetError(f"{'/'.join(parts)} is not installed; build the package again, or run from a checkout")
    return installed
