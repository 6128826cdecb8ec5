"""Exercises whose answer is checked by the cell that holds it."""

from collections.abc import Callable
from typing import Any


def check(answer: Any, is_right: Callable[[Any], bool]) -> None:
    """Say that an answer is right, or raise AssertionError; `...` and None, what the cell began with, are no answer.

    is_right: called with the answer, and only if there is one. So a notebook that nobody has worked through runs to its
    end. What it raises is the answer's error, and is left to the reader.
    """
    if answer is None or answer is ...:
        print("Not answered yet: write your code in place of the dots, and run the cell again.")
        return
    assert is_right(answer), "not right yet: the hint above the cell says where to look"
    print("Right.")
