"""Sampling against the library whose processors the model's own chat uses, and against upstream's guard."""

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from glmtrt_helpers.chat.sampling import Sampler, Sampling, warp
from glmtrt_helpers.core.errors import WorkbookError

SCORES = np.random.default_rng(0).normal(0, 3, (5, 400)).astype(np.float32)
SETTINGS = [
    Sampling(),
    Sampling(temperature=0.3),
    Sampling(temperature=2.0, top_k=0, top_p=0.9),
    Sampling(top_k=3, top_p=1.0),
    Sampling(top_k=0, top_p=1.0),
    Sampling(top_p=0.01),
    Sampling(top_k=1),
    Sampling(top_k=1000, top_p=0.999),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_probabilities_are_those_of_transformers(settings: Sampling) -> None:
    scores = torch.from_numpy(SCORES).double()
    ids = torch.zeros(5, 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(settings.temperature)(ids, scores)
    if settings.top_k:
        scores = TopKLogitsWarper(settings.top_k)(ids, scores)
    if settings.top_p < 1:
        scores = TopPLogitsWarper(settings.top_p)(ids, scores)
    expected = scores.softmax(-1).numpy()
    actual = warp(SCORES, settings)
    assert ((actual > 0) == (expected > 0)).all()
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)


def test_draws_follow_the_probabilities() -> None:
    settings = Sampling(temperature=1.5, top_k=8, top_p=0.95, seed=1)
    sampler = Sampler(settings, blank_id=5)
    scores = SCORES[:1]
    expected = warp(scores, settings)[0]
    drawn = np.bincount([int(sampler(scores)[0]) for _ in range(20000)], minlength=400) / 20000
    assert (drawn[expected == 0] == 0).all()
    np.testing.assert_allclose(drawn, expected, atol=4 * np.sqrt(0.25 / 20000))


def test_a_seed_gives_the_same_draws_and_another_seed_others() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=3.0, top_p=1.0, seed=seed), blank_id=5)
        return [int(i) for _ in range(10) for i in sampler(SCORES)]

    assert draw(1) == draw(1) != draw(2)


def test_greedy_takes_the_most_likely_token_of_every_row() -> None:
    assert Sampler(Sampling(greedy=True), 5)(SCORES).tolist() == SCORES.argmax(-1).tolist()
    assert Sampler(Sampling(top_k=1, seed=0), 5)(SCORES).tolist() == SCORES.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("greedy", [True, False])
def test_one_bad_score_makes_all_rows_blank(bad: float, greedy: bool) -> None:
    """Upstream: `if torch.isnan(scores).any() or torch.isinf(scores).any(): scores.zero_(); scores[..., 5] = 5e4`."""
    scores = SCORES.copy()
    scores[2, 7] = bad
    assert Sampler(Sampling(greedy=greedy), blank_id=5)(scores).tolist() == [5] * 5
    assert (np.random.default_rng(0).normal(0, 3, (5, 400)).astype(np.float32) == SCORES).all()
    assert Sampler(Sampling(greedy=True), blank_id=5)(SCORES).tolist() != [5] * 5


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}]
)
def test_invalid_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(WorkbookError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
