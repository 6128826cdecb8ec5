"""Shard indexes and headers, intact and damaged, and `.bin` shards made safetensors."""

import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import SHARD, refusal, to_bin

from glmtrt_helpers.checkpoints import shards
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint


def test_refuses_absent_weights(tiny_random: Path) -> None:
    for file in tiny_random.glob("model*"):
        if file.suffix != ".py":
            file.unlink()
    assert "holds no weights" in refusal(tiny_random)


@pytest.mark.parametrize("keep", [4, 100, -1000])
def test_refuses_truncated_shard(tiny_random: Path, keep: int) -> None:
    shard = tiny_random / SHARD
    shard.write_bytes(shard.read_bytes()[:keep])
    message = refusal(tiny_random)
    assert SHARD in message and "truncated" in message


def test_refuses_damaged_header(tiny_random: Path) -> None:
    shard = tiny_random / SHARD
    raw = bytearray(shard.read_bytes())
    raw[8] ^= 0xFF  # the opening brace of the JSON header
    shard.write_bytes(raw)
    assert SHARD in refusal(tiny_random)


def test_header_of_an_empty_shard(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({}, file)
    assert shards.read_header(file) == {}


def test_refuses_index_that_leaves_its_folder_or_names_an_absent_tensor(tiny_random: Path) -> None:
    index = tiny_random / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    wrong_shard = dict(content["weight_map"], **{"lm_head.weight": SHARD})
    index.write_text(json.dumps({"weight_map": wrong_shard}))
    assert "does not hold 'lm_head.weight'" in refusal(tiny_random)
    index.write_text(json.dumps({"weight_map": dict(wrong_shard, **{"lm_head.weight": "../x.safetensors"})}))
    assert "no .safetensors file of its folder" in refusal(tiny_random)
    for shard in ("/etc/passwd", "..", "", "a\0b.safetensors", "a" * 300 + ".safetensors", "config.json", "x.bin"):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
        assert "names " in refusal(tiny_random)
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"):
        index.write_text(text)
        assert "it is to be a shard index" in refusal(tiny_random)


def rewrite_header(shard: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a shard, and leave its data."""
    raw = shard.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header[min((n for n in header if n != "__metadata__"), key=lambda name: header[name]["data_offsets"])]


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a larger shape": lambda h: first(h)["shape"].__setitem__(0, 10**6),
    "a negative size": lambda h: first(h)["shape"].__setitem__(0, -1),
    "a size that is no number": lambda h: first(h)["shape"].__setitem__(0, "2"),
    "a float": lambda h: first(h)["data_offsets"].__setitem__(1, 1.5),
    "an unknown dtype": lambda h: first(h).__setitem__("dtype", "Q4"),
    "no dtype": lambda h: first(h).pop("dtype"),
    "one offset": lambda h: first(h)["data_offsets"].pop(),
    "an overlap": lambda h: [e.__setitem__("data_offsets", [0, e["data_offsets"][1] - e["data_offsets"][0]])
                             for n, e in h.items() if n != "__metadata__"] and None,
    "moved by two bytes": lambda h: [e.__setitem__("data_offsets", [o + 2 for o in e["data_offsets"]])
                                     for n, e in h.items() if n != "__metadata__"] and None,
    "a tensor less": lambda h: h.pop(next(n for n in h if n != "__metadata__")) and None,
    "a list": lambda h: [h],
    "a tensor that is null": lambda h: h.__setitem__("x", None),
    "nine dimensions": lambda h: first(h).__setitem__("shape", [1] * 9),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_refuses_a_header_that_is_not_that_of_its_data(tiny_random: Path, change: str) -> None:
    rewrite_header(tiny_random / SHARD, CHANGES[change])
    message = refusal(tiny_random)
    assert SHARD in message and ("damaged header" in message or "header calls for" in message), message


def test_refuses_a_header_of_any_length(tiny_random: Path) -> None:
    shard = tiny_random / SHARD
    raw = shard.read_bytes()
    for length in (0, 1, 2**40, 2**63, 2**64 - 1):
        shard.write_bytes(struct.pack("<Q", length) + raw[8:])
        assert SHARD in refusal(tiny_random)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", SHARD])
def test_pipes_devices_and_pointers_are_called_by_their_names(tiny_random: Path, name: str) -> None:
    file = tiny_random / name
    file.unlink()
    os.mkfifo(file)
    assert "a pipe" in refusal(tiny_random)
    file.unlink()
    file.symlink_to("/dev/zero")
    assert "a device" in refusal(tiny_random)
    file.unlink()
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(tiny_random)


def test_an_old_and_a_nested_bin_are_called_by_their_names(tiny_random: Path) -> None:
    to_bin(tiny_random)
    shard = tiny_random / "pytorch_model-00001-of-00002.bin"
    state = torch.load(shard, weights_only=True)
    torch.save(state, shard, _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal(tiny_random)
    torch.save({"module": state, "step": 3}, shard)
    assert "they may be under 'module'" in refusal(tiny_random)
    for held in ([1], 3, {"a": 1}, {}):
        torch.save(held, shard)
        assert "holds no weights by name" in refusal(tiny_random)


class Bomb:
    def __init__(self, call: object):
        self.call = call

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return self.call, ("raise SystemExit('pickled code ran')",)


@pytest.mark.parametrize(
    ("held", "names"),
    [
        (Bomb(exec), "(exec)"),
        (Bomb(os.system), "(posix.system)"),
        (Path("x"), "(pathlib.PosixPath)"),  # harmless, but not weights either
    ],
)
def test_a_refused_pickle_comes_without_advice_to_run_it(tiny_random: Path, held: object, names: str) -> None:
    to_bin(tiny_random)
    bomb = tiny_random / "pytorch_model-00001-of-00002.bin"
    torch.save({"lm_head.weight": held}, bomb)
    for protocol in (None, 2, 4):
        if protocol:
            bomb.write_bytes(pickle.dumps({"lm_head.weight": held}, protocol))
        message = refusal(tiny_random)
        assert bomb.name in message
        assert not {"weights_only", "safe_globals"} & set(re.findall(r"\w+", message)), message
        assert "likely succeed" not in message and (protocol == 4 or names in message), message


def test_truncated_bin_is_refused(tiny_random: Path) -> None:
    to_bin(tiny_random)
    shard = tiny_random / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-5000])
    assert shard.name in refusal(tiny_random)


def test_streaming_goes_on_where_it_stopped(tiny_random: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_bin(tiny_random)
    streamed: list[str] = []
    original = shards.write_shard

    def stop_after_one(*args: object) -> None:
        if streamed:
            raise KeyboardInterrupt
        streamed.append(str(args[0]))
        original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "write_shard", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        shards.to_safetensors(tiny_random)
    assert not open_checkpoint(tiny_random).is_safetensors  # no index, so the .bin shards still count
    again: list[str] = []
    monkeypatch.setattr(shards, "write_shard", lambda *args: (again.append(str(args[0])), original(*args)))
    shards.to_safetensors(tiny_random)
    assert len(again) == 1 and again != streamed
    assert open_checkpoint(tiny_random).is_safetensors
