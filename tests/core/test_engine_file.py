# SPDX-License-Identifier: Apache-2.0
"""Engine files: valid for exactly one key, whole and unaltered, or not used at all."""

from __future__ import annotations

import dataclasses
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occflownet_core.errors import EngineError
from occflownet_core.runtime.engine_file import EngineKey, StaleEngineError, load_or_build, read_engine, write_engine

KEY = EngineKey("ab" * 32, "fp16", "11.4.0.106", "NVIDIA RTX 4000 (Ada/SFF)", "8.9")
PLAN = bytes(range(256)) * 4


def test_what_was_written_comes_back(tmp_path):
    path = tmp_path / "deep" / KEY.file_name
    write_engine(path, KEY, PLAN)
    assert read_engine(path, KEY) == PLAN
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing partial is left


def test_the_name_tells_the_key():
    assert KEY.file_name == "abababababababab-fp16-NVIDIA_RTX_4000_Ada_SFF_-sm8.9-trt11.4.0.106.engine"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("graph_sha256", "cd" * 32),
        ("precision", "fp32"),
        ("tensorrt", "11.5.0.1"),
        ("gpu", "NVIDIA Orin"),
        ("compute_capability", "8.7"),
    ],
)
def test_an_engine_of_another_key_says_in_what_it_differs(tmp_path, field, value):
    path = tmp_path / "an.engine"
    write_engine(path, dataclasses.replace(KEY, **{field: value}), PLAN)
    with pytest.raises(StaleEngineError, match=f"was built for {field} {value}, here it is "):
        read_engine(path, KEY)
    assert dataclasses.replace(KEY, **{field: value}).file_name != KEY.file_name


@settings(max_examples=60)
@given(st.data())
def test_whatever_is_done_to_a_file_it_is_whole_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("e") / "an.engine"
    write_engine(path, KEY, PLAN)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(StaleEngineError):
        read_engine(path, KEY)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"occflownet-engine 1\n", b"occflownet-engine 1\n[]\nplan", b"\x00" * 9999]
)
def test_files_of_another_kind(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(StaleEngineError):
        read_engine(tmp_path / "a", KEY)


def test_built_once_and_again_where_the_file_is_no_good(tmp_path, caplog):
    path, built = tmp_path / KEY.file_name, []

    def build() -> bytes:
        built.append(1)
        return PLAN

    assert load_or_build(path, KEY, build) == (PLAN, True)
    assert load_or_build(path, KEY, build) == (PLAN, False)
    assert caplog.text == ""
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert load_or_build(path, KEY, build) == (PLAN, True)
    assert "was altered or cut short (1023 of 1024 bytes); it is built anew" in caplog.text
    assert load_or_build(path, KEY, build, rebuild=True) == (PLAN, True)
    assert len(built) == 3 and read_engine(path, KEY) == PLAN


def test_an_engine_for_another_machine_is_named_when_one_is_built_here(tmp_path, caplog):
    other = dataclasses.replace(KEY, gpu="NVIDIA Orin")
    write_engine(tmp_path / other.file_name, other, PLAN)
    with caplog.at_level(logging.WARNING):
        load_or_build(tmp_path / KEY.file_name, KEY, lambda: PLAN)
    assert "was built for gpu NVIDIA Orin, here it is NVIDIA RTX 4000 (Ada/SFF); another one is built" in caplog.text


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail() -> bytes:
        raise EngineError("no")

    with pytest.raises(EngineError, match="no"):
        load_or_build(tmp_path / KEY.file_name, KEY, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"cannot be written .*name another folder with engine_cache"):
        write_engine(tmp_path / "file" / "an.engine", KEY, PLAN)
