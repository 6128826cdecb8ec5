"""Predicted memory against figures of the real size and measurements, and builds refused for lack of room."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.checkpoints import make_random

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import memory_prediction
from glmtrt_helpers.engines.builder import build_engine
from glmtrt_helpers.engines.memory_prediction import check_room, predict_memory
from glmtrt_helpers.engines.profiles import Range, chat_profiles, real_size
from glmtrt_helpers.engines.session import TensorRTSession
from glmtrt_helpers.export import exporting
from glmtrt_helpers.patches import patching


@pytest.fixture
def real(_random_master: Path) -> Checkpoint:
    return real_size(open_checkpoint(_random_master))


def test_predicted_memory_of_the_real_size(real: Checkpoint) -> None:
    """The parts that follow from the model alone, against figures derived from the real checkpoint's shapes."""
    whole = predict_memory(real, chat_profiles(real))
    # Two buffers of 2047 tokens, 28 layers, key and value of 4096 fp16 numbers: 458,752 bytes per token and buffer.
    assert whole.cache == 2 * 2048 * 458_752
    short = predict_memory(real, chat_profiles(real, past=Range(1, 64, 511), prompt=Range(1, 64, 256)))
    assert short.cache == whole.cache * 512 // 2048 and short.activations < whole.activations / 4
    # Measured on an H200 with TensorRT-RTX 1.6.1.120 for one row, prompts of up to this many tokens, past up to 2047.
    for prompt, past, measured in ((2047, 2047, 170_786_304), (1024, 2047, 86_458_368), (512, 2047, 46_399_488)):
        profiles = chat_profiles(real, prompt=Range(1, 128, prompt), past=Range(1, 512, past))
        assert predict_memory(real, profiles).activations == pytest.approx(measured, rel=0.05)


def test_a_build_without_enough_memory_or_disk_is_refused(
    real: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_prediction, "free_memory", lambda: 20 * 10**9)
    with pytest.raises(WorkbookError, match=r"needs 26\.9 GB of memory, and 20\.0 are.*`--dtype fp16` needs 13\.8"):
        check_room(real, "fp32", tmp_path / "model.fp32.plan")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=13 * 10**9))
    check_room(real, "fp16", tmp_path / "model.fp16.plan")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=12 * 10**9))
    with pytest.raises(WorkbookError, match=r"will take 12\.\d GB, and its disk has 12\.0 free: make room"):
        check_room(real, "fp16", tmp_path / "model.fp16.plan")
    monkeypatch.setattr(memory_prediction, "free_memory", lambda: 13 * 10**9)
    with pytest.raises(WorkbookError, match=r"are free, swap included: close other programs, or add swap\.$"):
        check_room(real, "fp16", tmp_path / "model.fp16.plan")


WIDE = {"hidden_size": 4096, "num_attention_heads": 32, "inner_hidden_size": 16384, "max_sequence_length": 2048}
MAXIMA = ((1, 2047, 2047), (1, 1024, 2047), (1, 512, 1023), (4, 512, 2047), (8, 256, 1023))


@pytest.mark.gpu
def test_predicted_memory_is_what_a_session_takes(tmp_path: Path) -> None:
    """Two layers of the real width: every part within 5%, or 32 MiB, which drivers round up to."""
    directory = make_random(tmp_path / "wide", num_layers=2, **WIDE)
    patching.patch_checkpoint(directory)
    wide_checkpoint = open_checkpoint(directory)
    exporting.export_model(wide_checkpoint, "fp16")
    rows = []
    for batch, prompt, past in MAXIMA:
        ranges = Range(1, 1, batch), Range(1, 128, prompt), Range(1, 512, past)
        profiles = chat_profiles(wide_checkpoint, *ranges)
        build_engine(wide_checkpoint, "fp16", profiles)
        opened = TensorRTSession.open(wide_checkpoint)
        predicted, measured = predict_memory(wide_checkpoint, profiles), opened.measured
        opened.close()
        both = {"predicted": asdict(predicted), "measured": asdict(measured)}
        rows.append({"batch": batch, "prompt": prompt, "past": past, **both})
        for part, expected in both["predicted"].items():
            print(f"{batch, prompt, past} {part}: predicted {expected:,}, measured {both['measured'][part]:,}")
            assert both["measured"][part] == pytest.approx(expected, rel=0.05, abs=2**25), part
        assert measured.total == pytest.approx(predicted.total, rel=0.05)
    card, info = tensorrt_package.gpus()[0].name, opened.info
    about = f"two layers of the real width, fp16, {card}, {info.package} {info.version}"
    kept = Path(os.environ.get("GLMTRT_KEEP", tmp_path)) / "engine_memory.json"
    kept.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
