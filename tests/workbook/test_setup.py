"""What the notebooks share: the working copy they open, and failures that must happen."""

from pathlib import Path

import pytest
from support.checkpoints import make_random

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.standin import conversations
from glmtrt_helpers.workbook import setup


def test_a_missing_working_copy_names_notebook_00(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # `start` changes it; this puts it back afterwards
    monkeypatch.setenv(setup.MODEL_VARIABLE, str(tmp_path / "models" / "chatglm_6b"))
    with pytest.raises(WorkbookError, match="00_start_here"):
        setup.start()


def test_an_expected_failure_is_printed_from_the_expected_words_on(capsys: pytest.CaptureFixture[str]) -> None:
    with setup.expect(ValueError, "the words", lines=2):
        raise ValueError("before\nthe words\nafter\nmuch later")
    assert capsys.readouterr().out == "ValueError: the words\n  after\n"


def test_an_expected_failure_must_happen() -> None:
    with pytest.raises(AssertionError, match="did not"), setup.expect(ValueError):
        pass
    with pytest.raises(ValueError, match="another"), setup.expect(ValueError, "the words"):
        raise ValueError("another reason")


def test_the_stand_in_learned_every_question_that_backends_are_compared_on() -> None:
    learned = {example.question for example in conversations.load_corpus() if not example.history}
    assert len(set(setup.QUESTIONS)) == 10 and set(setup.QUESTIONS) <= learned


def test_a_checkpoint_in_a_folder_called_run_is_not_taken_for_a_working_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    make_random(tmp_path / "run" / "chatglm_6b")
    for source in ("chatglm_6b", "run/chatglm_6b"):
        monkeypatch.setenv(setup.MODEL_VARIABLE, str(tmp_path / source))
        with pytest.raises(WorkbookError, match="no working copy: run notebook 00_start_here"):
            setup.start()
