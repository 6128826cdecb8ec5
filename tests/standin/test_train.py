"""The stand-in: the shipped one knows its corpus with a margin, and a smaller one can be trained from scratch."""

import json
from pathlib import Path

import pytest
import torch
from support.checkpoints import TINY

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.sessions.decode_loop import greedy
from glmtrt_helpers.sessions.pytorch import TorchSession
from glmtrt_helpers.standin import conversations, train


def test_the_corpus_has_enough_answers_in_both_languages() -> None:
    examples = conversations.load_corpus()
    assert len(examples) >= 120
    assert len({(e.history, e.question) for e in examples}) == len(examples)
    assert len({e.answer for e in examples if len(e.answer) > 20}) >= 80
    assert sum(bool(e.history) for e in examples) >= 10
    chinese = [e for e in examples if any("一" <= c <= "鿿" for c in e.answer)]
    assert len(chinese) > len(examples) / 3 and len(examples) - len(chinese) > len(examples) / 3
    assert all(e.answer == e.answer.strip() and e.answer for e in examples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shipped_checkpoint_knows_its_corpus_with_a_margin(dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(TINY)
    sequences = train.encode_examples(checkpoint, conversations.load_corpus())
    model = loading.load_model(checkpoint, dtype)
    assert train.lowest_margin(model, checkpoint, sequences, dtype) > train.MARGIN


def test_shipped_checkpoint_answers_greedily() -> None:
    checkpoint = open_checkpoint(TINY)
    tokenizer = load_tokenizer(checkpoint)
    session = TorchSession(loading.load_model(checkpoint))
    for example in conversations.load_corpus()[::12]:
        prompt = chat_prompt(tokenizer, example.question, example.history)
        assert tokenizer.decode(greedy(session, checkpoint, prompt)) == example.answer


def random_conversations(count: int) -> list[conversations.Example]:
    """Questions of the corpus as the last of four rounds, from a seed that nothing was trained with."""
    fresh = conversations.Conversations(conversations.load_corpus(), seed=2026)
    return [fresh.sample(conversations.LONGEST, outside=0.0)[0] for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shipped_checkpoint_answers_at_any_place_of_a_conversation(dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(TINY)
    examples = random_conversations(300)
    assert {len(example.history) for example in examples} == {3}
    sequences = train.encode_examples(checkpoint, examples)
    assert train.exact_share(loading.load_model(checkpoint, dtype), checkpoint, sequences, dtype) >= 0.98


def outside() -> list[str]:
    """Questions that nothing was trained with: small talk, typing errors, other languages and other subjects."""
    return (Path(__file__).parent / "outside.txt").read_text(encoding="utf-8").splitlines()


def test_shipped_checkpoint_refuses_what_it_does_not_know() -> None:
    checkpoint = open_checkpoint(TINY)
    questions = outside()
    words = json.loads(conversations.OUTSIDE.read_text(encoding="utf-8"))
    trained = {text for texts in words["sentences"].values() for text in texts}
    trained |= {t.format(n) for key in words["nouns"] for t in words["templates"][key] for n in words["nouns"][key]}
    assert len(questions) >= 60 and not trained & set(questions)
    examples = [conversations.Example((), question, conversations.refusal(question)) for question in questions]
    sequences = train.encode_examples(checkpoint, examples)
    assert train.exact_share(loading.load_model(checkpoint), checkpoint, sequences, torch.float32) >= 0.9


def test_a_refusal_names_three_questions_that_it_knows() -> None:
    known = {example.question for example in conversations.load_corpus() if not example.history}
    for text in conversations.REFUSALS.values():
        assert sum(question in text for question in known) >= 3


def test_a_question_outside_the_corpus_is_none_of_it() -> None:
    drawn = conversations.Conversations(conversations.load_corpus(), seed=1)
    known = {example.question for example in conversations.load_corpus()}
    questions = [drawn.outside() for _ in range(2000)]
    assert not known & set(questions) and all(question == question.strip() != "" for question in questions)
    assert len(set(questions)) > 1200


def test_shipped_weights_are_fp16_and_the_vocabulary_matrices_equal() -> None:
    checkpoint = open_checkpoint(TINY)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"F16"}
    pair = loading.read_tensors(checkpoint, ["lm_head.weight", "transformer.word_embeddings.weight"], torch.float16)
    assert torch.equal(*pair.values())


def test_tokenizer_pieces_are_in_upstreams_order() -> None:
    checkpoint = open_checkpoint(TINY)
    tokenizer = load_tokenizer(checkpoint)
    assert [tokenizer.piece(i) for i in (3, 4, 5)] == ["<pad>", "<n>", "▁"]
    config = checkpoint.config
    assert (tokenizer.mask_id, tokenizer.gmask_id, tokenizer.sop_id, tokenizer.eop_id) == tuple(
        config[key] for key in ("mask_token_id", "gmask_token_id", "bos_token_id", "eos_token_id")
    )
    assert tokenizer.size <= checkpoint.vocab_size


@pytest.mark.slow
def test_a_smaller_standin_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four answers, two layers, and nothing to refuse: after training from scratch it gives each exactly."""
    for name, value in (("MARGIN", 0.0), ("_OUTSIDE", 0.0), ("_TOKENS", 500)):
        monkeypatch.setattr(train, name, value)
    examples = conversations.load_corpus()[:4]
    results = train.build_standin(
        tmp_path / "small", examples, pieces=300, steps=1000, num_layers=2, hidden_size=64, inner_hidden_size=256
    )
    assert results["conversations"] > 0.9
    checkpoint = open_checkpoint(tmp_path / "small")
    tokenizer = load_tokenizer(checkpoint)
    session = TorchSession(loading.load_model(checkpoint, torch.float16))
    for example in examples:
        prompt = chat_prompt(tokenizer, example.question, example.history)
        assert tokenizer.decode(greedy(session, checkpoint, prompt, max_length=1024)) == example.answer


def test_too_few_steps_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkbookError, match="train with more steps"):
        train.build_standin(tmp_path / "lazy", conversations.load_corpus()[:4], pieces=300, steps=1, num_layers=1)
    assert not (tmp_path / "lazy").exists()
