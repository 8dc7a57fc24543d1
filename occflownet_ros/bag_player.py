# SPDX-License-Identifier: Apache-2.0
"""``bag_player``: play a rosbag2 bag on the ROS graph with nothing installed but rclpy and the message packages."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from occflownet_core.errors import BagError, OccflownetError
from occflownet_ros.bag import Bag
from occflownet_ros.playback import StopFlag

if TYPE_CHECKING:
    from occflownet_ros.player_node import Player, PlayerOptions, PlayReport

_HELP_END = """
Messages are sent as they were recorded, not decoded and encoded again; topics keep the QoS they were recorded with.
Topics whose message type is not installed are left out, with a warning. A bag that was cut is played up to the cut.

pause and resume:   ros2 service call /bag_player/pause std_srvs/srv/Trigger   (and /bag_player/resume)
looping:            each pass starts again at the bag's first stamp, so consumers see time jump back
slow consumers:     --max-in-flight 1 --ack-topic /occflownet/occupancy
                    holds the next camera set back until a result for the earlier one has been published; bag time
                    stands still meanwhile. Without it playback is in real time, and a slow consumer drops sets.

exit status: 0 played to the end, 1 played what a cut or damaged bag still holds, 2 bad input, 130 interrupted

examples:
  bag_player scene-0061
  bag_player recording_0.mcap --rate 0.5 --loop --clock 100 --topics /CAM_FRONT/image_rect_compressed /odom
"""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bag_player",
        description="Play a rosbag2 bag (MCAP or sqlite3) over ROS 2. Needs no ROS installation, only rclpy.",
        epilog=_HELP_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bag", type=Path, help="rosbag2 folder, or a .mcap or .db3 file")
    parser.add_argument("--rate", type=_positive, default=1.0, metavar="R", help="bag seconds per second (default: 1)")
    parser.add_argument(
        "--loop",
        type=_count,
        nargs="?",
        const=0,
        default=1,
        metavar="N",
        help="play N times; without N, until interrupted",
    )
    parser.add_argument("--start-offset", type=_not_negative, default=0.0, metavar="S", help="skip the first S seconds")
    parser.add_argument("--duration", type=_positive, metavar="S", help="play S seconds of the bag only")
    parser.add_argument("--topics", nargs="+", metavar="TOPIC", help="play these topics only")
    parser.add_argument("--clock", type=_positive, metavar="HZ", help="publish bag time on /clock, HZ times a second")
    parser.add_argument(
        "--wait-for-subscribers",
        type=_not_negative,
        default=5.0,
        metavar="S",
        help="wait up to S seconds until every topic has a listener (default: 5); "
        "ends early when some have and no other has come for 1.5 s; 0 starts at once",
    )
    parser.add_argument("--start-paused", action="store_true", help="wait for a call of /bag_player/resume")
    flow = parser.add_argument_group("slow consumers")
    flow.add_argument("--max-in-flight", type=_count, metavar="N", help="camera sets sent and not answered yet")
    flow.add_argument("--ack-topic", metavar="TOPIC", help="each message on it answers one set")
    flow.add_argument("--anchor-topic", metavar="TOPIC", help="topic that begins a set (default: first image played)")
    flow.add_argument(
        "--ack-timeout",
        type=_positive,
        default=10.0,
        metavar="S",
        help="go on after S seconds without an answer (default: 10)",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    if (arguments.max_in_flight is None) != (arguments.ack_topic is None):
        parser.error("--max-in-flight and --ack-topic belong together; give both or none")
    return arguments


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is negative or no number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count of at least 1")
    return value


def player_options(arguments: argparse.Namespace) -> PlayerOptions:
    from occflownet_ros.player_node import PlayerOptions

    return PlayerOptions(
        rate=arguments.rate,
        loops=arguments.loop,
        start_offset_s=arguments.start_offset,
        duration_s=arguments.duration,
        topics=arguments.topics,
        clock_hz=arguments.clock,
        wait_for_subscribers_s=arguments.wait_for_subscribers,
        start_paused=arguments.start_paused,
        max_in_flight=arguments.max_in_flight,
        ack_topic=arguments.ack_topic,
        anchor_topic=arguments.anchor_topic,
        ack_timeout_s=arguments.ack_timeout,
    )


def play(arguments: argparse.Namespace, ros_arguments: list[str]) -> int:
    """Open the bag, play it, print the report; the exit status.

    Raises:
        BagError: bad input; the message is one sentence.
    """
    try:
        from occflownet_ros.player_node import Player
    except ImportError as error:
        raise BagError(
            f"{error.name} is not installed; source a ROS 2 installation, or install the extra: pip install '.[ros]'"
        ) from None
    stop = StopFlag()
    with Bag(arguments.bag) as bag:
        if arguments.start_offset * 1e9 > bag.end_ns - bag.start_ns:
            length_s = (bag.end_ns - bag.start_ns) / 1e9
            raise BagError(f"--start-offset {arguments.start_offset:g} is beyond the bag's end at {length_s:.3f} s")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: stop.set(received))
        player = Player(bag, player_options(arguments), stop, ros_arguments)
        try:
            report = _play_with_progress(player, show=not arguments.no_progress)
        finally:
            player.close()
        damaged = bool(bag.damage)
    _print_report(report)
    if report.stopped_by is not None:
        return 128 + report.stopped_by
    return 1 if damaged else 0


def _play_with_progress(player: Player, show: bool) -> PlayReport:
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        return player.play()
    with Live(get_renderable=lambda: _progress(player), console=console, transient=True, refresh_per_second=5):
        return player.play()


def _progress(player: Player) -> Table:
    first_ns, last_ns = player.span_ns
    length_s, played_s = (last_ns - first_ns) / 1e9, (player.bag_time_ns - first_ns) / 1e9
    line = Table.grid(padding=(0, 1))
    line.add_row(player.state, ProgressBar(length_s, played_s, width=40), f"{played_s:.1f} / {length_s:.1f} s")
    return line


def _print_report(report: PlayReport) -> None:
    table = Table()
    table.add_column("topic", no_wrap=True)
    for heading in ("sent", "Hz", "late ms p50", "p99"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, topic in sorted(report.topics.items()):
        table.add_row(name, str(len(topic.sent_s)), _rate(topic.sent_s), *_lateness(topic.late_s))
    table.add_section()
    every = [late_s for topic in report.topics.values() for late_s in topic.late_s]
    table.add_row("all", str(len(every)), "", *_lateness(every))
    console = Console()
    console.print(table)
    line = f"{report.loops} pass(es) in {report.seconds:.2f} s"
    if report.answered or report.unanswered:
        line += f"; {report.answered} answers, {report.unanswered} sets unanswered"
    console.print(line, highlight=False)


def _rate(sent_s: list[float]) -> str:
    """Messages per second between the first and the last."""
    seconds = sent_s[-1] - sent_s[0] if len(sent_s) > 1 else 0.0
    return f"{(len(sent_s) - 1) / seconds:.2f}" if seconds > 0 else "-"


def _lateness(late_s: list[float]) -> tuple[str, str]:
    if not late_s:
        return "-", "-"
    return tuple(f"{1e3 * value:.2f}" for value in np.percentile(late_s, (50, 99)))


def main(argv: list[str] | None = None) -> int:
    """Console entry point; see ``--help`` for the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--ros-args") if "--ros-args" in argv else len(argv)
    arguments = parse_arguments(argv[:split])
    try:
        return play(arguments, argv[split:])
    except OccflownetError as error:
        print(f"bag_player: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
