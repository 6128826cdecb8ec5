"""Imports between our modules: in the order of the folders, and inside a function only to spare a heavy package."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import ROOT

PACKAGE = "glmtrt_helpers"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in (ROOT / PACKAGE).rglob("*.py")
    if "template" not in path.parts
}
# Not needed for everything, and slow to load or absent on some machines.
HEAVY = {"torch", "transformers", "onnxruntime", "cuda", "matplotlib"}


def imported(node: ast.AST) -> set[str]:
    """Full names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        full = {f"{node.module}.{alias.name}" for alias in node.names}
        return {name if name in MODULES else str(node.module) for name in full}
    return set()


def heavy_packages(module: str) -> set[str]:
    """Heavy packages that importing one of our modules loads."""
    seen, waiting = {module}, [module]
    while waiting:
        for node in MODULES[waiting.pop()].body:
            waiting += [name for name in imported(node) - seen if name in MODULES]
            seen |= imported(node)
    return {name.split(".")[0] for name in seen} & HEAVY


def test_imports_inside_functions_spare_a_heavy_package() -> None:
    """Of our own modules, outside of the command line, and only where the file does without that package so far."""
    for module, tree in MODULES.items():
        if module.startswith(f"{PACKAGE}.cli"):
            continue
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        targets = {name for function in functions for node in ast.walk(function) for name in imported(node)}
        for target in sorted(targets & MODULES.keys()):
            assert heavy_packages(target) - heavy_packages(module), f"{module} can import {target} at the top"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and the contract, to be changed."""
    target = tmp_path_factory.mktemp("order")
    shutil.copytree(ROOT / PACKAGE, target / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_the_order_of_the_folders_holds() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("core/errors.py", "import glmtrt_helpers.export.exporting\n"),
        ("inputs/names.py", "def late() -> None:\n    import glmtrt_helpers.chat.sampling\n"),
        ("chat/sampling.py", "import glmtrt_helpers.chat.conversation\n"),  # which imports sampling
    ],
    ids=["backwards", "backwards in a function", "a circle in a folder"],
)
def test_an_import_against_the_order_is_reported(copy: Path, importer: str, line: str) -> None:
    path = copy / PACKAGE / importer
    original = path.read_text()
    path.write_text(f"{original}\n{line}")
    done = lint_imports(copy)
    path.write_text(original)
    assert done.returncode != 0 and "BROKEN" in done.stdout
    assert f".{path.stem} -> " in done.stdout, "the import that breaks the contract is named"
