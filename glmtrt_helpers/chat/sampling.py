"""Notebook 06: from scores to the next token, greedy or sampled as the model's own `chat` does by default.

Upstream hands its logits processors to the generation loop of transformers; here they are NumPy, in the same order: the
guard against scores that are not finite, temperature, top_k, top_p, and a draw.
"""

from dataclasses import dataclass

import numpy as np

from glmtrt_helpers.core.errors import WorkbookError

GUARD_SCORE = 5e4


@dataclass(frozen=True)
class Sampling:
    """How tokens are selected. The defaults are those of the model's `chat`, and for top_k those of transformers then.

    temperature: above 0; scores are divided by it. top_k: keep the k most likely tokens, 0 keeps all. top_p: of these,
    keep the fewest whose probability reaches it. seed: None draws differently each time.
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
                f"top_p {self.top_p}, top_k {self.top_k}: top_p must be above 0 and at most 1, top_k at least 0."
            )


class Sampler:
    """Selects the next token of every row; its random state carries over from answer to answer.

    blank_id: the token that the guard selects, `Tokenizer.blank_id`.
    """

    def __init__(self, sampling: Sampling, blank_id: int):
        self.sampling = sampling
        self.blank_id = blank_id
        self._random = np.random.default_rng(sampling.seed)

    @property
    def is_greedy(self) -> bool:
        """Whether it always selects the most likely token: then a session may decode on without asking."""
        return self.sampling.greedy

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Ids (batch,) int64 for scores (batch, vocabulary)."""
        scores = guard(scores, self.blank_id)
        if self.sampling.greedy:
            return scores.argmax(axis=-1)
        probabilities = warp(scores, self.sampling)
        # The first token whose running sum exceeds a uniform number; the sum may end a rounding error below 1.
        sums = probabilities.cumsum(axis=-1)
        drawn = self._random.random((len(scores), 1)) * sums[:, -1:]
        return (sums > drawn).argmax(axis=-1)


def guard(scores: np.ndarray, blank_id: int) -> np.ndarray:
    """If any score of the batch is NaN or infinite, set all to 0 and the blank's to 50000, as upstream does."""
    if np.isfinite(scores).all():
        return scores
    safe = np.zeros_like(scores)
    safe[..., blank_id] = GUARD_SCORE
    return safe


def warp(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities (batch, vocabulary) after temperature, top_k and top_p, 0 for tokens that these remove."""
    scores = scores.astype(np.float64) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        smallest_kept = np.partition(scores, -sampling.top_k, axis=-1)[:, -sampling.top_k, None]
        scores = np.where(scores < smallest_kept, -np.inf, scores)
    if sampling.top_p < 1:
        order = scores.argsort(axis=-1, kind="stable")  # ascending, so that the sums are of what would be removed
        tail = softmax(np.take_along_axis(scores, order, axis=-1)).cumsum(axis=-1)
        removed = tail <= 1 - sampling.top_p
        removed[:, -1] = False  # the most likely token always stays
        mask = np.empty_like(removed)
        np.put_along_axis(mask, order, removed, axis=-1)
        scores = np.where(mask, -np.inf, scores)
    return softmax(scores)


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
