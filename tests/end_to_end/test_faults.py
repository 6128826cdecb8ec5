"""Faults from outside: killed in the middle of a write, a full disk, damaged shards, two runs at once, merged weights.

In every case what was there stays or is replaced whole, the reason is one sentence, and a rerun works. A killed or
failing export and build are also in tests/export/test_exporting.py and tests/engines/test_builder.py.
"""

import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import SHARD, make_random, refusal, to_bin
from support.command_line import InProcess

from glmtrt_helpers.checkpoints import loading, shards
from glmtrt_helpers.checkpoints.checkpoint import BACKUP_NAME, open_checkpoint
from glmtrt_helpers.checkpoints.code_hash import CODE_NAME
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.checkpoints.working_copy import MARKER, make_working_copy
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.graphs import verification
from glmtrt_helpers.inputs import positions_and_mask, recording
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.patches import patching
from glmtrt_helpers.sessions.onnxruntime import OrtSession
from glmtrt_helpers.sessions.pytorch import TorchSession

SECOND, BIN = SHARD.replace("00001", "00002", 1), "pytorch_model-00002-of-00002.bin"
PROMPT = "the 你好"

# Ends its own process at its n-th rename, with half of the new bytes on the disk.
DIE = """
import os, signal, sys
from pathlib import Path
directory, left, rename = Path(sys.argv[1]), int(sys.argv[2]), os.replace
def die(old, new):
    global left
    left -= 1
    if left:
        return rename(old, new)
    os.truncate(old, os.stat(old).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = die
"""
RECORD_TWICE = """
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.inputs import recording
opened = open_checkpoint(directory)
recording.save_record(opened, recording.load_record(opened) * 2)
"""
# Waits before each rename until another process is about to make the same one.
MEET = """
import os, sys, time
from pathlib import Path
from glmtrt_helpers.cli.boundary import main
meeting, rename = Path(sys.argv.pop(1)), os.replace
def meet(old, new):
    (meeting / f"{Path(new).name}.{os.getpid()}").touch()
    deadline = time.monotonic() + 30
    while len(list(meeting.glob(f"{Path(new).name}.*"))) < 2:
        if time.monotonic() > deadline:
            sys.exit("the other process did not come")
        time.sleep(0.01)
    rename(old, new)
os.replace = meet
main()
"""


def contents(root: Path) -> dict[str, bytes]:
    """Every file below root, temporary ones left out."""
    files = (file for file in root.rglob("*") if file.is_file() and file.suffix != ".tmp")
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def temporaries(root: Path) -> list[Path]:
    return list(root.rglob(".*.tmp"))


def assert_whole(found: dict[str, bytes], before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """Every file is as it was or as the run that succeeded left it, and none has gone."""
    assert before.keys() <= found.keys() <= after.keys()
    assert [name for name, data in found.items() if data not in (before.get(name), after[name])] == []


def kill(statement: str, directory: Path, write: int) -> None:
    """Run a statement on `directory` in a process that is killed in the middle of its n-th write."""
    command = [sys.executable, "-c", DIE + statement, str(directory), str(write)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(temporaries(directory.parent)) == 1


def weights(directory: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(directory)
    return loading.read_tensors(opened, list(opened.tensors), torch.float16)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("write", [1, 2, 3])
def test_killed_while_streaming_the_whole_shards_are_kept(tiny_random: Path, write: int) -> None:
    expected = weights(tiny_random)
    to_bin(tiny_random)
    before = contents(tiny_random)
    kill("from glmtrt_helpers.checkpoints import shards; shards.to_safetensors(directory)", tiny_random, write)
    between = contents(tiny_random)
    done = {name: (tiny_random / name).stat() for name in [SHARD, SECOND][: write - 1]}
    assert between.keys() - before.keys() == done.keys()
    assert not open_checkpoint(tiny_random).is_safetensors and equal(weights(tiny_random), expected)
    shards.to_safetensors(tiny_random)
    for name, stat in done.items():
        now = (tiny_random / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), "a whole shard was written again"
    assert_whole(between, before, contents(tiny_random))
    assert open_checkpoint(tiny_random).is_safetensors and equal(weights(tiny_random), expected)
    assert not temporaries(tiny_random)


@pytest.mark.parametrize("write", [1, 2])
def test_killed_while_patching_the_source_stands(tiny_random: Path, write: int) -> None:
    before = contents(tiny_random)
    kill("from glmtrt_helpers.patches import patching; patching.patch_checkpoint(directory)", tiny_random, write)
    between = contents(tiny_random)
    backup = {BACKUP_NAME: before[CODE_NAME]} if write == 2 else {}
    assert between == before | backup
    patching.patch_checkpoint(tiny_random)
    assert {blocker.state for blocker in patching.check_checkpoint(tiny_random).values()} == {"patched"}
    assert not temporaries(tiny_random)
    patching.restore_checkpoint(tiny_random)
    assert contents(tiny_random) == before


@pytest.mark.parametrize(("write", "refresh"), [(1, False), (5, False), (2, True)])
def test_killed_while_copying_no_file_is_half(tiny_random: Path, write: int, refresh: bool) -> None:
    copy = tiny_random.parent / "run" / tiny_random.name
    if refresh:
        make_working_copy(tiny_random)
        merge_lora(tiny_random)
    source, before = contents(tiny_random), contents(copy)
    statement = "from glmtrt_helpers.checkpoints.working_copy import make_working_copy; make_working_copy(directory)"
    kill(statement, tiny_random, write)
    between = contents(copy)
    assert contents(tiny_random) == source and not temporaries(tiny_random)
    assert refresh or len(between) == write - 1
    make_working_copy(tiny_random)
    assert_whole(between, before, contents(copy))
    after = contents(copy)
    assert after.pop(MARKER) and after == contents(tiny_random) == source and not temporaries(copy)


def test_killed_while_recording_the_old_record_stands(tiny_random: Path) -> None:
    opened = open_checkpoint(tiny_random)
    call = recording.Call("prefill", {"input_ids": [1, 4]}, {"input_ids": "int64"})
    recording.save_record(opened, [call])
    before = contents(tiny_random)
    kill(RECORD_TWICE, tiny_random, 1)
    assert contents(tiny_random) == before and recording.load_record(opened) == [call]
    recording.save_record(opened, [call, call, call])
    assert recording.load_record(opened) == [call] * 3 and not temporaries(tiny_random)


@pytest.fixture
def one_layer(tmp_path: Path) -> Path:
    """Exported in half the time, and as `.bin` shards, patched."""
    directory = make_random(tmp_path / "chatglm_random", num_layers=1)
    to_bin(directory)
    patching.patch_checkpoint(directory)
    return directory


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(mount)]
    made = subprocess.run(command, capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"mounting a small disk needs root: {made.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def fill(disk: Path, room: int) -> None:
    """Fill a disk except for `room` pages of 4096 bytes."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - room * 4096))


def assert_refused(result: tuple[int, list[str]], file: Path) -> None:
    """Exit code 1 and one sentence: what could not be written, why, and what to do."""
    code, lines = result
    assert code == 1 and len(lines) == 1, lines
    assert lines[0].startswith("glmtrt: ") and f"{file} could not be written (No space left on device)" in lines[0]
    assert "free room in " in lines[0]


@pytest.mark.parametrize(
    ("command", "room", "fails"),
    [
        ("copy", 30, f"run/chatglm_random/{SHARD}"),
        ("patch", 2, f"chatglm_random/{BACKUP_NAME}"),
        ("patch", 7, f"chatglm_random/{CODE_NAME}"),
        ("inputs", 1, f"chatglm_random/{recording.RECORD_NAME}"),
    ],
)
def test_a_full_disk_is_one_sentence(
    disk: Path, tiny_random: Path, glmtrt: InProcess, command: str, room: int, fails: str
) -> None:
    directory = Path(shutil.copytree(tiny_random, disk / "chatglm_random"))
    before = contents(disk)
    fill(disk, room)
    assert_refused(glmtrt(command, directory), disk / fails)
    (disk / "ballast").unlink()
    between = contents(disk)
    assert not temporaries(disk)
    assert glmtrt(command, directory)[0] == 0, "with room, a rerun succeeds"
    assert_whole(between, before, contents(disk))
    assert contents(disk)[fails] not in (before.get(fails), b"") and not temporaries(disk)


@pytest.mark.slow
def test_a_disk_that_fills_while_streaming_and_then_while_exporting(
    disk: Path, one_layer: Path, glmtrt: InProcess
) -> None:
    directory = Path(shutil.copytree(one_layer, disk / "chatglm_random"))
    (directory / "model.fp16.onnx").write_bytes(b"an older export")
    before = contents(directory)
    fill(disk, 44)  # for one shard and half of the next
    assert_refused(glmtrt("export", directory), directory / SECOND)
    streamed = contents(directory)
    assert streamed.keys() - before.keys() == {SHARD} and not temporaries(disk)
    assert not open_checkpoint(directory).is_safetensors
    fill(disk, 33)  # for the other shard, the index, and some of the graph
    assert_refused(glmtrt("export", directory), directory / "model.fp16.onnx")
    assert contents(directory)["model.fp16.onnx"] == b"an older export" and not temporaries(disk)
    (disk / "ballast").unlink()
    assert glmtrt("export", directory)[0] == 0
    assert_whole(streamed, before, contents(directory))
    assert equal(weights(directory), weights(one_layer)) and answer(directory).size


def test_a_flipped_byte_in_a_shards_header_is_refused(tiny_random: Path) -> None:
    """Each byte in turn. What is opened all the same (a letter of the metadata) describes the same weights."""
    before, shard = open_checkpoint(tiny_random), tiny_random / SECOND
    raw = shard.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    flips = [(at, 1 << bit) for at in range(8) for bit in range(8)] + [(at, 1) for at in range(8, 8 + length)]
    flips += [(raw.index(b'"F16"') + 1, ord("F") ^ ord(letter)) for letter in "IU"]  # as wide, and no weights
    refused = 0
    for at, mask in flips:
        with shard.open("r+b") as stream:
            stream.seek(at)
            stream.write(bytes([raw[at] ^ mask]))
        try:
            assert open_checkpoint(tiny_random).tensors == before.tensors, (at, raw[at - 40 : at + 9])
            with safe_open(shard, framework="pt") as opened:
                assert opened.keys()
        except WorkbookError as error:
            message = str(error)
            assert str(shard) in message and "download" in message and "\n" not in message
            refused += 1
        with shard.open("r+b") as stream:
            stream.seek(at)
            stream.write(raw[at : at + 1])
    assert refused > len(flips) - 60
    assert open_checkpoint(tiny_random) == before


@pytest.mark.parametrize(
    ("name", "cut"),
    [(name, cut) for name in (SHARD, SECOND, BIN) for cut in ("gone", "empty", "start", "half", "end")]
    + [(SECOND, "longer")],
)
def test_a_cut_or_missing_shard_is_refused_until_it_is_back(tiny_random: Path, name: str, cut: str) -> None:
    expected = weights(tiny_random)
    if name == BIN:
        to_bin(tiny_random)
    shard = tiny_random / name
    raw = shard.read_bytes()
    parts = {"empty": b"", "start": raw[:100], "half": raw[: len(raw) // 2], "end": raw[:-1], "longer": raw + b"\0"}
    shard.unlink() if cut == "gone" else shard.write_bytes(parts[cut])
    message = refusal(tiny_random)
    assert str(shard) in message and "download" in message
    if name == BIN:
        with pytest.raises(WorkbookError, match=name):
            shards.to_safetensors(tiny_random)
        assert not list(tiny_random.glob("*.safetensors*"))
    shard.write_bytes(raw)
    assert equal(weights(tiny_random), expected)


@pytest.mark.slow
def test_two_runs_that_stream_and_export_at_once(one_layer: Path, tmp_path: Path) -> None:
    """They meet when every file is written and not yet renamed; both succeed."""
    expected = weights(one_layer)
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    command = [sys.executable, "-c", MEET, str(meeting), "export", str(one_layer)]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=180)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert len(list(meeting.iterdir())) == 2 * 4, "two shards, an index and a graph, each by both"
    assert not temporaries(one_layer) and equal(weights(one_layer), expected)
    onnx.checker.check_model(onnx.load(one_layer / "model.fp16.onnx"))
    model = loading.load_model(open_checkpoint(one_layer), torch.float16)
    reference = TorchSession(model).step(call(one_layer))
    assert np.abs(answer(one_layer) - reference).max() < 0.02


def call(directory: Path) -> positions_and_mask.Arrays:
    opened = open_checkpoint(directory)
    return positions_and_mask.prefill(opened, [chat_prompt(load_tokenizer(opened), PROMPT)])


def answer(directory: Path) -> np.ndarray:
    """Scores of the next token, by ONNX Runtime."""
    return OrtSession(directory / "model.fp16.onnx").step(call(directory))


def merge_lora(directory: Path, rank: int = 4) -> None:
    """Add a low-rank matrix to every query_key_value, as merging a LoRA adapter does, and write fp16."""
    generator = torch.Generator().manual_seed(1)
    for shard in directory.glob("*.safetensors"):
        state = load_file(shard)
        for name in [name for name in state if name.endswith("query_key_value.weight")]:
            rows, columns = state[name].shape
            up, down = (torch.randn(shape, generator=generator) for shape in ((rows, rank), (rank, columns)))
            state[name] = (state[name].float() + 0.2 * up @ down).half()
        save_file(state, shard, metadata={"format": "pt"})


@pytest.mark.slow
def test_a_merged_lora_is_a_checkpoint_like_any_other(tiny_random: Path, tmp_path: Path, glmtrt: InProcess) -> None:
    base = Path(shutil.copytree(tiny_random, tmp_path / "chatglm_base"))
    merge_lora(tiny_random)
    changed = [name for name, tensor in weights(base).items() if not torch.equal(tensor, weights(tiny_random)[name])]
    assert len(changed) == 2 and all(name.endswith("query_key_value.weight") for name in changed)
    patching.patch_checkpoint(tiny_random)
    assert glmtrt("export", tiny_random) == (0, [])
    assert verification.verify(open_checkpoint(tiny_random)).ok
    shutil.copyfile(tiny_random / "model.fp16.onnx", base / "model.fp16.onnx")
    shutil.copyfile(tiny_random / CODE_NAME, base / CODE_NAME)
    with pytest.raises(WorkbookError, match=r"safetensors is not the file that model.fp16.onnx was made from"):
        answer(base)
    assert glmtrt("export", base) == (0, [])
    assert np.abs(answer(tiny_random) - answer(base)).max() > 0.1


def test_weights_merged_after_a_conversion_reach_the_copy(tiny_random: Path, tmp_path: Path) -> None:
    """The working copy's conversion of the older `.bin` shards is not taken for one of the newer shards."""
    merged = Path(shutil.copytree(tiny_random, tmp_path / "merged"))
    merge_lora(merged)
    expected = weights(merged)
    to_bin(tiny_random)
    to_bin(merged)
    copy = make_working_copy(tiny_random)
    shards.to_safetensors(copy)
    shutil.copytree(merged, tiny_random, dirs_exist_ok=True)
    make_working_copy(tiny_random)
    assert equal(weights(copy), expected)
    shards.to_safetensors(copy)
    assert open_checkpoint(copy).is_safetensors and equal(weights(copy), expected)
