"""Whatever a JSON file of a working copy holds, reading it ends in a refusal or in a right answer, soon."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import SHARD
from support.exporting import exported_copy

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import plan_info
from glmtrt_helpers.engines.builder import build_engine
from glmtrt_helpers.engines.profiles import Range, chat_profiles, fit_to_record
from glmtrt_helpers.inputs import recording

TEXTS = st.text(max_size=8) | st.sampled_from(["..", "/etc/passwd", SHARD, "config.json", "fp16", "\0", "F16", "input"])
NUMBERS = st.integers() | st.sampled_from([0, 1, 2, -1, 2**31, 2**63, 10**30]) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
EDITS = st.lists(st.tuples(st.lists(st.integers(0, 400), min_size=1, max_size=6), VALUES), min_size=1, max_size=3)


def edited(content: Any, path: list[int], value: Any) -> Any:
    """The content with the element at a path replaced, removed (None, every other time) or added."""
    if not isinstance(content, dict | list) or not content:
        return value
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = keys[path[0] % len(keys)]
    if len(path) == 1 or not isinstance(content[key], dict | list):
        if value is None and path[0] % 2:
            del content[key]
        else:
            content[key] = value
    else:
        content[key] = edited(content[key], path[1:], value)
    return content


def places(opened: Checkpoint) -> dict[str, tuple[object, ...]]:
    """Where every weight lies within the data of its shard, which begins after a header of any length."""
    starts = {file: min(t.offset or 0 for t in opened.tensors.values() if t.file == file) for file in
              {tensor.file for tensor in opened.tensors.values()}}  # fmt: skip
    return {n: (t.file.name, (t.offset or 0) - starts[t.file], t.nbytes, t.shape) for n, t in opened.tensors.items()}


def check_opened(directory: Path) -> None:
    """What opens has the sizes and the places of the original, of which nothing else fits the shards."""
    opened, original = open_checkpoint(directory), open_checkpoint(directory.parent / "original")
    assert (opened.num_layers, opened.hidden_size, opened.vocab_size) == (2, 64, original.vocab_size)
    assert places(opened).items() <= places(original).items()
    tokenizer = load_tokenizer(opened)
    assert int(opened.config["eos_token_id"]) == tokenizer.eop_id and opened.max_length >= 4


def check_plan(directory: Path) -> None:
    info = plan_info.read_info(directory / "model.fp16.plan")
    for index in range(len(info.profiles)):
        plan_info.tensor_rows(info.tensors, index)
    plan_info.open_plan(open_checkpoint(directory), directory / "model.fp16.plan")


def check_inputs(directory: Path) -> None:
    calls = recording.load_record(open_checkpoint(directory))
    if calls:
        recording.dynamic_axes(calls)
    fit_to_record(open_checkpoint(directory), calls)


@dataclass(frozen=True)
class Target:
    """A file and what reads it. shard: its JSON is the header of one."""

    file: str
    check: Callable[[Path], None]
    shard: bool = False


TARGETS = {
    "config": Target("config.json", check_opened),
    "index": Target("model.safetensors.index.json", check_opened),
    "header": Target(SHARD, check_opened, shard=True),
    "plan": Target("model.fp16.plan.json", check_plan),
    "inputs": Target("inputs.json", check_inputs),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working copy with everything that the steps leave, and `original` beside it."""
    checkpoint = exported_copy(tmp_path_factory.mktemp("fuzzed"))
    build_engine(checkpoint, "fp16", chat_profiles(checkpoint, prompt=Range(1, 2, 8), past=Range(1, 2, 8)))
    mask = [[[[0, 1], [0, 0]]]]
    prefill = recording.Call(
        "prefill", {"input_ids": [1, 4], "past_key_values.0.key": [0, 1, 4, 16]}, {}, [[[0]]], mask
    )
    decode = recording.Call("decode", {"input_ids": [1, 1], "past_key_values.0.key": [4, 1, 4, 16]}, {})
    recording.save_record(checkpoint, [prefill, decode])
    shutil.copytree(checkpoint.directory, checkpoint.directory.parent / "original")
    return checkpoint.directory


def try_bytes(directory: Path, target: Target, raw: bytes) -> None:
    file = directory / target.file
    file.write_bytes(raw)
    try:
        target.check(directory)
    except WorkbookError as error:
        assert len(str(error)) < 1500, error
    finally:
        shutil.copyfile(directory.parent / "original" / target.file, file)


@pytest.mark.parametrize("name", TARGETS)
def test_any_values_in_its_places(directory: Path, name: str) -> None:
    target = TARGETS[name]
    raw = (directory / target.file).read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0] if target.shard else len(raw)
    text = raw[8:start] if target.shard else raw

    @given(EDITS)
    def run(edits: list[tuple[list[int], Any]]) -> None:
        content = json.loads(text)
        for path, value in edits:
            content = edited(content, path, value)
        new = json.dumps(content).encode()
        try_bytes(directory, target, struct.pack("<Q", len(new)) + new + raw[start:] if target.shard else new)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_in_its_place(directory: Path, name: str) -> None:
    target = TARGETS[name]
    raw = (directory / target.file).read_bytes()

    @given(st.integers(0, min(len(raw), 4096)), st.binary(max_size=12), st.integers(0, 12), st.booleans())
    def run(at: int, new: bytes, dropped: int, alone: bool) -> None:
        try_bytes(directory, target, new if alone else raw[:at] + new + raw[at + dropped :])

    run()
