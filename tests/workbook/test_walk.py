"""The table and the picture of the walk name notebooks, commands and files that exist."""

from pathlib import Path

import typer

from glmtrt_helpers.cli.commands import app
from glmtrt_helpers.workbook.run_notebooks import notebooks
from glmtrt_helpers.workbook.walk import ARROWS, SHARDS, STEPS, draw_walk, walk_rows


def test_every_step_is_a_notebook_and_a_command() -> None:
    assert [step.notebook for step in STEPS] == [path.stem for path in notebooks()]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert all(step.command.removeprefix("glmtrt ") in commands for step in STEPS)


def test_a_file_is_written_before_it_is_read(exported_standin: Path) -> None:
    known = {"the checkpoint"}
    for step in STEPS:
        assert known.issuperset(step.reads), step
        known.update(step.writes)
    there = {path.name for path in exported_standin.iterdir()}
    later = {"inputs.json", "model.fp16.plan", "model.fp16.plan.json"}
    assert known - {"the checkpoint", SHARDS} - later <= there


def test_an_arrow_carries_what_one_end_writes_and_the_other_reads() -> None:
    for start, end, file, _ in ARROWS:
        assert file in STEPS[start].writes and file in STEPS[end].reads
    assert {end for _, end, _, _ in ARROWS} == set(range(1, len(STEPS)))
    (axis,) = draw_walk().axes
    texts = "\n".join(text.get_text() for text in axis.texts)
    assert all(row[0] in texts and row[1] in texts for row in walk_rows())
    assert all(file in texts for step in STEPS for file in step.writes if file not in (SHARDS, "model.fp16.plan.json"))
