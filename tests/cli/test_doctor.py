"""`glmtrt doctor`: what follows from a machine's sizes and from a checkpoint's."""

import shutil
from collections import namedtuple
from types import SimpleNamespace

import psutil
import pytest
from support.checkpoints import TINY

from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.cli import doctor
from glmtrt_helpers.core.tensorrt_package import Gpu
from glmtrt_helpers.engines.profiles import real_size
from glmtrt_helpers.workbook.run_notebooks import notebooks

Memory = namedtuple("Memory", "total available")
GB = 10**9


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine of 10 GB of memory and 20 GB of free disk, without a GPU; to be changed by a test."""
    machine = SimpleNamespace(memory=10 * GB, disk=20 * GB, gpus=[])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(machine.memory, machine.memory))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=machine.disk))
    monkeypatch.setattr(doctor, "gpus", lambda: machine.gpus)
    return machine


def test_parts_that_need_more_than_there_is_say_what(machine: SimpleNamespace) -> None:
    real = {part: verdict for part, _, verdict in doctor.parts()}
    assert real["04 verify"] == "yes" and real["05 build"] == "no: needs 15 GB of memory"
    machine.memory, machine.disk = 32 * GB, 20 * GB
    real = {part: verdict for part, _, verdict in doctor.parts()}
    assert real["05 build"] == "no: needs 27 GB of disk"
    assert {small for _, small, _ in doctor.parts()} == {
        "yes",
        "no: needs a GPU",
        "no: needs a GPU of compute capability 8.0",
    }
    assert {part[:2] for part in real} == {path.name[:2] for path in notebooks()}
    machine.gpus = [Gpu("an older card", (7, 5), 24 * GB)]
    real = {part: verdict for part, _, verdict in doctor.parts()}
    assert (
        real["07 one kernel"] == "no: needs a GPU of compute capability 8.0" and real["05 and 06, an engine"] == "yes"
    )
    machine.gpus = [Gpu("a card", (8, 9), 15 * GB)]
    assert all(small == "yes" for _, small, _ in doctor.parts())
    real = {part: verdict for part, _, verdict in doctor.parts()}
    assert real["07 one kernel"] == "yes" and real["05 and 06, an engine"] == "no: needs a GPU of 16 GB"


def test_a_gpu_is_reported_with_its_capability(machine: SimpleNamespace) -> None:
    assert ("GPU", "none") in [row[:2] for row in doctor.report()]
    machine.gpus = [Gpu("a card", (8, 9), 24 * 2**30)]
    assert ("GPU", "a card, 24 GiB", "compute capability 8.9") in doctor.report()


def test_the_smallest_card_for_the_real_size(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """12.35 GB of weights and 0.94 GB of cache: too much for 12 GB, fits into 16."""
    machine.gpus = [Gpu("a small card", (8, 9), 8 * 2**30), Gpu("a large card", (9, 0), 80 * 2**30)]
    monkeypatch.setattr(doctor, "shares_vocabulary", lambda checkpoint: False)  # there are no shards to compare
    rows = doctor.model_report(real_size(open_checkpoint(TINY)), 1, 2048)
    sizes = {part: size for part, size, _ in rows}
    assert sizes["weights"] == "12.35 GB" and sizes["smallest card"] == "16 GB"
    notes = [note for part, _, note in rows if part == "this GPU"]
    assert notes == ["a small card is too small: lower --batch or --length", "a large card is large enough"]


def test_the_cache_of_the_shipped_checkpoint() -> None:
    """Per token two buffers, 4 layers, key and value of 128 fp16 numbers."""
    rows = doctor.model_report(open_checkpoint(TINY), 4, 512)
    note = next(note for part, _, note in rows if part == "cache")
    assert note == f"{2 * 4 * 2 * 128 * 2:,} bytes per token, past and present, 4 x 512 tokens"
