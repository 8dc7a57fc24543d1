# SPDX-License-Identifier: Apache-2.0
"""The parameter table: defaults, refusals with their reason, and the documentation that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from occflownet_ros import parameters
from occflownet_ros.parameters import ParameterError, Settings

ROOT = Path(__file__).parents[2]


def test_defaults_are_valid_and_typed():
    settings = Settings.from_values(parameters.defaults())
    assert settings == Settings()
    assert settings.camera_namespaces == () and settings.deadline_ms == 100.0


def test_values_are_taken_over():
    settings = Settings.from_values({"deadline_ms": 50, "camera_namespaces": ["/a", "/b"], "threads": 2.0})
    assert settings.deadline_ms == 50.0 and isinstance(settings.deadline_ms, float)
    assert settings.threads == 2 and isinstance(settings.threads, int)
    assert settings.camera_namespaces == ("/a", "/b")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"deadlin_ms": 50}, "there is no parameter 'deadlin_ms'; did you mean 'deadline_ms'?"),
        ({"deadline_ms": 0.5}, "deadline_ms is 0.5; give ms from 1 to 60000"),
        ({"deadline_ms": float("nan")}, "deadline_ms is nan; give a number from 1 to 60000"),
        ({"deadline_ms": "fast"}, "deadline_ms is 'fast'; give a number from 1 to 60000"),
        ({"deadline_ms": True}, "deadline_ms is True; give a number"),
        ({"rectify": 1}, "rectify is 1; give true or false"),
        ({"rectify": True, "intrinsics_source": "calibration_file"}, "rectify needs the distortion of camera_info"),
        ({"threads": 1.5}, "threads is 1.5; give a whole number from 0 to 256"),
        ({"missing_cameras": "ignore"}, "missing_cameras is 'ignore'; choose drop or mask"),
        ({"bundle": 3}, "bundle is 3; give a string"),
        ({"camera_namespaces": "/a"}, "camera_namespaces is '/a'; give a list of strings"),
        ({"camera_namespaces": 7}, "camera_namespaces is 7; give a list of strings"),
        ({"camera_namespaces": [1]}, "give a list of strings"),
        (
            {"costmap_blocking_classes": ["car", "dog"]},
            "costmap_blocking_classes has 'dog'; choose from others, barrier",
        ),
        ({"costmap_min_height_m": 3.0}, "costmap_min_height_m is 3 and costmap_max_height_m 2.2"),
        ({"intrinsics_source": "calibration_file"}, "calibration_file is empty; name a file"),
    ],
)
def test_wrong_values_are_refused_with_one_sentence(values, sentence):
    with pytest.raises(ParameterError) as error:
        Settings.from_values(values)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_every_row_is_complete():
    for name in parameters.NAMES:
        text, limits = parameters.describe(name)
        assert text[0].isupper() and limits


def test_the_documentation_shows_this_very_table():
    assert parameters.table_markdown() in (ROOT / "docs" / "topics_and_parameters.md").read_text()


def test_the_shipped_configuration_is_valid_and_complete():
    yaml = pytest.importorskip("yaml")
    values = yaml.safe_load((ROOT / "config" / "occ.yaml").read_text())["/**/occflownet"]["ros__parameters"]
    Settings.from_values(values)
    assert set(values) <= set(parameters.NAMES)
