"""The project itself: versions agree, tests mirror the modules, documents name what exists, the READMEs agree."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from support.checkpoints import ROOT, TINY

from glmtrt_helpers.workbook import run_notebooks

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGES = [page for folder in (ROOT, ROOT / "docs", ROOT / "benchmarks", ROOT / "models") for page in folder.glob("*.md")]
REQUIREMENT = re.compile(r"^([A-Za-z0-9_.-]+)(.*)$")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def padded(version: tuple[int, ...]) -> tuple[int, ...]:
    return (*version, 0, 0, 0, 0)[:4]


@pytest.mark.parametrize(
    "requirement", PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
)
def test_every_dependency_is_pinned_inside_its_range(requirement: str) -> None:
    name, spec = REQUIREMENT.match(requirement).groups()  # type: ignore[union-attr]
    pinned = padded(release(pins()[name]))
    lower, upper = re.fullmatch(r">=([\d.]+),<([\d.]+)", spec).groups()  # type: ignore[union-attr]
    assert padded(release(lower)) <= pinned < padded(release(upper))


def test_environment_yml_agrees() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, _, pip = environment["dependencies"]
    assert python == "python=3.12" and PROJECT["project"]["requires-python"] == ">=3.11,<3.14"
    # It names no version of its own: the pins come from constraints.txt, the packages from pyproject.toml.
    assert pip == {"pip": ["-c constraints.txt", "-e .[dev]"]}


def test_tests_mirror_the_modules() -> None:
    """tests/STEP/test_MODULE.py, or test_MODULE_TOPIC.py, is about glmtrt_helpers/STEP/MODULE.py."""
    for folder in (ROOT / "glmtrt_helpers").glob("*/"):
        modules = [path.stem for path in folder.glob("*.py")]
        tests = [path.stem.removeprefix("test_") for path in (ROOT / "tests" / folder.name).glob("test_*.py")]
        assert tests or not modules, f"{folder.name} has no tests"
        stray = [test for test in tests if not any(f"{test}_".startswith(f"{module}_") for module in modules)]
        assert not stray, f"tests/{folder.name} has tests of modules that do not exist"


@pytest.mark.parametrize("step", ["core", "export", "workbook"])
def test_make_test_runs_one_step(step: str) -> None:
    done = subprocess.run(["make", "-n", "test", f"STEP={step}"], cwd=ROOT, capture_output=True, text=True, check=True)
    (command,) = [line for line in done.stdout.splitlines() if "pytest" in line]
    named = re.findall(r"\btests/\S+", command)
    assert named[0] == f"tests/{step}" and named[1:] in ([], ["tests/end_to_end/test_notebooks.py"])
    assert ('-k "not test_notebooks or 03_"' in command) == (step == "export") and "ruff" not in done.stdout


def test_make_refuses_an_unknown_step() -> None:
    command = ["make", "-n", "test", "STEP=exports"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and 'There is no step "exports": choose one of core ' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_every_notebook_belongs_to_a_step() -> None:
    numbers = re.search(r"^NOTEBOOKS := (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1)  # type: ignore[union-attr]
    assert [word.split("-")[1] for word in numbers.split()] == [path.stem[:2] for path in run_notebooks.notebooks()]


def test_shipped_checkpoint_is_small_and_carries_the_template() -> None:
    files = [path for path in TINY.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    for template in (ROOT / "glmtrt_helpers/standin/template").glob("*.py"):
        assert (TINY / template.name).read_bytes() == template.read_bytes(), template.name
    assert len(list(TINY.glob("model-*-of-*.safetensors"))) >= 2
    names = {path.name for path in files}
    assert {"config.json", "tokenizer_config.json", "ice_text.model", "model.safetensors.index.json"} <= names


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_readme_opens_with_the_two_commands(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    first_block = re.search(r"```\w*\n(.*?)```", text, re.S).group(1)  # type: ignore[union-attr]
    assert "make workbook" in first_block and "make test" in first_block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_readmes_tree_has_every_folder(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in map(Path, tracked):
        for folder in file.parts[:-1][: 2 if file.parts[0] == "glmtrt_helpers" else 1]:
            assert re.search(rf"^ *{re.escape(folder)}/ ", text, re.M), folder


def test_files_that_the_pages_name_exist() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"`((?:glmtrt_helpers|tests)/[\w./]+)`", text))
    assert len(named) > 22 and not [path for path in sorted(named) if not (ROOT / path).exists()]


def test_make_knows_the_targets_the_pages_name() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for target in set(re.findall(r"`make ([a-z-]+)", text)):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == 0, target


def test_no_two_readmes_differ_in_figures() -> None:
    """A figure that stands in one README stands in the other."""
    figures = [
        set(re.findall(r"\d+(?:\.\d+)+", (ROOT / name).read_text(encoding="utf-8")))
        for name in ("README.md", "README.zh-CN.md")
    ]
    assert figures[0] == figures[1]


def test_paths_of_the_project_are_relative() -> None:
    for path in [*Path(ROOT / "glmtrt_helpers").rglob("*.py"), *ROOT.glob("*.md")]:
        assert not re.search(r"(?<![\w.~])/(home|root|work)/", path.read_text(encoding="utf-8")), path
