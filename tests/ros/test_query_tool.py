# SPDX-License-Identifier: Apache-2.0
"""occflownet-query on the demo's drive and bundle: answers, files, and one sentence for every mistake."""

import csv
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from hypothesis import given
from hypothesis import strategies as st

from occflownet_core.errors import DatasetError
from occflownet_core.runtime.bundle import load_bundle
from occflownet_core.runtime.factory import create_engine
from occflownet_ros.engine_inputs import bag_inputs
from occflownet_ros.query_tool import main, read_points

DEMO = Path(__file__).resolve().parents[2] / "demo"
COMMON = ["--bundle", str(DEMO / "bundle"), "--bag", str(DEMO / "bag"), "--threads", "1"]


def answers(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_points_of_a_drive_are_answered_as_its_labels_say(tmp_path, capsys):
    """At the outermost corner cells of the grid, where labels and queries read the very same features, over two frames
    of memory; and outside."""
    bundle = load_bundle(DEMO / "bundle")
    engine, prediction = create_engine(bundle, "onnxruntime", threads=1), None
    for number, frame in enumerate(bag_inputs(DEMO / "bag", bundle, most=2)):
        if number == 0:
            engine.calibrate(frame.rig)
        prediction = engine.infer(frame.images, frame.previous_from_current)
    corners = [(i, j, k) for i in (0, -1) for j in (0, -1) for k in (0, -1)]
    centres_m = [bundle.grid.centres()[corner] for corner in corners]
    points = tmp_path / "points.csv"
    points.write_text("name,z,y,x\n" + "".join(f"p,{z},{y},{x}\n" for x, y, z in centres_m) + "far,0,0,41\n")
    assert main([*COMMON, "--frame", "1", "--points", str(points), "--gradient"]) == 0
    said = capsys.readouterr()
    rows = answers(said.out)
    assert list(rows[0]) == ["x", "y", "z", "inside", "probability", "label", "class", "gx", "gy", "gz"]
    for row, centre_m, corner in zip(rows, centres_m, corners, strict=False):
        np.testing.assert_allclose([float(row[axis]) for axis in "xyz"], centre_m)
        # The graph's own decoders are stored in half precision, those of the queries are not.
        assert float(row["probability"]) == pytest.approx(float(prediction.probability[corner]), abs=5e-3)
    assert [rows[-1][key] for key in ("inside", "probability", "label", "class", "gx")] == [
        "0",
        "0.000000",
        "17",
        "free",
        "0",
    ]
    assert "9 points" in said.err


def test_a_lattice_and_a_mesh_of_the_same_moment(tmp_path, capsys):
    out, mesh = tmp_path / "deep" / "lattice.csv", tmp_path / "scene.ply"
    assert main([*COMMON, "--lattice", "1.6", "--out", str(out), "--mesh", str(mesh), "--resolution", "0.8"]) == 0
    rows = answers(out.read_text())
    assert len(rows) == 50 * 50 * 4
    assert {row["class"] for row in rows} >= {"driveable_surface", "free"}
    shape = trimesh.load(mesh, process=False)
    assert len(shape.faces) > 1000
    assert (np.abs(shape.bounds) <= [[40, 40, 1], [40, 40, 5.401]]).all()
    said = capsys.readouterr()
    assert said.out == "" and "triangles at 0.8 m" in said.err and "92" in said.err


def test_standard_input_without_torch():
    """As on a vehicle: a process of its own that imports neither torch nor rclpy."""
    program = (
        "import sys; from occflownet_ros.query_tool import main; status = main(sys.argv[1:]);"
        "sys.exit(status or 10 * ('torch' in sys.modules) or 20 * ('rclpy' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *COMMON, "--points", "-"],
        input="1.0, 2.0, 0.5\n\n3,4,5\n",
        capture_output=True,
        text=True,
        check=False,
        cwd=DEMO.parent,
    )
    assert done.returncode == 0, done.stderr
    assert [row["y"] for row in answers(done.stdout)] == ["2.0", "4.0"]


@given(st.lists(st.tuples(*[st.floats(allow_nan=False, width=32)] * 3), min_size=1), st.booleans())
def test_points_are_read_as_they_were_written(points, named):
    lines = ["z,note,x,y"] if named else []
    lines += [f"{z!r},n,{x!r},{y!r}" if named else f"{x!r},{y!r},{z!r},n" for x, y, z in points]
    np.testing.assert_array_equal(read_points(lines, "a file"), points)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a file holds no points"),
        ("x,y,z\n", "a file holds no points"),
        ("1,2\n", "line 1 of a file is '1,2'; give x,y,z"),
        ("x,y,z\n1,2,3\n1,two,3\n", "line 3 of a file is '1,two,3'; give x,y,z"),
    ],
)
def test_lines_that_are_no_points(text, words):
    with pytest.raises(DatasetError, match=words):
        read_points(text.splitlines(), "a file")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--points", "missing.csv"], "missing.csv cannot be read"),
        (["--points", "nan.csv"], "query point 1 is [nan, 0.0, 0.0]; leave out points that are not numbers"),
        (
            ["--points", "good.csv", "--frame", "99"],
            "complete image sets and none is '99'; give a place from 0, or a token",
        ),
        (["--mesh", "scene.glb", "--threshold", "1"], "threshold is 1.0; give a probability between 0 and 1"),
        (["--mesh", "scene.obj", "--resolution", "0.8"], "scene.obj is no mesh format that can be written"),
        (["--lattice", "0.3"], "choose a size that divides each edge"),
    ],
)
def test_a_users_mistake_gets_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("good.csv").write_text("1,2,3\n")
    Path("nan.csv").write_text("1,2,3\nnan,0,0\n")
    assert main([*COMMON, *arguments]) == 2
    said = capsys.readouterr()
    assert words in " ".join(said.err.split()) and said.out == ""
    assert not Path("scene.glb").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "there is nothing to do"), (["--points", "-", "--lattice", "1"], "two ways of naming points")],
)
def test_arguments_that_do_not_go_together(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*COMMON, *arguments])
    assert ended.value.code == 2 and words in capsys.readouterr().err
