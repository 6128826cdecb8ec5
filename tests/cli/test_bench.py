"""`glmtrt bench` in this process: its default command, and the start-up time."""

import json
from pathlib import Path

import pytest
from support.exporting import exported_copy

from glmtrt_helpers.cli.commands import app


@pytest.mark.slow
def test_a_folder_as_the_first_argument_measures_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = exported_copy(tmp_path)
    path = tmp_path / "out.json"
    options = ["--engine", "ort-cpu", "--past", "8", "--samples", "2", "--output", str(path)]
    app(["bench", str(checkpoint.directory), *options], standalone_mode=False)
    assert "ort-cpu" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [(row["phase"], row["past"], len(row["samples_ms"])) for row in rows] == [("decode", 8, 2)]


def test_startup_prints_cpu_time(capsys: pytest.CaptureFixture[str]) -> None:
    app(["bench", "startup"], standalone_mode=False)
    figure, unit = capsys.readouterr().out.split(" ", 1)
    assert float(figure) > 0 and unit == "s of CPU time\n"
