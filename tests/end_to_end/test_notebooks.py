"""Every notebook: its shape, its committed outputs, and a run in a clean kernel that must print the same.

`-k 03_export_onnx` selects the tests of one notebook, `-m "not notebook"` leaves out those that execute one.
"""

import itertools
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import nbformat
import pytest
from support.checkpoints import ROOT
from support.working_copy import prepare_working_copy

from glmtrt_helpers.workbook import run_notebooks, setup

NOTEBOOKS = run_notebooks.notebooks()
NAMES = [path.stem for path in NOTEBOOKS]
HINT, SOLUTION = "<summary>Hint</summary>", "<summary>Solution</summary>"
EXERCISE = re.compile(r"### Exercise (\d): .+\n\n\*\d+ minutes, (easy|medium|hard)\.\* ")
ANNOUNCED = re.compile(r"Running remote code from .*; nothing is downloaded\.\n")
PREDICTION = re.compile(r"\*\*(What will|Before you|Which of them will|Estimate it first)")
FLOAT = re.compile(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?|[-+]?\d+e[-+]?\d+")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
TENSOR = re.compile(r"\b(?:logits|present\.\d+\.(?:key|value))")
# Floats may move with the processor: rounding errors by a part of themselves, tiny ones freely. Where a row shows the
# worst of several tensors, which of them that is may change, too, and with it the scale of the error.
RELATIVE, ABSOLUTE, SCALES = 0.3, 2e-5, 0.9


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def text_outputs(cell: Any) -> str:
    """What a cell printed or returned as text, without pictures, widgets and standard error."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            # Which source is announced, and where, depends on what ran before.
            parts.append(ANNOUNCED.sub("", output.text))
        elif output.output_type in ("display_data", "execute_result") and not (
            {"image/png", "image/svg+xml", "application/vnd.jupyter.widget-view+json"} & set(output.data)
        ):
            parts.append(output.data.get("text/plain", ""))
    return "\n".join(parts)


def same_text(committed: str, fresh: str, tagged: Collection[str] = ()) -> bool:
    """Equal but for floats within tolerance; in a cell tagged `measured`, but for every number.

    In one tagged `rounding` tensors' names may differ, and floats by a factor of 10: two outputs come within 1% of
    being the worst for what each is allowed, and which of them is printed is the processor's choice.
    """
    pattern = NUMBER if "measured" in tagged else FLOAT
    if "rounding" in tagged:
        committed, fresh = TENSOR.sub("tensor", committed), TENSOR.sub("tensor", fresh)

    def skeleton(text: str) -> str:
        # table borders follow the width of the numbers in them
        text = re.sub(r"\x1b\[[\d;]*m", "", text)
        return re.sub(r"[\s─━┃│┏┓┗┛┡┩├┤┼╇┳┻┴┬┌┐└┘]+", " ", pattern.sub("#", text)).strip()

    if skeleton(committed) != skeleton(fresh):
        return False
    if "measured" in tagged:
        return True
    part = SCALES if "rounding" in tagged else RELATIVE
    pairs = zip(pattern.findall(committed), pattern.findall(fresh), strict=True)
    return all(abs(float(a) - float(b)) <= part * max(abs(float(a)), abs(float(b))) + ABSOLUTE for a, b in pairs)


@pytest.mark.parametrize(
    ("committed", "fresh", "tag", "same"),
    [
        ("error 1.0e-3, 5 rows", "error 1.1e-3, 5 rows", "", True),
        ("error 1.0e-3, 5 rows", "error 3.0e-3, 5 rows", "", False),
        ("error 1.0e-3, 5 rows", "error 1.0e-3, 6 rows", "", False),
        ("took 12 s", "took 700.5 s", "measured", True),
        ("took 12 s", "failed", "measured", False),
        ("2.4e-03 logits yes", "2.4e-03 present.3.key yes", "", False),
        ("2.4e-03 logits yes", "2.4e-03 present.3.key yes", "measured", False),
        ("17 0 9.3e-03 logits yes", "17 0 3.7e-03 present.3.key yes", "rounding", True),
        ("17 0 9.3e-03 logits yes", "17 0 9.9e-02 present.3.key yes", "rounding", False),
        ("17 0 9.3e-03 logits yes", "17 1 9.3e-03 present.3.key yes", "rounding", False),
        ("17 0 9.3e-03 logits yes", "17 0 9.3e-03 present.3.key NO", "rounding", False),
        ("is fine", "is broken", "", False),
    ],
)
def test_the_comparison_itself(committed: str, fresh: str, tag: str, same: bool) -> None:
    assert same_text(committed, fresh, [tag]) is same


def test_numbered_without_gaps() -> None:
    assert [name[:2] for name in NAMES] == [f"{i:02}" for i in range(len(NAMES))] and len(NAMES) >= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_shape_of_a_notebook(path: Path) -> None:
    notebook = read(path)
    first, last = notebook.cells[0], notebook.cells[-1]
    for word in ("**Question.**", "**Afterwards you can**", "**Needs**", "**Takes**", "**Hardware**"):
        assert word in first.source, word
    assert 2 <= first.source.count("\n- ") <= 4
    closing = [cell for cell in notebook.cells if "## What was shown" in cell.source]
    assert len(closing) == 1 and "## Exercises" in closing[0].source
    following = [*[other.name for other in NOTEBOOKS if other.name > path.name], "../README.md"][0]
    assert last.source.startswith("**Next:** ") and f"]({following})" in last.source
    lengths = sorted(len(cell.source.splitlines()) for cell in code_cells(notebook))
    assert lengths[len(lengths) // 2] <= 10 and lengths[-1] <= 25
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_what_a_reader_is_asked(path: Path) -> None:
    """A prediction before the cell that answers it; exercises with a hint before the solution, two of them checked."""
    cells = read(path).cells
    predictions = [i for i, cell in enumerate(cells) if PREDICTION.search(cell.source)]
    assert predictions and all(
        cells[i].cell_type == "markdown" and cells[i + 1].cell_type == "code" for i in predictions
    )
    exercises = [cell for cell in cells if cell.source.startswith("### Exercise")]
    for number, cell in enumerate(exercises, 1):
        match = EXERCISE.match(cell.source)
        assert match and match[1] == str(number), cell.source[:80]
        assert 0 < cell.source.index(HINT) < cell.source.index(SOLUTION) and cell.source.count("<details>") == 2
    assert len(solutions(read(path))) >= 2


def solutions(notebook: Any) -> list[str]:
    """For every exercise that is checked, its cell with the solution in front of the check."""
    filled = []
    for before, cell in itertools.pairwise(notebook.cells):
        if cell.cell_type == "code" and "workbook.check(" in cell.source:
            (solution,) = re.findall(r"```python\n(.*?)```", before.source.partition(SOLUTION)[2], re.DOTALL)
            begun, check, rest = cell.source.rpartition("workbook.check(")
            assert "..." in begun and HINT in before.source
            filled.append(f"{begun}\n{solution}\n{check}{rest}")
    return filled


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_committed_outputs_are_whole_and_name_no_machine(path: Path) -> None:
    cells = code_cells(read(path))
    assert all(cell.execution_count for cell in cells), "commit the notebook with its outputs"
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    outputs = json.dumps([cell.outputs for cell in cells])
    for needs_a_kernel in (run_notebooks.WIDGET, "<iframe", "interactive(children"):
        assert needs_a_kernel not in outputs
    text = "\n".join(text_outputs(cell) for cell in cells)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|Users|opt)/", text)
    for link in re.findall(r"\]\((\d\d_[\w]+\.ipynb)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists() or link[:2] > NAMES[-1][:2], link


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A notebook, after making the working copy that it reads, as the notebooks before it leave it."""
    monkeypatch.setenv(setup.MODEL_VARIABLE, setup.DEFAULT_MODEL)
    prepare_working_copy(request.param.stem)
    return Path(request.param)


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES, indirect=True)
def test_prints_what_was_committed(path: Path, tmp_path: Path) -> None:
    """And every solution passes its check, in the same run. The executed copy lands where `make workbook` puts it."""
    output = ROOT / "build" / "notebooks" / path.name
    with_solutions = read(path)
    solved = solutions(with_solutions)
    with_solutions.cells += map(nbformat.v4.new_code_cell, solved)
    nbformat.write(with_solutions, tmp_path / path.name)
    run_notebooks.execute(tmp_path / path.name, output)
    executed = read(output)
    for cell in executed.cells[-len(solved) :]:
        assert text_outputs(cell).endswith("Right.\n"), cell.source
    del executed.cells[-len(solved) :]
    nbformat.write(executed, output)
    for committed, fresh in zip(code_cells(read(path)), code_cells(executed), strict=True):
        if "machine" in tags(committed):
            continue
        before, after = text_outputs(committed), text_outputs(fresh)
        assert same_text(before, after, tags(committed)), (
            f"{path.name} prints something else now in the cell\n{committed.source}\n"
            f"--- committed\n{before}\n--- now\n{after}"
        )


GENERATING = [path for path in NOTEBOOKS if f'"{run_notebooks.GENERATES}"' in path.read_text("utf-8")]


@pytest.mark.notebook
@pytest.mark.parametrize("path", GENERATING, ids=[path.stem for path in GENERATING], indirect=True)
def test_where_generating_is_too_slow_saved_results_are_shown_and_marked(path: Path, tmp_path: Path) -> None:
    """And no other cell needs one that was skipped."""
    run_notebooks.execute(path, tmp_path / path.name, generate=False)
    skipped = 0
    for committed, fresh in zip(code_cells(read(path)), code_cells(read(tmp_path / path.name)), strict=True):
        if run_notebooks.GENERATES in tags(committed):
            skipped += 1
            assert fresh.outputs[0].text == run_notebooks.SAVED and fresh.outputs[1:] == committed.outputs
        else:
            assert run_notebooks.SAVED not in text_outputs(fresh)
    assert skipped
