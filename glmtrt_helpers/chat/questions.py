"""What a stand-in can be asked: the questions that it was trained on, which its checkpoint lists."""

from typing import Annotated

import msgspec

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core import records

_Question = Annotated[str, msgspec.Meta(min_length=1, max_length=500)]


def known_questions(checkpoint: Checkpoint) -> list[str]:
    """The questions of `questions.json`, which `glmtrt standin` writes; none for any other checkpoint."""
    path = checkpoint.directory / "questions.json"
    try:
        return records.read(path, list[_Question], "remove it, or train the stand-in again with `glmtrt standin`")
    except FileNotFoundError:
        return []
