"""The files that the steps write into a working copy: what their names say, and what to do where one is missing."""

from pathlib import Path


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
    return f"{path} is missing: run notebook 03_export_onnx or `glmtrt export {path.parent}{cli_options(path)}`."
