# SPDX-License-Identifier: Apache-2.0
"""``replay_evaluation``: a bag through the node that drives, scored; ``report.json`` and a page to look at."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from occflownet_core.errors import DatasetError, OccflownetError
from occflownet_core.labels import FREE
from occflownet_ros.evaluation_table import print_report
from occflownet_ros.ground_truth import evaluate_keyframes, total
from occflownet_ros.private_graph import use_private_graph
from occflownet_ros.replay_plan import LOCKSTEP, REALTIME, Plan, make_plan
from occflownet_ros.report import content
from occflownet_ros.report.page import PageFrame, build_page

if TYPE_CHECKING:
    from occflownet_ros.replay import Replay

_OURS = {"report.json", "report.html", "node.log", "labels", "calibration.yaml"}

_HELP_END = """
lockstep (default): each keyframe that the bag marks on /keyframe goes through the node exactly once, made of its own
    images, and the next is sent when its labels have come. The labels are, bit for bit, those of
    `python -m training.evaluate --bundle DIR --reference anchor` on the data root that the bag was made of.
realtime: the bag is played at --rate; the node drops what it cannot keep up with, as on the vehicle. A keyframe whose
    set the node did not publish counts as predicted free everywhere, in mIoU and RayIoU alike.

ground truth: --gt DATAROOT reads Occ3D labels from DATAROOT/gts; without it, those that the bag carries
    (nuscenes_to_bag writes them). Without any, the viewer and the latencies still come.

OUT/report.html opens in a browser, without a network; OUT/report.json holds the same numbers; OUT/node.log is the node's.

examples:
  nuscenes_to_bag --dataroot /data/nuscenes --version v1.0-mini --scene scene-0061 --out scene-0061
  replay_evaluation --bag scene-0061 --bundle models/mine --out out/scene-0061
  replay_evaluation --bag scene-0061 --bundle models/mine --out out/live --mode realtime --rate 0.5
  replay_evaluation --bag my_drive --bundle models/mine --out out/mine --mode realtime --param missing_cameras:=mask
"""

console = Console(highlight=False)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="replay_evaluation",
        description="Run a recorded drive through the occupancy node over DDS and measure it: IoU per class, RayIoU, "
        "latencies and drops, with a page that shows every keyframe in 3D.",
        epilog=_HELP_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bag", type=Path, required=True, help="rosbag2 folder, or a .mcap or .db3 file")
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="model bundle")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--gt", type=Path, metavar="DATAROOT", help="root with Occ3D's gts/ (default: the bag's own truth)"
    )
    parser.add_argument("--mode", choices=(LOCKSTEP, REALTIME), default=LOCKSTEP, help="default: %(default)s")
    parser.add_argument("--rate", type=float, metavar="R", help="realtime: bag seconds per second (default: 1)")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="cameras' extrinsics (default: calibration.yaml in the bag, else its /tf_static)",
    )
    parser.add_argument(
        "--anchor-camera", metavar="NAME", help="opens a set (default: CAM_FRONT, or the bundle's first)"
    )
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME:=VALUE",
        help="a parameter of the node, e.g. deadline_ms:=150; may be given again",
    )
    parser.add_argument(
        "--max-frames",
        type=int,
        default=60,
        metavar="N",
        help="frames on the page, evenly spread (default: %(default)s)",
    )
    parser.add_argument(
        "--save-labels", action="store_true", help="write OUT/labels/<token>.npz (semantics, Occ3D's layout) too"
    )
    parser.add_argument(
        "--answer-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="lockstep: longest wait for labels (default: 60)",
    )
    parser.add_argument("--force", action="store_true", help="replace an older evaluation in --out")
    arguments = parser.parse_args(argv)
    if arguments.rate is not None and (arguments.mode != REALTIME or not 0 < arguments.rate < float("inf")):
        parser.error(f"--rate is {arguments.rate:g}; give a positive number, and --mode {REALTIME} with it")
    if arguments.max_frames < 1 or not arguments.answer_timeout > 0:
        parser.error("--max-frames and --answer-timeout must be positive")
    return arguments


def evaluate(arguments: argparse.Namespace) -> content.ReplayReport:
    """Replay, score, and write everything to ``--out``.

    Raises:
        OccflownetError: with one sentence for the user.
    """
    _require_room(arguments.out, arguments.force)
    started_s = time.monotonic()
    with console.status("reading the bag"):
        plan = make_plan(arguments)
    replay = _replay(plan, arguments.out, arguments.answer_timeout)
    labels = [_labels_of(replay, stamp_ns) for _, _, stamp_ns in _moments(plan, replay)]
    if not replay.frames and not replay.set_counts().get("opened"):
        raise OccflownetError(f"the node published no voxels: {replay.trouble()}; see {arguments.out / 'node.log'}")
    with console.status("scoring"):
        report, shown = _report(plan, replay, labels, started_s, arguments.max_frames)
    (arguments.out / "report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    with console.status("writing the page"):
        frames = _page_frames(plan, report, labels, shown)
        page = build_page(report, plan.bundle.grid, plan.bundle.cameras, frames)
        (arguments.out / "report.html").write_text(page, encoding="utf-8")
    if arguments.save_labels:
        _save_labels(arguments.out / "labels", report, labels)
    return report


def _require_room(out: Path, force: bool) -> None:
    """Refuse to mix with anything but an older evaluation, and to replace that unless told to; then make the folder."""
    try:
        if out.exists() and not out.is_dir():
            raise DatasetError(f"--out {out} is a file; name a folder")
        found = {path.name for path in out.iterdir()} if out.is_dir() else set()
        if found - _OURS:
            raise DatasetError(f"--out {out} holds {min(found - _OURS)}, which is no evaluation's; name another folder")
        if found and not force:
            raise DatasetError(
                f"--out {out} holds an evaluation already; name another folder, or replace it with --force"
            )
        for name in found:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"--out {out} cannot be written ({error.strerror}); name another folder") from None


def _replay(plan: Plan, out: Path, answer_timeout_s: float) -> Replay:
    # rclpy is imported late: the transport's environment must stand before.
    from occflownet_ros.lockstep import replay_lockstep
    from occflownet_ros.replay import process_environment, replay_bag

    use_private_graph()
    os.environ.update(process_environment())
    if plan.mode == LOCKSTEP:
        complete = sum(keyframe.is_complete for keyframe in plan.keyframes)
        with _progress("keyframes", complete) as advance_to:
            done = iter(range(1, complete + 1))
            return replay_lockstep(
                plan.bag,
                plan.keyframes,
                plan.inputs,
                plan.parameters,
                out,
                answer_timeout_s,
                lambda: advance_to(next(done)),
            )
    bag_s = (plan.span_ns[1] - plan.span_ns[0]) / 1e9 / plan.rate
    player = ("--rate", f"{plan.rate:g}", "--no-progress", *(("--clock", "200") if plan.rate != 1.0 else ()))
    with _progress("seconds", round(bag_s)) as advance_to:
        return replay_bag(plan.bag, plan.parameters, out, player, lambda played_s: advance_to(min(played_s, bag_s)))


@contextmanager
def _progress(what: str, count: int) -> Iterator[Callable[[float], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    errors = Console(stderr=True, highlight=False)
    with Progress(
        *columns, TimeRemainingColumn(), console=errors, transient=True, disable=not errors.is_terminal
    ) as bar:
        task = bar.add_task(what, total=max(count, 1))
        yield lambda done: bar.update(task, completed=int(done))


def _moments(plan: Plan, replay: Replay) -> list[tuple[str, int, int | None]]:
    """(token, stamp, stamp of the set) of every keyframe, or of every published set where there are no keyframes."""
    if plan.keyframes:
        return [(k.token, k.stamp_ns, k.set_stamp_ns if k.is_complete else None) for k in plan.keyframes]
    return [("", stamp_ns, stamp_ns) for stamp_ns in sorted(replay.frames)]


def _labels_of(replay: Replay, set_stamp_ns: int | None) -> np.ndarray | None:
    frame = replay.frames.get(set_stamp_ns)
    return None if frame is None else frame.labels


def _report(
    plan: Plan, replay: Replay, labels: Sequence[np.ndarray | None], started_s: float, max_frames: int
) -> tuple[content.ReplayReport, list[int]]:
    """The report, and which of its frames go onto the page."""
    records, scores = _records(plan, replay, labels)
    published = sum(record.published for record in records)
    counts = content.KeyframeCounts(
        len(records), sum(k.is_complete for k in plan.keyframes), published, len(records) - published
    )
    engine = replay.diagnostics.get("engine", {}).get("engine", "")
    cameras = {name: replay.diagnostics.get(f"camera {name}", {}) for name in plan.bundle.cameras}
    report = content.ReplayReport(
        model=content.model_source(plan.bundle, engine.rpartition(" on ")[2], plan.threshold),
        bag=content.BagSource(
            plan.bag.resolve().name, content.bag_sha256(plan.bag), *plan.span_ns, _truth_source(plan)
        ),
        mode=content.ReplayMode(plan.mode, plan.rate, plan.anchor_camera, _portable(plan.parameters)),
        machine=content.this_machine(),
        settings=content.settings_sentence(
            plan.bundle, plan.threshold, plan.threshold == plan.bundle.occupancy_threshold, bool(plan.truth)
        ),
        keyframes=counts if plan.keyframes else None,
        scores=scores,
        frames=records,
        latency_ms=content.latency_summary(replay.latency_ms),
        sets=replay.set_counts(),
        images={name: _counts(values) for name, values in cameras.items()},
        memory=_counts(replay.diagnostics.get("ego motion", {})),
        seconds=round(time.monotonic() - started_s, 2),
    )
    shown = np.unique(np.linspace(0, len(records) - 1, min(max_frames, len(records))).round().astype(int)).tolist()
    return report, shown


def _records(
    plan: Plan, replay: Replay, labels: Sequence[np.ndarray | None]
) -> tuple[list[content.FrameRecord], dict | None]:
    """One record per moment, and the scores of all together."""
    prediction = dict(zip((stamp_ns for _, stamp_ns, _ in _moments(plan, replay)), labels, strict=True))
    single = list(evaluate_keyframes(plan.truth, [prediction[k.stamp_ns] for k in plan.truth], plan.bundle.grid))
    has_rays = bool(plan.truth) and all(k.ray_origins_m is not None for k in plan.truth)
    own_scores = {k.stamp_ns: _own_scores(e.to_dict(), has_rays) for k, e in zip(plan.truth, single, strict=True)}
    latency_ms = replay.frame_latency_ms()
    records = []
    for (token, stamp_ns, set_stamp_ns), voxels in zip(_moments(plan, replay), labels, strict=True):
        records.append(
            content.FrameRecord(
                token,
                stamp_ns,
                set_stamp_ns,
                voxels is not None,
                "" if voxels is not None else _reason(plan, replay, set_stamp_ns),
                {stage: round(ms, 2) for stage, ms in latency_ms.get(set_stamp_ns, {}).items()},
                0 if voxels is None else int((voxels != FREE).sum()),
                own_scores.get(stamp_ns),
            )
        )
    return records, total(single, has_rays) if single else None


def _own_scores(scores: dict, has_rays: bool) -> dict[str, float | None]:
    masked = scores["camera_mask"]
    own = {"miou_17": masked["miou_17"], "geometric_iou": masked["geometric_iou"]}
    return {**own, **({"ray_iou": scores["rays"]["ray_iou"]} if has_rays else {})}


def _reason(plan: Plan, replay: Replay, set_stamp_ns: int | None) -> str:
    if set_stamp_ns is None:
        return "the bag lacks an image of it"
    return replay.unanswered.get(set_stamp_ns, "the node did not publish its set")


def _truth_source(plan: Plan) -> str:
    if not plan.truth:
        return "none"
    return f"Occ3D labels of {len(plan.truth)} of {len(plan.keyframes)} keyframes"


def _portable(parameters: Mapping[str, object]) -> dict[str, object]:
    """Parameters without the folders of this machine."""
    return {
        name: Path(value).name if name in ("bundle", "calibration_file") else value
        for name, value in parameters.items()
    }


def _counts(values: Mapping[str, str]) -> dict[str, int]:
    return {key: int(value) for key, value in values.items() if value.isdigit()}


def _page_frames(
    plan: Plan, report: content.ReplayReport, labels: Sequence[np.ndarray | None], shown: Sequence[int]
) -> list[PageFrame]:
    from occflownet_ros.bag_images import thumbnails

    truth = {keyframe.stamp_ns: keyframe for keyframe in plan.truth}
    complete = {k.stamp_ns: k.image_stamps_ns for k in plan.keyframes}
    moments_ns = [complete.get(report.frames[i].stamp_ns, report.frames[i].stamp_ns) for i in shown]
    images = thumbnails(plan.bag, plan.inputs.images, moments_ns)
    frames = []
    for i, pictures in zip(shown, images, strict=True):
        known = truth.get(report.frames[i].stamp_ns)
        named = {
            camera: pixels for camera, pixels in zip(plan.bundle.cameras, pictures, strict=True) if pixels is not None
        }
        frames.append(
            PageFrame(i, labels[i], known.labels if known else None, known.camera_mask if known else None, named)
        )
    return frames


def _save_labels(folder: Path, report: content.ReplayReport, labels: Sequence[np.ndarray | None]) -> None:
    folder.mkdir()
    for record, voxels in zip(report.frames, labels, strict=True):
        if voxels is not None:
            np.savez_compressed(folder / f"{record.token or record.stamp_ns}.npz", semantics=voxels)


def main(argv: list[str] | None = None) -> int:
    """Console entry point; exit status 2 with one sentence on a user's mistake."""
    arguments = parse_arguments(argv)
    try:
        report = evaluate(arguments)
    except OccflownetError as error:
        print(f"replay_evaluation: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print_report(report, arguments.out, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
