"""Write a checkpoint of random weights at a size worth measuring, up to the real one, in a fraction of its memory.

Files, tensor names, shapes and shards are upstream's. The weights are scaled so that the model is numerically like a
trained one: a linear layer's outputs have a standard deviation near 1, nothing comes near the limits of fp16, and
logits differ by more than rounding. The answers mean nothing; `Checkpoint.is_random` marks such a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from pathlib import Path
from string import ascii_lowercase

import torch
from sentencepiece import sentencepiece_model_pb2
from torch.serialization import set_default_mmap_options, skip_data

from glmtrt_helpers.checkpoints import remote_code, shards
from glmtrt_helpers.checkpoints.config import RANDOM_KEY
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import replacing
from glmtrt_helpers.standin import build, conversations, train

# pieces: of the tokenizer, before special tokens and bytes; the rest are fields of config.json.
SIZES: Mapping[str, Mapping[str, int]] = {
    "300m": {
        "pieces": 19_600,
        "vocab_size": 20_000,
        "num_layers": 8,
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "inner_hidden_size": 4096,
        "max_sequence_length": 2048,
    },
    "6b": {
        "pieces": 130_000,
        "vocab_size": 130_528,
        "num_layers": 28,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "inner_hidden_size": 16_384,
        "max_sequence_length": 2048,
    },
}
# Names of a shard and of the index.
FORMATS = {
    "safetensors": ("model-{:05}-of-{:05}.safetensors", "model.safetensors.index.json"),
    "bin": ("pytorch_model-{:05}-of-{:05}.bin", "pytorch_model.bin.index.json"),
}
_SHARDS = 8
_CHUNK = 2**22  # numbers that a thread draws at a time
_INTO_RESIDUAL = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")
_SMALL_FILES = 20_000_000  # bytes of tokenizer and source, at most


def write_random(
    directory: Path,
    size: str = "6b",
    *,
    weights: str = "safetensors",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a complete random checkpoint into `directory`.

    weights: "safetensors", or "bin" for archives as in the download. progress: called with bytes written and total.
    Each tensor is drawn directly into the memory-mapped file, from a generator of its own, so memory depends neither on
    the size nor on the number of threads. A former stand-in is replaced when the new one is whole.
    Raises WorkbookError for an unknown size or format, a folder that holds something else, and a full disk.
    """
    if size not in SIZES:
        raise WorkbookError(f"there is no size {size!r}: choose tiny, {' or '.join(SIZES)}.")
    if weights not in FORMATS:
        raise WorkbookError(f"there is no format {weights!r}: choose {' or '.join(FORMATS)}.")
    fields = dict(SIZES[size])
    pieces = fields.pop("pieces")
    config = build.make_config(pieces, **fields) | {
        "_name_or_path": f"{build.NAME_PREFIX}random-{size}",
        RANDOM_KEY: True,
    }
    shapes = build.stored_shapes(config)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    with build.new_checkpoint(directory) as folder:
        free = shutil.disk_usage(folder).free
        if free < total + _SMALL_FILES:
            raise WorkbookError(
                f"{directory} needs {total / 1e9:.1f} GB and has {free / 1e9:.1f}: free some, or take another disk."
            )
        build.write_files(folder, config, filled_tokenizer(pieces))
        weight_map = _write_shards(folder, FORMATS[weights][0], shapes, seed, _Meter(total, progress))
        with replacing(folder / FORMATS[weights][1]) as temporary:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return directory


class _Meter:
    """Counts the bytes that all threads have written."""

    def __init__(self, total: int, progress: Callable[[int, int], None]):
        self.total, self.progress, self.done = total, progress, 0
        self.lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes
            self.progress(self.done, self.total)


def _write_shards(
    directory: Path, shard_name: str, shapes: Mapping[str, Sequence[int]], seed: int, meter: _Meter
) -> dict[str, str]:
    """Write all shards, each whole or not at all; returns the file of every tensor."""
    weight_map: dict[str, str] = {}
    for number, names in enumerate(build.split(shapes, _SHARDS), 1):
        file = shard_name.format(number, _SHARDS)
        with replacing(directory / file) as temporary:
            mapped = _make_shard(temporary, {name: shapes[name] for name in names})
            pool = ThreadPoolExecutor(os.cpu_count())
            try:
                for future in [pool.submit(_fill, name, tensor, seed, meter) for name, tensor in mapped.items()]:
                    future.result()  # raises what the thread raised
            finally:
                pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest of the shard
            del mapped
        weight_map |= dict.fromkeys(names, file)
    return weight_map


def _make_shard(file: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Create a shard without its data; returns its tensors, mapped so that writing to them writes the file."""
    if ".bin." in file.name:
        with skip_data():
            torch.save({name: torch.empty(*shape, dtype=torch.half) for name, shape in shapes.items()}, file)
        with set_default_mmap_options(mmap.MAP_SHARED):
            return dict(torch.load(file, mmap=True, weights_only=True))
    header = shards.safetensors_header({name: ("F16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()})
    size = len(header) + sum(2 * math.prod(shape) for shape in shapes.values())
    with file.open("wb") as stream:
        stream.write(header)
        os.posix_fallocate(stream.fileno(), 0, size)  # a full disk raises an error here, not a signal later
    mapped = torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)
    tensors, offset = {}, len(header)
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        tensors[name] = mapped[offset : offset + nbytes].view(torch.half).view(*shape)
        offset += nbytes
    return tensors


def _fill(name: str, tensor: torch.Tensor, seed: int, meter: _Meter) -> None:
    """Draw one tensor; the same name, seed and shape give the same numbers."""
    torch.set_num_threads(1)  # for this thread: the work is split by tensor
    if name.endswith("inv_freq"):
        tensor.copy_(remote_code.inv_freq(2 * tensor.numel()))
        meter.add(tensor.nbytes)
        return
    # Upstream stores one matrix under both names.
    drawn_as = "transformer.word_embeddings.weight" if name == "lm_head.weight" else name
    digest = hashlib.sha256(f"{seed} {drawn_as}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6]))
    mean, deviation = (1.0, 0.02) if name.endswith("layernorm.weight") else (0.0, 0.02)
    if tensor.ndim == 2:
        # Layers that write to the residual get a larger deviation: the residual alone would make every token predict
        # itself, because lm_head is the embedding again.
        deviation = (2.7 if name.endswith(_INTO_RESIDUAL) else 1.28) / math.sqrt(tensor.shape[1])
    flat, buffer = tensor.view(-1), torch.empty(_CHUNK)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        part.copy_(buffer[: part.numel()].normal_(mean, deviation, generator=generator))
        meter.add(part.nbytes)


def filled_tokenizer(pieces: int) -> sentencepiece_model_pb2.ModelProto:
    """The stand-in's tokenizer, padded to `pieces` with Chinese characters and invented words of low score."""
    proto = train.train_tokenizer(conversations.load_corpus(), 900)
    present = {piece.piece for piece in proto.pieces}
    characters = map(chr, chain(range(0x4E00, 0xA000), range(0x3400, 0x4DC0), range(0xAC00, 0xD7A4)))
    words = ("▁" + "".join(letters) for letters in product(ascii_lowercase, repeat=4))
    normal = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
    for piece in chain(characters, words):
        if len(proto.pieces) == pieces:
            break
        if piece not in present:
            proto.pieces.add(piece=piece, score=-20.0 - len(proto.pieces) / pieces, type=normal)
    return proto
