"""Notebook 05: optimization profiles, taught from what a chat really asks for, and what they cost in memory.

A profile is a box: for each moving dimension a smallest, a typical and a largest size. TensorRT tunes for the typical
and reserves memory for the largest; a request outside every box is refused. A chat needs two boxes: prefill reads a
whole prompt on an empty past, decode reads one token on a growing past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError

if TYPE_CHECKING:
    from glmtrt_helpers.inputs.recording import Call

# THUDM/chatglm-6b, config.json of its last revision.
REAL_SIZE = {
    "num_layers": 28,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "inner_hidden_size": 16384,
    "vocab_size": 130528,
    "max_sequence_length": 2048,
}
TYPICAL_PROMPT, TYPICAL_PAST = 128, 512


@dataclass(frozen=True)
class Range:
    """Sizes of one dimension: what a profile takes at least, is tuned for, and takes at most."""

    min: int
    opt: int
    max: int

    @classmethod
    def parse(cls, text: str, what: str) -> Range:
        """Read "1,64,512" as min, opt, max."""
        try:
            sizes = [int(part) for part in text.split(",")]
            if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                raise ValueError
        except ValueError:
            raise WorkbookError(
                f"{what} {text!r} is no range: give the smallest, the typical and the largest size, as in 1,64,512."
            ) from None
        return cls(*sizes)

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max


@dataclass(frozen=True)
class Profile:
    """One box in (batch, sequence, past)."""

    name: str
    batch: Range
    sequence: Range
    past: Range

    def covers(self, batch: int, sequence: int, past: int) -> bool:
        return batch in self.batch and sequence in self.sequence and past in self.past

    def shapes(self, dims: Sequence[int | str]) -> list[tuple[int, ...]]:
        """The smallest, typical and largest shape of an input whose moving dimensions are named, as the export does."""
        shapes = []
        for which in ("min", "opt", "max"):
            sizes = {name: getattr(getattr(self, name), which) for name in ("batch", "sequence", "past")}
            sizes["total"] = sizes["past"] + sizes["sequence"]
            shapes.append(tuple(sizes[dim] if isinstance(dim, str) else dim for dim in dims))
        return shapes

    def of_two_rows(self) -> Profile:
        """The same for two rows at least: where the weights are inputs and a step is of one row by the profile, not by
        chance, TensorRT-RTX 1.6 transposes every weight at every call (10.5 ms for 4.8 at the real size).
        """
        return replace(self, batch=replace(self.batch, max=max(self.batch.max, 2)))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Profile:
        return cls(entry["name"], *(Range(**entry[key]) for key in ("batch", "sequence", "past")))


def real_size(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as if it had the real one's sizes, for predictions; it holds no tensors."""
    return Checkpoint(checkpoint.directory, {**checkpoint.config, **REAL_SIZE}, {})


def chat_profiles(
    checkpoint: Checkpoint, batch: Range | None = None, prompt: Range | None = None, past: Range | None = None
) -> list[Profile]:
    """The two profiles of a chat. By default one row, prompts and pasts up to the model's whole length.

    Raises WorkbookError for maxima beyond the length of the model.
    """
    last = checkpoint.max_length - 1
    batch = batch or Range(1, 1, 1)
    prompt = prompt or Range(1, min(TYPICAL_PROMPT, last), last)
    past = past or Range(1, min(TYPICAL_PAST, last), last)
    for what, largest in (("prompt", prompt.max), ("past", past.max)):
        if largest > last:
            raise WorkbookError(
                f"a {what} of {largest} leaves no room in the {checkpoint.max_length} positions of "
                f"{checkpoint.directory}: the largest is {last}."
            )
    return [
        Profile("prefill", batch, prompt, Range(0, 0, 0)),
        Profile("decode", batch, Range(1, 1, 1), past),
    ]


def find_profile(profiles: Sequence[Profile], batch: int, sequence: int, past: int) -> int:
    """Index of the first profile that covers a request. Raises WorkbookError where none does, and says why."""
    for index, profile in enumerate(profiles):
        if profile.covers(batch, sequence, past):
            return index
    raise WorkbookError(
        f"batch {batch}, sequence {sequence}, past {past} lies outside every profile of the engine "
        f"({'; '.join(map(describe, profiles))}): shorten it, or build with larger maxima, `glmtrt build --help`."
    )


def describe(profile: Profile) -> str:
    """As in "prefill: batch 1, sequence 1 to 512, past 0"."""
    parts = [
        f"{what} {size.min}" if size.min == size.max else f"{what} {size.min} to {size.max}"
        for what, size in (("batch", profile.batch), ("sequence", profile.sequence), ("past", profile.past))
    ]
    return f"{profile.name}: {', '.join(parts)}"


def fit_to_record(checkpoint: Checkpoint, calls: Sequence[Call], room: float = 2.0) -> list[Profile]:
    """Profiles from recorded calls: typical is the median of what was asked for, the largest `room` times the most."""
    prompts = sorted(call.sequence for call in calls if call.past == 0)
    pasts = sorted(call.past for call in calls if call.past > 0)
    if not prompts or not pasts:
        raise WorkbookError("the record holds no prefill or no decode: record a whole answer, notebook 01.")
    last = checkpoint.max_length - 1

    def box(sizes: Sequence[int]) -> Range:
        return Range(1, sizes[len(sizes) // 2], min(int(room * sizes[-1]), last))

    return chat_profiles(checkpoint, prompt=box(prompts), past=box(pasts))
