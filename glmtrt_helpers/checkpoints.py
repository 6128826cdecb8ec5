"""Notebook 00: open a ChatGLM-6B checkpoint, check it before anything runs, and load it.

A checkpoint is a directory: `config.json`, the remote code, `ice_text.model` and weight shards. `open_checkpoint` reads
configuration and shard headers only; `load_model` runs the remote code, which stays in that directory.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtrt_helpers import configs, shards
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.files import replacing
from glmtrt_helpers.shards import StoredTensor
from glmtrt_helpers.tokenizer import Tokenizer

if TYPE_CHECKING:  # a chat on ONNX Runtime or TensorRT opens checkpoints and needs no PyTorch
    import torch

CODE_NAME = "modeling_chatglm.py"
BACKUP_NAME = CODE_NAME + ".orig"
# Above this size a working copy links instead of copying.
LINK_BYTES = 64 * 2**20
# Above this many bytes of weights, fp32 on a laptop goes layer by layer.
LARGE_BYTES = 2_000_000_000
_announced: set[str] = set()


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint. Sizes follow `config.json`; `tensors` maps state-dict names to where their bytes lie."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

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
        """The same checkpoint as a model of only its first layers: to compare at full width without full memory."""
        return replace(self, config={**self.config, "num_layers": min(count, self.num_layers)})

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_large(self) -> bool:
        return self.weight_bytes > LARGE_BYTES

    @property
    def is_random(self) -> bool:
        """Written by `glmtrt standin --size`: good for measuring, and what it says means nothing."""
        return bool(self.config.get(configs.RANDOM_KEY))

    @property
    def is_safetensors(self) -> bool:
        return all(tensor.offset is not None for tensor in self.tensors.values())


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Check a directory and describe it. Reads no weights and runs no code.

    Raises WorkbookError, naming the file, for: no such directory, a missing or broken file, another model family, a
    quantised or P-tuned checkpoint, an absent or truncated shard, an absent tensor, a tensor of the wrong shape.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise WorkbookError(f"{directory} is not a directory: give the folder that holds the checkpoint's config.json.")
    config = configs.read_config(directory / "config.json")
    if not (directory / CODE_NAME).exists():
        raise WorkbookError(
            f"{directory / CODE_NAME} is missing: it comes with the checkpoint and defines the model, copy it there."
        )
    tensors = shards.locate_tensors(directory)
    _check_shapes(directory, config, tensors)
    return Checkpoint(directory, config, tensors)


def _check_shapes(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    for name, shape in configs.expected_shapes(config).items():
        if name not in tensors:
            raise WorkbookError(
                f"{directory} holds no tensor {name!r}, which config.json calls for: a shard is missing or belongs to "
                "another model."
            )
        if tensors[name].shape != shape:
            raise WorkbookError(
                f"{tensors[name].file}: {name!r} has shape {tensors[name].shape}, config.json calls for {shape}: "
                "configuration and weights belong to different checkpoints."
            )
        if tensors[name].dtype not in shards.FLOATS:
            raise WorkbookError(
                f"{tensors[name].file}: {name!r} is {tensors[name].dtype}, and a weight of this model is one of "
                f"{', '.join(shards.FLOATS)}: download that shard again, or take a checkpoint that is not quantised."
            )


def shares_vocabulary(checkpoint: Checkpoint) -> bool:
    """Whether lm_head equals the embedding, as upstream stores it: TensorRT keeps equal ones once. Reads 64 samples."""
    first, second = (checkpoint.tensors[f"{name}.weight"] for name in ("transformer.word_embeddings", "lm_head"))
    if first.offset is None or second.offset is None or first.dtype != second.dtype:
        return False
    try:
        with first.file.open("rb") as one, second.file.open("rb") as other:
            for part in range(64):
                place = first.nbytes * part // 64
                one.seek(first.offset + place)
                other.seek(second.offset + place)
                if one.read(4096) != other.read(4096):
                    return False
    except FileNotFoundError as error:
        raise WorkbookError(f"{error.filename} was there a moment ago and is gone: put the shard back.") from error
    return True


def code_sha256(path: Path) -> str:
    """SHA-256 of a source file, as `announce` prints it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def announce(source: Path) -> None:
    """Say, once for each text, that remote code is about to run, where it lies and what its hash is."""
    sha256 = code_sha256(source)
    if sha256 not in _announced:
        _announced.add(sha256)
        print(f"Running remote code from {source} (sha256 {sha256[:16]}...); nothing is downloaded.", file=sys.stderr)


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    *,
    code: Path | None = None,
    meta: bool = False,
) -> torch.nn.Module:
    """The checkpoint's own ChatGLMForConditionalGeneration, in eval mode on the CPU.

    dtype: what the weights are cast to, fp32 by default; in the stored dtype they stay mapped from the shards.
    code: another source than the checkpoint's `modeling_chatglm.py`.
    meta: no weights are read, parameters are on the meta device.
    inv_freq is computed, as upstream does it: rounded to fp16, then cast to dtype.
    """
    import torch

    from glmtrt_helpers import compat

    dtype = dtype or torch.float32
    source = code or checkpoint.code
    announce(source)
    model, _ = compat.build_model(checkpoint.directory, source, checkpoint.config, dtype)
    if not meta:
        wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
        unknown = sorted(set(wanted) - set(checkpoint.tensors))
        if unknown:
            raise WorkbookError(
                f"{source} has a parameter {unknown[0]!r} that no shard holds: source and weights differ in kind."
            )
        model.load_state_dict(read_tensors(checkpoint, list(wanted), dtype), strict=False, assign=True)
    return model.eval()


def read_tensors(checkpoint: Checkpoint, names: list[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The named weights as dtype; one that is stored so is a view of the mapped file, not a copy."""
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted({checkpoint.tensors[name].file for name in names}):
        mine = [name for name in names if checkpoint.tensors[name].file == file]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                tensors |= {name: shard.get_tensor(name).to(dtype) for name in mine}
        else:
            state = shards.load_bin(file)
            tensors |= {name: state[name].to(dtype) for name in mine}
    return tensors


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The workbook's tokenizer over the checkpoint's `ice_text.model`, in the ids of its configuration."""
    return Tokenizer(checkpoint.directory / "ice_text.model", int(checkpoint.config["gmask_token_id"]))


def working_copy(source: str | Path, runs: str | Path | None = None) -> Path:
    """Make or refresh `models/run/NAME` beside the checkpoint and return it; the original is never written to.

    Small files are copied, large ones hard-linked to the file that a symbolic link may stand for. A source that was
    patched in the copy stays patched, unless the checkpoint's own source has changed since.
    """
    source = Path(source)
    target = Path(runs) / source.name if runs else source.parent / "run" / source.name
    if source.resolve().parent.name == "run":
        return source
    open_checkpoint(source)
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in source.iterdir() if path.is_file())
    if any(file.suffix == ".bin" and not _is_current(file.resolve(), target / file.name) for file in files):
        _forget_streamed(source, target)
    for file in files:
        real, copy = file.resolve(), target / file.name
        if real.stat().st_size >= LINK_BYTES:
            _link(real, copy)
        elif file.name == CODE_NAME and (target / BACKUP_NAME).exists():
            if (target / BACKUP_NAME).read_bytes() != real.read_bytes():
                (target / BACKUP_NAME).unlink()
                _copy(real, copy)
        elif not copy.exists() or copy.read_bytes() != real.read_bytes():
            _copy(real, copy)
    return target


def _is_current(real: Path, copy: Path) -> bool:
    if not copy.exists() or copy.samefile(real):
        return copy.exists()
    return real.stat().st_size < LINK_BYTES and copy.read_bytes() == real.read_bytes()


def _forget_streamed(source: Path, target: Path) -> None:
    """Remove what was streamed from older `.bin` shards; the index first, without it they count."""
    for file in sorted(target.glob("model*.safetensors*"), reverse=True):
        if not (source / file.name).exists():
            file.unlink()


def _copy(file: Path, copy: Path) -> None:
    with replacing(copy) as temporary:
        shutil.copyfile(file, temporary)


def _link(file: Path, copy: Path) -> None:
    if copy.exists() and copy.samefile(file):
        return
    copy.unlink(missing_ok=True)
    try:
        copy.hardlink_to(file)
    except OSError as error:
        raise WorkbookError(
            f"{copy} cannot be a hard link to {file} ({error.strerror}): keep the checkpoint and its working "
            "copy on one file system, for instance by moving the checkpoint into models/."
        ) from None
