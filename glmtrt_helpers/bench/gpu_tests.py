"""Notebook 06: what the GPU tests check, and whether they passed, from the saved output of `pytest -m gpu -rA`."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from glmtrt_helpers.core.errors import WorkbookError

# A part of a test's name, and what the test checks.
CHECKS = {
    "every_answer_of_the_corpus": "greedy answers to the whole corpus, token for token as in PyTorch fp32",
    "logits_and_presents": "logits and presents of ten cases, within tolerance",
    "zero_past": "an empty past: the first call is a prefill",
    "longest_past": "the longest past: 2,047 tokens and one more",
    "profiles_switch": "prefill, decode and prefill again: the profiles switch, the answers stay",
    "left_padded_batch": "left-padded batches of four: each row answers as it does alone",
    "fifty_rounds": "50 rounds, past the context limit: GPU memory stays flat",
    "shape_outside_every_profile": "a shape outside every profile: refused, and the session goes on",
}
_OUTCOME = re.compile(r"^(PASSED|FAILED|ERROR) \S+::(\w+)", re.MULTILINE)


def load_gpu_tests(path: Path) -> tuple[str, list[tuple[str, int, str]]]:
    """The first line of the file, which says when and where it was made, and rows (what was checked, runs, verdict).

    A test runs once for every engine and dtype; the verdict is "passed" only if each of these runs passed.
    Raises WorkbookError where the file is missing, or holds no summary.
    """
    again = f"run `python -m pytest -m gpu -rA` on a GPU and save its summary in {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        raise WorkbookError(f"{path} is missing: {again}.") from None
    outcomes = _OUTCOME.findall(text)
    if not outcomes:
        raise WorkbookError(f"{path} lists no test that passed or failed: {again}.")
    rows = []
    for part, sentence in CHECKS.items():
        counts = Counter(outcome for outcome, name in outcomes if part in name)
        runs, passed = counts.total(), counts["PASSED"]
        verdict = "was not run" if not runs else "passed" if passed == runs else f"{runs - passed} FAILED"
        rows.append((sentence, runs, verdict))
    return text.splitlines()[0], rows
