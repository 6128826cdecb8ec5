"""Exercises whose answer is checked by the cell that holds it."""

from collections.abc import Callable
from typing import Any


def check(answer: Any, is_right: Callable[[Any], bool]) -> None:
    """Say that an answer is right, or raise AssertionError. `...` and None, with which the cell began, are no answer.

    answer: a list is one only if all of it is. is_right: called with it, and only if there is one, so a notebook that
    nobody has worked through runs to its end. What it raises is the answer's error, and is left to the reader.
    """
    if any(part is None or part is ... for part in (answer if isinstance(answer, list) else [answer])):
        print("Not answered yet: write your code in place of the dots, and run the cell again.")
        return
    assert is_right(answer), "not right yet: the hint above the cell says where to look"
    print("Right.")
