"""Train the stand-in: a sentencepiece model and a small ChatGLM-6B that knows its corpus by heart.

It gives every answer at any place of a conversation, and refuses other questions. Greedy decoding gives every answer of
the corpus exactly, in fp32 and in fp16, and the largest logit of every step leads the second by more than `MARGIN`, so
that tokens can be compared across backends.
"""

import io
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sentencepiece import sentencepiece_model_pb2
from torch.nn import functional

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import Tokenizer, load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.examples import prompt_inputs
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.standin import build
from glmtrt_helpers.standin.conversations import LONGEST, REFUSALS, Conversations, Example, load_corpus

MARGIN = 1.0
STEPS = 7500  # 3,500 were too few for the margin
_TOKENS = 1600  # of a batch, about
_POOL = 256  # conversations that are sorted by length and cut into batches at a time
_OUTSIDE = 0.3  # part of the questions that are none of the corpus
_PEAK = 2e-3  # learning rate
_SIZES = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "inner_hidden_size": 512,
    "max_sequence_length": 2048,
}


def train_tokenizer(examples: Sequence[Example], pieces: int) -> sentencepiece_model_pb2.ModelProto:
    """A sentencepiece model of at most `pieces` plain pieces, in upstream's order: <pad> 3, <n> 4, "▁" 5.

    A character that occurs only once in the corpus gets no piece, so it is encoded in bytes.
    """
    texts = [text for example in examples for text in (example.question, example.answer)] + [*REFUSALS.values()] * 2
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
    return min(_margins(model, checkpoint, sequences, dtype))


def _margins(
    model: torch.nn.Module, checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], dtype: torch.dtype
) -> list[float]:
    """The lowest margin of each sequence, in some order."""
    margins: list[float] = []
    ordered = sorted(sequences, key=len)
    with torch.inference_mode():
        for start in range(0, len(ordered), 16):
            flat = _batch(checkpoint, ordered[start : start + 16], dtype)
            logits = model(**flat, return_dict=False)[0].float()
            targets = _targets(checkpoint, flat["input_ids"])
            index = targets.clamp(min=0)[..., None]
            right = logits.gather(2, index)[..., 0]
            others = logits.scatter(2, index, float("-inf")).amax(dim=2)
            margins += (right - others).where(targets >= 0, torch.inf).amin(dim=1).tolist()
    return margins


def exact_share(
    model: torch.nn.Module, checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], dtype: torch.dtype
) -> float:
    """The part of the sequences whose every answer token is the most likely one, so that greedy decoding gives it."""
    return sum(margin > 0 for margin in _margins(model, checkpoint, sequences, dtype)) / len(sequences)


def build_standin(
    directory: Path,
    examples: Sequence[Example] | None = None,
    *,
    pieces: int = 1400,
    steps: int = STEPS,
    seed: int = 0,
    **sizes: int,
) -> dict[str, float]:
    """Train a stand-in on `examples` (the whole corpus by default) and write it to `directory`.

    Returns the lowest margins of the corpus, "fp32" and "fp16", and which part of 100 random "conversations" and of 100
    questions "outside" the corpus it answers exactly. A former stand-in is replaced when the new one is whole.
    Raises WorkbookError if the margins do not exceed `MARGIN`, and for a folder that holds something else.
    """
    examples = load_corpus() if examples is None else examples
    with build.new_checkpoint(directory) as folder:
        return _train(folder, examples, pieces, steps, seed, sizes)


def _train(
    directory: Path, examples: Sequence[Example], pieces: int, steps: int, seed: int, sizes: dict[str, int]
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
    _fit(model, checkpoint, Conversations(examples, seed), steps, seed)

    weights = {name: tensor.detach().half() for name, tensor in model.state_dict().items() if "inv_freq" not in name}
    build.write_checkpoint(directory, config, weights, tokenizer)
    build.write_questions(directory, [example.question for example in examples if not example.history])
    sequences = encode_examples(checkpoint, examples)
    results = {}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        trained = loading.load_model(open_checkpoint(directory), dtype)
        results[name] = lowest_margin(trained, checkpoint, sequences, dtype)
        if results[name] <= MARGIN:
            raise WorkbookError(
                f"after {steps} steps the lowest margin in {name} is {results[name]:.2f}, it must exceed {MARGIN}, so "
                "nothing is written: train with more steps."
            )
    fresh = Conversations(examples, seed + 1)
    for name, outside in (("conversations", 0.0), ("outside", 1.0)):
        drawn = [fresh.sample(1 + number % LONGEST, outside)[0] for number in range(100)]
        results[name] = exact_share(model, checkpoint, encode_examples(checkpoint, drawn), torch.float32)
    return results


def _fit(model: Any, checkpoint: Checkpoint, conversations: Conversations, steps: int, seed: int) -> None:
    """AdamW over random conversations; questions whose answers are not known yet are asked more often."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    shuffle = random.Random(seed)
    # bfloat16 halves the time on processors that compute in it, and would multiply it on others.
    autocast = torch.autocast("cpu", torch.bfloat16, enabled="avx512_bf16" in Path("/proc/cpuinfo").read_text())
    columns = (TextColumn("[bold]training"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    batches: list[list[tuple[list[int], int | None]]] = []
    average = 10.0
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=steps)
        for step in range(steps):
            if not batches:
                batches = _draw(checkpoint, conversations, step / steps, shuffle)
            batch = batches.pop()
            optimizer.param_groups[0]["lr"] = _learning_rate(step, steps)
            flat = _batch(checkpoint, [ids for ids, _ in batch], torch.float32)
            targets = _targets(checkpoint, flat["input_ids"])
            rows = torch.nonzero(targets >= 0)[:, 0]
            with autocast:
                hidden = model.transformer(**flat, return_dict=False)[0].transpose(0, 1)
                logits = model.lm_head(hidden[targets >= 0])  # the vocabulary matrix is needed where an answer is
            losses = functional.cross_entropy(logits.float(), targets[targets >= 0], reduction="none")
            optimizer.zero_grad()
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            of_rows = torch.zeros(len(batch)).index_add(0, rows, losses.detach())
            for loss, (_, number) in zip(of_rows.tolist(), batch, strict=True):
                if number is not None:
                    conversations.weights[number] = 0.7 * conversations.weights[number] + 0.3 * (0.06 + min(loss, 3.0))
            average = 0.98 * average + 0.02 * float(losses.detach().mean())
            progress.update(task, advance=1, description=f"step {step + 1}, loss {average:.4f}")


def _learning_rate(step: int, steps: int) -> float:
    """A short warm-up, then half a cosine to a fiftieth."""
    return _PEAK * min(1.0, (step + 1) / 150) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def _draw(
    checkpoint: Checkpoint, conversations: Conversations, done: float, shuffle: random.Random
) -> list[list[tuple[list[int], int | None]]]:
    """Batches of conversations of similar length; short ones first, since they cost least, then longer ones.

    done: which part of the training is done, 0 to 1.
    """
    chances = (0.65, 0.2, 0.1, 0.05) if done < 0.25 else (0.35, 0.25, 0.2, 0.2)
    rounds = shuffle.choices(range(1, LONGEST + 1), chances, k=_POOL)
    examples, numbers = zip(*(conversations.sample(count, _OUTSIDE) for count in rounds), strict=True)
    drawn = sorted(zip(encode_examples(checkpoint, examples), numbers, strict=True), key=lambda each: len(each[0]))
    batches: list[list[tuple[list[int], int | None]]] = [[]]
    for ids, number in drawn:
        if len(batches[-1]) * len(ids) >= _TOKENS:
            batches.append([])
        batches[-1].append((ids, number))
    shuffle.shuffle(batches)
    return batches
