"""The choice of a TensorRT package: by what is installed, what the GPU allows, and an explicit choice."""

import os
import re

import pytest

from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.tensorrt_package import Gpu

HOPPER = Gpu("NVIDIA H200", (9, 0), 150 * 10**9)
ADA = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 25 * 10**9)
PASCAL = Gpu("NVIDIA GeForce GTX 1080", (6, 1), 8 * 10**9)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, filled by the test; a module is represented by its name."""
    releases: dict[str, str] = {}
    monkeypatch.setattr(tensorrt_package, "version", releases.get)
    monkeypatch.setattr(tensorrt_package, "_load", lambda name: tensorrt_package.MODULES[name])
    return releases


@pytest.mark.parametrize(
    ("releases", "cards", "explicit", "building", "module"),
    [
        ({"tensorrt-rtx": "1.6.1.120"}, [], None, True, "tensorrt_rtx"),
        ({"tensorrt-rtx": "1.6.1.120"}, [HOPPER], None, False, "tensorrt_rtx"),
        ({"tensorrt-rtx": "1.6.1.120", "tensorrt": "10.14.1"}, [ADA], None, False, "tensorrt_rtx"),
        ({"tensorrt-rtx": "1.6.1.120", "tensorrt": "10.14.1"}, [HOPPER], None, False, "tensorrt"),
        ({"tensorrt-rtx": "1.7.1.116", "tensorrt": "11.0.0"}, [HOPPER], None, False, "tensorrt"),
        ({"tensorrt-rtx": "1.6.1.120", "tensorrt": "10.14.1"}, [ADA], "tensorrt", False, "tensorrt"),
        ({"tensorrt-rtx": "1.7.1.116"}, [HOPPER], None, True, "tensorrt_rtx"),  # it builds for other cards
        ({"tensorrt-rtx": "1.6.1.120"}, [PASCAL], None, True, "tensorrt_rtx"),
    ],
)
def test_choice(
    installed: dict[str, str],
    releases: dict[str, str],
    cards: list[Gpu],
    explicit: str | None,
    building: bool,
    module: str,
) -> None:
    installed |= releases
    package = tensorrt_package.choose(explicit, cards, building=building)
    assert package.module == module and package.version == releases[package.name]
    assert package.name in package.reason and package.version in package.reason


@pytest.mark.parametrize(
    ("releases", "cards", "explicit", "says"),
    [
        ({}, [], None, "tensorrt-rtx is not installed; tensorrt is not installed"),
        ({"tensorrt-rtx": "1.7.1.116"}, [HOPPER], None, "refuses Hopper since 1.7: install tensorrt-rtx 1.6.1.120"),
        ({"tensorrt-rtx": "1.6.1.120"}, [PASCAL], None, "capability 6.1 is not supported, according to NVIDIA)"),
        ({"tensorrt": "10.14.1"}, [], None, "needs a GPU, even to build"),
        ({"tensorrt": "10.14.1"}, [PASCAL], None, "compute capability 6.1 is not supported; "),
        ({"tensorrt-rtx": "1.6.1.120"}, [ADA], "tensorrt", "tensorrt is not installed"),
        ({"tensorrt-rtx": "1.6.1.120"}, [ADA], "tensorrt-llm", "'tensorrt-llm' is no TensorRT package"),
    ],
)
def test_refusals_say_why(
    installed: dict[str, str], releases: dict[str, str], cards: list[Gpu], explicit: str | None, says: str
) -> None:
    installed |= releases
    with pytest.raises(WorkbookError, match=re.escape(says)):
        tensorrt_package.choose(explicit, cards)


def test_what_is_installed_here_builds() -> None:
    package = tensorrt_package.choose(building=True)
    assert package.module.__version__ == package.version
    assert package.module.Builder(package.module.Logger())


def test_tf32_is_settled_before_the_first_use_and_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tensorrt_package.TF32_VARIABLE, "1")
    monkeypatch.setattr(tensorrt_package, "_loaded", set())
    tensorrt_package.settle_tf32(True)
    assert os.environ[tensorrt_package.TF32_VARIABLE] == "1"
    tensorrt_package.settle_tf32(False)
    assert os.environ[tensorrt_package.TF32_VARIABLE] == "0"
    tensorrt_package._loaded.add("tensorrt-rtx")
    tensorrt_package.settle_tf32(False)
    with pytest.raises(WorkbookError, match=r"are exact, this engine needs them rounded to TF32.*use another process"):
        tensorrt_package.settle_tf32(True)
    monkeypatch.delenv(tensorrt_package.TF32_VARIABLE)
    tensorrt_package.settle_tf32(True)
    with pytest.raises(WorkbookError, match=r"are rounded to TF32, this engine needs them exact"):
        tensorrt_package.settle_tf32(False)
