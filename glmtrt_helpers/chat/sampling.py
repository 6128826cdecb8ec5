"""From scores to the next token: greedy or sampled, as the model's own `chat` does it by default.

Upstream hands its processors to the generation loop of transformers; here they are NumPy, in the same order: the guard
against scores that are not finite, temperature, top_k, top_p, and a draw.
"""

from dataclasses import dataclass

import numpy as np

from glmtrt_helpers.core.errors import WorkbookError

GUARD_SCORE = 5e4


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The defaults are those of the model's `chat`; top_k is the library's of its time.

    temperature: above 0; scores are divided by it. top_k: so many best tokens stay, 0 keeps all. top_p: of these, the
    fewest that together reach this probability. seed: None draws differently each time.
    """

    greedy: bool = False
    temperature: float = 0.95
    top_k: int = 50
    top_p: float = 0.7
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise WorkbookError(f"temperature {self.temperature} cannot divide scores: take one above 0, or greedy.")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise WorkbookError(
                f"top_p {self.top_p}, top_k {self.top_k}: top_p is above 0 and at most 1, top_k not below 0."
            )


class Sampler:
    """Chooses tokens for a whole batch; holds the random state of one answer after the other.

    blank_id: what the guard chooses, `Tokenizer.blank_id`.
    """

    def __init__(self, sampling: Sampling, blank_id: int):
        self.sampling = sampling
        self.blank_id = blank_id
        self._random = np.random.default_rng(sampling.seed)

    @property
    def is_greedy(self) -> bool:
        """Always the best token: a session that chooses it by itself may go on without asking."""
        return self.sampling.greedy

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Ids (batch,) int64 for scores (batch, vocabulary)."""
        scores = guard(scores, self.blank_id)
        if self.sampling.greedy:
            return scores.argmax(axis=-1)
        probabilities = warp(scores, self.sampling)
        # The first token at which the running sum passes a uniform number; the sum may end a rounding error below 1.
        sums = probabilities.cumsum(axis=-1)
        drawn = self._random.random((len(scores), 1)) * sums[:, -1:]
        return (sums > drawn).argmax(axis=-1)


def guard(scores: np.ndarray, blank_id: int) -> np.ndarray:
    """If any score of the batch is NaN or infinite, all become 0 and the blank's 50000, as upstream does."""
    if np.isfinite(scores).all():
        return scores
    safe = np.zeros_like(scores)
    safe[..., blank_id] = GUARD_SCORE
    return safe


def warp(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities (batch, vocabulary) after temperature, top_k and top_p; what is cut has none."""
    scores = scores.astype(np.float64) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        smallest_kept = np.partition(scores, -sampling.top_k, axis=-1)[:, -sampling.top_k, None]
        scores = np.where(scores < smallest_kept, -np.inf, scores)
    if sampling.top_p < 1:
        order = scores.argsort(axis=-1, kind="stable")  # worst first, so that the sum is of what would be cut
        tail = softmax(np.take_along_axis(scores, order, axis=-1)).cumsum(axis=-1)
        cut = tail <= 1 - sampling.top_p
        cut[:, -1] = False  # the best stays
        mask = np.empty_like(cut)
        np.put_along_axis(mask, order, cut, axis=-1)
        scores = np.where(mask, -np.inf, scores)
    return softmax(scores)


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
