"""The files that the steps write into a working copy: what their names say, and what to do where one is missing."""

from pathlib import Path

# In every working copy: the names of the files that it mirrors, with a digest of each small one. A folder without it is
# somebody's own.
MARKER = ".glmtrt-working-copy.json"
# In a checkpoint that is worked in: it is a working copy, or was patched where it lies.
_WORKED_IN = (MARKER, "modeling_chatglm.py.orig")
_NOTEBOOKS = {"patch": "02_patch_rotary_flatten", "export": "03_export_onnx"}


def cli_options(path: Path) -> str:
    """The options of `glmtrt export` and `glmtrt build` that make this graph or engine, such as " --dtype fp32"."""
    return " --dtype fp32" * ("fp32" in path.name.split("."))


def graphs_of(path: Path) -> list[Path]:
    """The graph at a path; of a folder, all exports in it, or the one that `glmtrt export` would write there."""
    if not path.is_dir():
        return [path]
    return sorted(path.glob("model.*.onnx")) or [path / "model.fp16.onnx"]


def missing_graph(path: Path) -> str:
    """The error's sentence for a graph that does not exist: which one, and how to make it."""
    if not (path.parent / "config.json").exists():
        return f"{path} is missing: give the path of an ONNX file, or of a working copy that has one."
    return f"{path} is missing: {take_step('export', path.parent, cli_options(path))}."


def take_step(step: str, directory: Path, options: str = "") -> str:
    """The advice of an error where a step was not taken: to take it, or to make the working copy that it belongs in."""
    if any((directory / name).is_file() for name in _WORKED_IN):
        return f"run notebook {_NOTEBOOKS[step]} or `glmtrt {step} {directory}{options}`"
    return f"make a working copy with `glmtrt copy {directory}`, and {step} that"
