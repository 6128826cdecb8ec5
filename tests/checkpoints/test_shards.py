"""Shard indexes and headers, intact and damaged, and `.bin` shards made safetensors."""

import json
import os
import pickle
import re
import struct
from pathlib import Path

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


def test_refuses_header_whose_shape_and_bytes_disagree(tiny_random: Path) -> None:
    shard = tiny_random / SHARD
    raw = shard.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    header[first]["shape"][0] += 1
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    assert "damaged header" in refusal(tiny_random)


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
    assert "outside its folder" in refusal(tiny_random)
    index.write_text("{")
    assert "not a shard index" in refusal(tiny_random)


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
    original = shards._stream_shard

    def stop_after_one(*args: object) -> None:
        if streamed:
            raise KeyboardInterrupt
        streamed.append(str(args[3]))
        original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "_stream_shard", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        shards.to_safetensors(tiny_random)
    assert not open_checkpoint(tiny_random).is_safetensors  # no index, so the .bin shards still count
    again: list[str] = []
    monkeypatch.setattr(shards, "_stream_shard", lambda *args: (again.append(str(args[3])), original(*args)))
    shards.to_safetensors(tiny_random)
    assert len(again) == 1 and again != streamed
    assert open_checkpoint(tiny_random).is_safetensors
