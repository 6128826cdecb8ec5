"""Notebook 05: optimization profiles, fitted to the calls that a chat makes.

A profile gives each dynamic dimension a min, an opt and a max size. TensorRT tunes kernels for opt and reserves memory
for max; a shape outside every profile is refused. A chat needs two: prefill reads a whole prompt on an empty past,
decode reads one token on a growing past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError

if TYPE_CHECKING:  # recording imports PyTorch
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
    """The sizes of one dimension: the smallest accepted, the one that kernels are tuned for, the largest accepted."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max:
            raise ValueError(f"{self.min}, {self.opt}, {self.max} are not the smallest, typical and largest size")

    @classmethod
    def parse(cls, text: str, smallest: int = 1) -> Range:
        """Read "1,64,512" as min, opt, max. Raises WorkbookError for other text, and a min below `smallest`."""
        try:
            sizes = cls(*(int(part) for part in text.split(",")))
        except (TypeError, ValueError):
            sizes = None
        if sizes is None or sizes.min < smallest:
            raise WorkbookError(
                f"{text!r} is not a range: give the smallest (at least {smallest}), the typical and the largest size, "
                "as in 1,64,512."
            )
        return sizes

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max


@dataclass(frozen=True)
class Profile:
    """One optimization profile: the ranges of batch, sequence and past."""

    name: str
    batch: Range
    sequence: Range
    past: Range

    def covers(self, batch: int, sequence: int, past: int) -> bool:
        return batch in self.batch and sequence in self.sequence and past in self.past

    def shapes(self, dims: Sequence[int | str]) -> list[tuple[int, ...]]:
        """The min, opt and max shape of an input. dims: sizes, and the export's names of its dynamic dimensions."""
        shapes = []
        for which in ("min", "opt", "max"):
            sizes = {name: getattr(getattr(self, name), which) for name in ("batch", "sequence", "past")}
            sizes["total"] = sizes["past"] + sizes["sequence"]
            shapes.append(tuple(sizes[dim] if isinstance(dim, str) else dim for dim in dims))
        return shapes

    def of_two_rows(self) -> Profile:
        """The same with a batch max of at least 2, for graphs whose weights are inputs.

        If the profile allows one row only, TensorRT-RTX 1.6 transposes every weight in every call of such a graph
        (10.5 ms instead of 4.8 at the real size).
        """
        return replace(self, batch=replace(self.batch, max=max(self.batch.max, 2)))


def real_size(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the sizes of ChatGLM-6B, for predictions; it holds no tensors."""
    return Checkpoint(checkpoint.directory, {**checkpoint.config, **REAL_SIZE}, {})


def chat_profiles(
    checkpoint: Checkpoint, batch: Range | None = None, prompt: Range | None = None, past: Range | None = None
) -> list[Profile]:
    """The two profiles of a chat, prefill and decode. By default one row, prompt and past up to the model's length.

    Raises WorkbookError for maxima beyond the model's length.
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


def fit_to_record(checkpoint: Checkpoint, calls: Sequence[Call]) -> list[Profile]:
    """Profiles fitted to recorded calls: opt is the median of the recorded sizes, max is twice the largest."""
    prompts = sorted(call.sequence for call in calls if call.past == 0)
    pasts = sorted(call.past for call in calls if call.past > 0)
    if not prompts or not pasts:
        raise WorkbookError("the record holds no prefill or no decode: record a whole answer, notebook 01.")
    last = checkpoint.max_length - 1
    for smallest, largest in ((prompts[0], prompts[-1]), (pasts[0], pasts[-1])):
        if smallest < 1 or largest > last:
            raise WorkbookError(
                f"the record holds sizes of {smallest} to {largest}, and {checkpoint.directory} takes 1 to {last}: "
                f"record a chat with it, `glmtrt inputs {checkpoint.directory}`."
            )

    def fitted(sizes: Sequence[int]) -> Range:
        return Range(1, sizes[len(sizes) // 2], min(2 * sizes[-1], last))

    return chat_profiles(checkpoint, prompt=fitted(prompts), past=fitted(pasts))


def find_profile(profiles: Sequence[Profile], batch: int, sequence: int, past: int) -> int:
    """Index of the first profile that covers a shape. Raises WorkbookError where none does, naming them."""
    for index, profile in enumerate(profiles):
        if profile.covers(batch, sequence, past):
            return index
    raise WorkbookError(
        f"batch {batch}, sequence {sequence}, past {past} lies outside every profile of the engine "
        f"({'; '.join(map(describe, profiles))}): use a smaller shape, or build with larger maxima, "
        "`glmtrt build --help`."
    )


def describe(profile: Profile) -> str:
    """As in "prefill: batch 1, sequence 1 to 512, past 0"."""
    parts = [
        f"{what} {size.min}" if size.min == size.max else f"{what} {size.min} to {size.max}"
        for what, size in (("batch", profile.batch), ("sequence", profile.sequence), ("past", profile.past))
    ]
    return f"{profile.name}: {', '.join(parts)}"
