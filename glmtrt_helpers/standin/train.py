"""Train the stand-in: a sentencepiece model and a small ChatGLM-6B that knows its corpus by heart.

Training continues until greedy decoding gives every answer exactly, in fp32 and in fp16, and the largest logit of every
step leads the second by more than `MARGIN`, so that tokens can be compared across backends.
"""

import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sentencepiece import sentencepiece_model_pb2
from torch.nn import functional

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import Tokenizer, load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.examples import prompt_inputs
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.standin import build

CORPUS = Path(__file__).parent / "corpus.jsonl"
MARGIN = 1.0
_TARGET_MARGIN = 2.5  # higher than MARGIN, which must hold after rounding to fp16
_SIZES = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "inner_hidden_size": 512,
    "max_sequence_length": 2048,
}
Rounds = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Example:
    """One answer to learn: the rounds before it, the question, and the answer's text."""

    history: tuple[tuple[str, str], ...]
    question: str
    answer: str


def load_corpus(path: Path = CORPUS) -> list[Example]:
    """Every answer of the corpus with its history, in file order."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        rounds = [(question, answer) for question, answer in json.loads(line)["rounds"]]
        examples += [Example(tuple(rounds[:i]), *rounds[i]) for i in range(len(rounds))]
    return list(dict.fromkeys(examples))


def train_tokenizer(examples: Sequence[Example], pieces: int) -> sentencepiece_model_pb2.ModelProto:
    """A sentencepiece model of at most `pieces` plain pieces, in upstream's order: <pad> 3, <n> 4, "▁" 5.

    A character that occurs only once in the corpus gets no piece, so it is encoded in bytes.
    """
    texts = [text for example in examples for text in (example.question, example.answer)]
    texts += ["[Round 0]\n问：\n答：", "[Round 1]\n问：\n答："] * 2
    characters = Counter("".join(texts))
    rare = {character for character, count in characters.items() if count < 2 and ord(character) > 127}
    lines = []
    for text in texts:
        for line in text.replace("\t", "\n").split("\n"):
            lines.append("".join(" " if character in rare else character for character in line))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        pad_id=3,
        user_defined_symbols=["<n>"],
        num_threads=1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    plain = sorted(proto.pieces[5:], key=lambda piece: piece.piece != "▁")
    del proto.pieces[5:]
    proto.pieces.extend(plain)
    return proto


def encode_examples(checkpoint: Checkpoint, examples: Sequence[Example]) -> list[list[int]]:
    """Token ids of prompt, answer and <eop> for each example."""
    tokenizer = load_tokenizer(checkpoint)
    return [
        chat_prompt(tokenizer, example.question, example.history) + answer_ids(tokenizer, example.answer)
        for example in examples
    ]


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Token ids of an answer, with <eop>."""
    return [*tokenizer.encode_text(answer), tokenizer.eop_id]


def _batch(checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    flat = prompt_inputs(checkpoint, sequences, dtype)
    return {name: tensor for name, tensor in flat.items() if not name.startswith("past")}


def _targets(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """The token that each position must predict, (batch, S); -100 before <sop>, in the padding and at the end."""
    after_sop = (ids == int(checkpoint.config["bos_token_id"])).cumsum(1) > 0
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    return torch.where(after_sop, following, -100)


def lowest_margin(
    model: torch.nn.Module, checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], dtype: torch.dtype
) -> float:
    """The smallest difference, over every step of every answer, between the right token's logit and the next best.

    Positive: greedy decoding gives every answer exactly.
    """
    worst = float("inf")
    with torch.inference_mode():
        for start in range(0, len(sequences), 16):
            flat = _batch(checkpoint, sequences[start : start + 16], dtype)
            logits = model(**flat, return_dict=False)[0].float()
            targets = _targets(checkpoint, flat["input_ids"])
            logits, targets = logits[targets >= 0], targets[targets >= 0]
            right = logits.gather(1, targets[:, None])[:, 0]
            others = logits.scatter(1, targets[:, None], float("-inf")).amax(dim=1)
            worst = min(worst, float((right - others).min()))
    return worst


def build_standin(
    directory: Path,
    examples: Sequence[Example] | None = None,
    *,
    pieces: int = 1400,
    max_epochs: int = 400,
    seed: int = 0,
    **sizes: int,
) -> dict[str, float]:
    """Train a stand-in on `examples` (the whole corpus by default) and write it to `directory`.

    Returns the lowest margins {"fp32": ..., "fp16": ...}. A former stand-in is replaced when the new one is whole.
    Raises WorkbookError if they do not exceed `MARGIN`, and for a folder that holds something else.
    """
    examples = load_corpus() if examples is None else examples
    with build.new_checkpoint(directory) as folder:
        return _train(folder, examples, pieces, max_epochs, seed, sizes)


def _train(
    directory: Path, examples: Sequence[Example], pieces: int, max_epochs: int, seed: int, sizes: dict[str, int]
) -> dict[str, float]:
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(examples, pieces)
    config = build.make_config(len(tokenizer.pieces), **(_SIZES | sizes))
    weights = build.random_weights(config, seed)
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
    build.write_checkpoint(directory, config, weights, tokenizer)

    checkpoint = open_checkpoint(directory)
    model: Any = loading.load_model(checkpoint, torch.float32)
    model.lm_head.weight = model.transformer.word_embeddings.weight  # as in upstream's weights
    sequences = encode_examples(checkpoint, examples)
    _fit(model, checkpoint, sequences, max_epochs, seed)

    weights = {name: tensor.detach().half() for name, tensor in model.state_dict().items() if "inv_freq" not in name}
    build.write_checkpoint(directory, config, weights, tokenizer)
    margins = {}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        trained = loading.load_model(open_checkpoint(directory), dtype)
        margins[name] = lowest_margin(trained, checkpoint, sequences, dtype)
        if margins[name] <= MARGIN:
            raise WorkbookError(
                f"after training the lowest margin in {name} is {margins[name]:.2f}, it must exceed "
                f"{MARGIN}, so nothing is written: raise max_epochs."
            )
    return margins


def _fit(
    model: torch.nn.Module, checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], max_epochs: int, seed: int
) -> None:
    """AdamW until the lowest margin exceeds the target; answers of similar length share a batch."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    groups = [[sequences[i] for i in order[at : at + 8]] for at in range(0, len(order), 8)]
    batches = [_batch(checkpoint, group, torch.float32) for group in groups]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = 4 * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    shuffle = random.Random(seed)
    columns = (TextColumn("[bold]training"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=max_epochs)
        for epoch in range(max_epochs):
            total = 0.0
            for flat in shuffle.sample(batches, len(batches)):
                logits = model(**flat, return_dict=False)[0]
                targets = _targets(checkpoint, flat["input_ids"])
                loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                total += loss.item()
            mean = total / len(batches)
            progress.update(task, advance=1, description=f"epoch {epoch + 1}, loss {mean:.4f}")
            if mean < 0.02 and epoch % 5 == 0:
                margin = lowest_margin(model, checkpoint, sequences, torch.float32)
                progress.update(task, description=f"epoch {epoch + 1}, loss {mean:.4f}, lowest margin {margin:.2f}")
                if margin > _TARGET_MARGIN:
                    return
