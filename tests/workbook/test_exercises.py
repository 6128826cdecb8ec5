"""The check of an exercise: dots are no answer, a wrong one fails, a right one is called right."""

import pytest

from glmtrt_helpers.workbook.exercises import check


@pytest.mark.parametrize("answer", [..., None, [1, None]])
def test_no_answer_is_neither_right_nor_a_failure(answer: object, capsys: pytest.CaptureFixture[str]) -> None:
    check(answer, lambda _: pytest.fail("it was asked about no answer"))
    assert capsys.readouterr().out.startswith("Not answered yet")


@pytest.mark.parametrize("answer", [4, 0, "", []])
def test_an_answer_is_judged(answer: object, capsys: pytest.CaptureFixture[str]) -> None:
    """Even one that is false in Python."""
    check(answer, lambda given: given == answer)
    assert capsys.readouterr().out == "Right.\n"
    with pytest.raises(AssertionError, match="not right yet"):
        check(answer, lambda given: given != answer)
