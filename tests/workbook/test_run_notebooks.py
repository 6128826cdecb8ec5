"""Executing one notebook: clean kernel, skipped cells, failing cells."""

from pathlib import Path

import nbformat
import pytest
from support.checkpoints import TINY

from glmtrt_helpers.checkpoints import checkpoint as checkpoint_module
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.workbook import run_notebooks


def notebook(path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_a_failing_cell_fails_the_run_and_the_copy_shows_it(tmp_path: Path) -> None:
    output = tmp_path / "out" / "09_broken.ipynb"
    with pytest.raises(WorkbookError, match=r"09_broken\.ipynb failed: ZeroDivisionError"):
        run_notebooks.execute(notebook(tmp_path / "09_broken.ipynb", "1 / 0"), output)
    assert not output.exists()
    (cell,) = nbformat.read(output.with_name("09_broken.failed.ipynb"), as_version=4).cells
    assert cell.outputs[0].ename == "ZeroDivisionError"
    run_notebooks.execute(notebook(tmp_path / "09_broken.ipynb", "1 / 1"), output)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_kernel_that_dies_is_one_sentence(tmp_path: Path) -> None:
    path = notebook(tmp_path / "09_dies.ipynb", "import os", "os._exit(3)")
    with pytest.raises(WorkbookError, match=r"09_dies\.ipynb failed: .*died.*; see .*out\.failed\.ipynb"):
        run_notebooks.execute(path, tmp_path / "out.ipynb")


def test_what_needs_a_kernel_is_not_written(tmp_path: Path) -> None:
    """A page that is only read would show the repr of a widget, or a frame that stays empty."""
    slider = "import ipywidgets; ipywidgets.interactive(lambda number: number, number=3)"
    frame = "from IPython.display import IFrame; IFrame('http://127.0.0.1:1', 10, 10)"
    run_notebooks.execute(notebook(tmp_path / "09.ipynb", slider, frame, "'text'"), tmp_path / "out.ipynb")
    written = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    shown = [[output.data for output in cell.outputs] for cell in written.cells]
    static = [{"text/plain": run_notebooks.STATIC}]
    assert shown == [static, static, [{"text/plain": "'text'"}]] and "widgets" not in written.metadata


@pytest.mark.slow
def test_output_widgets_do_not_stop_the_run(tmp_path: Path) -> None:
    """nbclient answered each of these prints on the socket on which it waits, and missed a reply within 100 cells."""
    cell = """import ipywidgets, sys
output = ipywidgets.Output()
display(output)
for i in range(30):
    with output:
        print(i)
        print(i, file=sys.stderr)"""
    run_notebooks.execute(notebook(tmp_path / "09.ipynb", *[cell] * 100), tmp_path / "out.ipynb", timeout=30)


@pytest.mark.parametrize("generate", [True, False])
def test_cells_that_generate_are_skipped_on_request(tmp_path: Path, generate: bool) -> None:
    path = notebook(tmp_path / "09.ipynb", "print('new')", "print('always')")
    content = nbformat.read(path, as_version=4)
    content.cells[0].metadata.tags = ["generates"]
    content.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text="saved\n")]
    nbformat.write(content, path)
    run_notebooks.execute(path, tmp_path / "out.ipynb", generate=generate)
    first, second = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    expected = ["new\n"] if generate else [run_notebooks.SAVED, "saved\n"]
    assert [output.text for output in first.outputs] == expected
    assert [output.text for output in second.outputs] == ["always\n"]


def test_generating_is_too_slow_on_a_large_checkpoint_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(TINY)
    monkeypatch.setattr(tensorrt_package, "gpus", list)
    assert not run_notebooks.generates_too_slowly(checkpoint)
    monkeypatch.setattr(checkpoint_module, "LARGE_BYTES", 1000)
    assert run_notebooks.generates_too_slowly(checkpoint)
    monkeypatch.setattr(tensorrt_package, "gpus", lambda: [tensorrt_package.Gpu("a card", (9, 0), 10**11)])
    assert not run_notebooks.generates_too_slowly(checkpoint)
