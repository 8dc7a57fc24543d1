# SPDX-License-Identifier: Apache-2.0
"""Command line: ``python -m training.data.minicity --out DIR``."""

from __future__ import annotations

import argparse
import re
import sys
import time

from occflownet_core.errors import DatasetError, OccflownetError
from training.data.minicity.generation import generate

_ABOUT = """\
Write MiniCity, a procedural city recorded by a nuScenes-like vehicle, in the nuScenes format:
all tables, six cameras, LIDAR_TOP, lidarseg, panoptic and Occ3D ground truth (gts/).
The same seed and sizes give the same bytes. Use different seeds for training and validation.

example:
  python -m training.data.minicity --out data/minicity --scenes 4 --keyframes 20 --seed 0 --image-size 704x396
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 2 wrong input)."""
    parser = argparse.ArgumentParser(
        "python -m training.data.minicity", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--scenes", type=int, default=1, metavar="N", help="number of scenes (default 1)")
    parser.add_argument(
        "--keyframes", type=int, default=20, metavar="K", help="keyframes per scene, 0.5 s apart (default 20)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="what the city looks like; part of scene names (default 0)"
    )
    parser.add_argument(
        "--image-size", default="1600x900", metavar="WxH", help="camera images, pixels; nuScenes has 1600x900 (default)"
    )
    parser.add_argument(
        "--processes", type=int, default=None, metavar="P", help="worker processes (default: one per core)"
    )
    parser.add_argument(
        "--write-semantics",
        action="store_true",
        help="also write a class PNG and a depth PNG (uint16, cm) per image under semantics/",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing MiniCity in DIR")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    try:
        size = _size(arguments.image_size)
        if arguments.processes is not None and arguments.processes < 1:
            raise DatasetError(f"--processes is {arguments.processes}; ask for at least 1")
        root = generate(
            arguments.out, arguments.scenes, arguments.keyframes, arguments.seed, size, arguments.processes,
            write_semantics=arguments.write_semantics, force=arguments.force, progress=True,
        )  # fmt: skip
    except OccflownetError as error:
        print(error, file=sys.stderr)
        return 2
    count = arguments.scenes * arguments.keyframes
    print(
        f"{count} keyframes in {time.monotonic() - started:.0f} s: {root} (open it with NuScenes('v1.0-mini', '{root}'))"
    )
    return 0


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise DatasetError(f"--image-size is '{text}'; give width and height as WxH, e.g. 1600x900")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
