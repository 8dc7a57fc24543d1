# SPDX-License-Identifier: Apache-2.0
"""docs/faults.md names tests that exist, and leaves out none of the fault tests."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TABLE = (REPOSITORY / "docs" / "faults.md").read_text()
FAULT_TESTS = (
    "integration/test_faults.py",
    "integration/test_interrupts.py",
    "integration/test_process_faults.py",
    "ros/test_pipeline_faults.py",
)


def defined_in(path: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))


def test_every_test_that_the_table_names_exists():
    existing = set().union(*(defined_in(path) for path in (REPOSITORY / "tests").rglob("test_*.py")))
    named = set(re.findall(r"`(test_\w+?)(?:\[\w+\])?`", TABLE))
    assert len(named) > 20 and named <= existing, named - existing
    cameras = (REPOSITORY / "tests" / "integration" / "test_faults.py").read_text()
    for parameter in re.findall(r"`(?:\.\.\.|test_\w+)\[(\w+)\]`", TABLE):
        assert f'"{parameter}"' in cameras


def test_every_fault_test_is_in_the_table():
    named = set(re.findall(r"test_\w+", TABLE))
    for file in FAULT_TESTS:
        for name in defined_in(REPOSITORY / "tests" / file):
            assert name in named, f"{name} of {file}"
