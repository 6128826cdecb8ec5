"""Open a ChatGLM-6B checkpoint and check it before anything runs.

A checkpoint is a directory: `config.json`, the remote code, `ice_text.model` and weight shards. `open_checkpoint` reads
configuration and shard headers only; `loading` reads weights and runs the remote code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glmtrt_helpers.checkpoints import packing, shards
from glmtrt_helpers.checkpoints.code_hash import CODE_NAME
from glmtrt_helpers.checkpoints.config import RANDOM_KEY, expected_shapes, read_config
from glmtrt_helpers.checkpoints.packing import Packing
from glmtrt_helpers.checkpoints.shards import StoredTensor
from glmtrt_helpers.core.errors import WorkbookError

BACKUP_NAME = CODE_NAME + ".orig"
# With more bytes of weights than this, a laptop cannot hold the model in fp32: it is streamed or run in slices.
LARGE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint. Sizes follow `config.json`; `tensors` maps state-dict names to where their bytes lie.

    packed: how the weights of 8 and 4 bits are stored, by name; their scales are in `tensors`, too.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    packed: Mapping[str, Packing] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def code(self) -> Path:
        return self.directory / CODE_NAME

    @property
    def pristine_code(self) -> Path:
        """The source as it came: the backup that patching keeps, or the source itself where nothing was patched."""
        backup = self.directory / BACKUP_NAME
        return backup if backup.exists() else self.code

    @property
    def num_layers(self) -> int:
        return int(self.config["num_layers"])

    @property
    def hidden_size(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def num_heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def max_length(self) -> int:
        return int(self.config.get("max_sequence_length", 2048))

    def first_layers(self, count: int) -> Checkpoint:
        """The same checkpoint as a model of its first layers only: to compare at full width with less memory."""
        return replace(self, config={**self.config, "num_layers": min(count, self.num_layers)})

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_large(self) -> bool:
        return self.weight_bytes > LARGE_BYTES

    @property
    def is_random(self) -> bool:
        """Whether `glmtrt standin --size` wrote it: good for measuring, but its answers mean nothing."""
        return bool(self.config.get(RANDOM_KEY))

    @property
    def graph_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight in an exported graph: packed ones are stored as they are multiplied, (k, n)."""
        shapes = expected_shapes(self.config)
        return {name: shape[::-1] if name in self.packed else shape for name, shape in shapes.items()}

    @property
    def is_safetensors(self) -> bool:
        return all(tensor.offset is not None for tensor in self.tensors.values())


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Check a directory and describe it. Reads no weights and runs no code.

    Raises WorkbookError, naming the file, for a directory or file that is missing or damaged, another model family, a
    P-tuned checkpoint or one that is quantised in a way not known here, a missing or truncated shard, a missing tensor
    or scale, and a tensor of the wrong shape or dtype.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise WorkbookError(f"{directory} is not a directory: give the folder that holds the checkpoint's config.json.")
    config = read_config(directory / "config.json")
    if not (directory / CODE_NAME).exists():
        raise WorkbookError(
            f"{directory / CODE_NAME} is missing: it comes with the checkpoint and defines the model, copy it there."
        )
    tensors = shards.locate_tensors(directory)
    _check_others(directory, config, tensors)
    packed = packing.packings(tensors, expected_shapes(config))
    _check_shapes(directory, config, tensors, packed)
    return Checkpoint(directory, config, tensors, packed)


# What the names of tensors that the model does not read say about a checkpoint.
_OTHERS = {
    ".lora_": "of a LoRA that was not merged, so that the weights are not those of any model: merge it and save again",
    "_scale": "the scales of a quantised weight, but that weight is not quantised: take all shards from one checkpoint",
    "transformer.layers.": "of a layer that config.json does not have: take both from one checkpoint",
}


def _unread(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Stored names that the model does not read; inv_freq, which is computed, is stored with its weights."""
    weights = expected_shapes(config).keys()
    scales = {packing.scale_name(name) for name in weights & tensors.keys() if tensors[name].dtype in packing.PACKED}
    return sorted(name for name in tensors.keys() - weights - scales if not name.endswith("inv_freq"))


def _check_others(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    for name in _unread(config, tensors):
        for part, says in _OTHERS.items():
            if part in name:
                raise WorkbookError(f"{tensors[name].file} holds {name!r}, {says}.")
    expected = (int(config["hidden_size"]) // int(config["num_attention_heads"]) // 4,)
    for name, tensor in tensors.items():
        if name.endswith("inv_freq") and tensor.shape != expected:
            raise WorkbookError(
                f"{tensor.file}: {name!r} has shape {tensor.shape}, and {config['num_attention_heads']} heads call for "
                f"{expected}: num_attention_heads in config.json is that of another checkpoint."
            )


def unread_note(checkpoint: Checkpoint) -> str:
    """What lies in a checkpoint's folder and has no effect on the model; "" where there is nothing of that kind."""
    adapter = checkpoint.directory / "adapter_config.json"
    if adapter.exists():
        return f"{adapter} describes an adapter, which is not applied: merge it into the weights to use it."
    unread = _unread(checkpoint.config, checkpoint.tensors)
    if not unread:
        return ""
    more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
    return f"{checkpoint.directory} holds {unread[0]!r}{more}, which this model does not read."


def _check_shapes(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], packed: Mapping[str, Packing]
) -> None:
    declared = config.get("quantization_bit") or 0
    for name, shape in expected_shapes(config).items():
        if name not in tensors:
            raise WorkbookError(
                f"{directory} holds no tensor {name!r}, which config.json calls for: a shard is missing or belongs to "
                "another model."
            )
        if name in packed:
            if name.startswith("transformer.layers.") and packed[name].bits != declared:
                raise WorkbookError(
                    f"{tensors[name].file}: {name!r} is packed in {packed[name].bits} bits, and config.json has "
                    f"quantization_bit {declared}: take configuration and weights from one checkpoint."
                )
            continue
        if tensors[name].shape != shape:
            raise WorkbookError(
                f"{tensors[name].file}: {name!r} has shape {tensors[name].shape}, config.json calls for {shape}: "
                "configuration and weights belong to different checkpoints."
            )
        if tensors[name].dtype not in shards.FLOATS:
            raise WorkbookError(
                f"{tensors[name].file}: {name!r} is {tensors[name].dtype}, and a weight of this model is one of "
                f"{', '.join(shards.FLOATS)}, or packed with its scale: download that shard again."
            )


def shares_vocabulary(checkpoint: Checkpoint) -> bool:
    """Whether lm_head equals the embedding, as in upstream's checkpoint: TensorRT keeps one copy. Reads 64 samples."""
    first, second = (checkpoint.tensors[f"{name}.weight"] for name in ("transformer.word_embeddings", "lm_head"))
    if first == second:
        return True
    if first.offset is None or second.offset is None or first.dtype != second.dtype:
        return False
    try:
        with first.file.open("rb") as one, second.file.open("rb") as other:
            for part in range(64):
                position = first.nbytes * part // 64
                one.seek(first.offset + position)
                other.seek(second.offset + position)
                if one.read(4096) != other.read(4096):
                    return False
    except FileNotFoundError as error:
        raise WorkbookError(f"{error.filename} was removed while it was being read: put the shard back.") from error
    return True
