"""Fixtures: small random checkpoints with the stand-in's remote code, and the shipped checkpoint's working copy."""

import fcntl
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import ROOT, TINY, make_random
from support.command_line import InProcess

from glmtrt_helpers.checkpoints import code_hash
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.working_copy import make_working_copy
from glmtrt_helpers.cli.boundary import main
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.export import exporting
from glmtrt_helpers.patches import patching

torch.set_num_threads(1)  # models this small run fastest on one thread


@pytest.fixture(scope="session")
def _random_master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random(tmp_path_factory.mktemp("master") / "chatglm_random")


@pytest.fixture
def tiny_random(_random_master: Path, tmp_path: Path) -> Path:
    """A private, unpatched random checkpoint: 2 layers, hidden 64, 4 heads, 1024 positions, 2 shards."""
    return Path(shutil.copytree(_random_master, tmp_path / "chatglm_random"))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working copy of the shipped, trained checkpoint, shared by tests that only read it. Unpatched."""
    return make_working_copy(TINY, tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def _nothing_announced_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remote code is announced once in a process: without this, a test would depend on which tests ran before it."""
    monkeypatch.setattr(code_hash, "_announced", set())


@pytest.fixture(autouse=True)
def _no_gpu_unless_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is not marked `gpu` sees none, nor do the processes that it starts, so it runs alike everywhere."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(tensorrt_package, "gpus", list)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def exported_standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another working copy of it, patched and exported in fp16, shared by tests that only read it."""
    directory = make_working_copy(TINY, tmp_path_factory.mktemp("exported"))
    patching.patch_checkpoint(directory)
    exporting.export_model(open_checkpoint(directory), "fp16")
    return directory


@pytest.fixture
def glmtrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    """The command line in this process: exit code, and standard error without progress."""

    def run(*arguments: object) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["glmtrt", *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which an error replaces: the process ends
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        lines = capsys.readouterr().err.splitlines()
        return int(ended.value.code or 0), [line for line in lines if not line.endswith((" ...", "is downloaded."))]

    return run


@pytest.fixture(autouse=True)
def _one_at_a_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """What works in models/run, notebooks and the browser, waits for whoever does so, in whatever process."""
    if not any(map(request.node.get_closest_marker, ("notebook", "browser"))):
        yield
        return
    with (ROOT / "models" / ".in_use").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none; notebooks come first, since they take longest, and the
    browser last, when they are done.
    """
    items.sort(key=lambda item: (not item.get_closest_marker("notebook"), bool(item.get_closest_marker("browser"))))
    if not tensorrt_package.gpus():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and its driver"))
