"""Notebook 02: patch the four export blockers in ChatGLM-6B's source.

Each is found by its structure in the syntax tree (libcst), never by a line number or by its text, and only the
statement that has it is rewritten: every other byte stays, comments included.

The source is upstream's `modeling_chatglm.py` (THUDM/chatglm-6b, March to September 2023), the first generation only:
later families share class names but not these statements, and are refused.
"""

import difflib
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from glmtrt_helpers.checkpoints.checkpoint import BACKUP_NAME
from glmtrt_helpers.checkpoints.code_hash import CODE_NAME
from glmtrt_helpers.checkpoints.python_source import naming, read_source
from glmtrt_helpers.core import records
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import free_name, replacing
from glmtrt_helpers.patches.export_blockers import ABSENT, CONSTRUCTS, PATCHED, UNPATCHED, Blocker, inspect_blocker
from glmtrt_helpers.patches.source_tree import ADVICE, Edits, parse


@dataclass(frozen=True)
class Patch:
    """One patch: what it does, why, and the failure that people report without it."""

    name: str
    title: str
    reason: str
    failure: str


PATCHES: tuple[Patch, ...] = (
    Patch(
        "rotary_flatten",
        "the rotary tables are flattened, not squeezed",
        "a Squeeze without axes cannot be inferred where the table's length is dynamic; flatten(1, 2) names the axes "
        "to merge, and on a table (length, 1, d/2) it gives the same numbers",
        "Cannot infer squeeze dimensions from a dynamic shape",
    ),
    Patch(
        "integer_layer_id",
        "layer_id stays a Python int",
        "a tracer records torch.tensor(i) as a constant tensor and must convert it back to a number",
        "TracerWarning: torch.tensor results are registered as constants in the trace",
    ),
    Patch(
        "unconditional_mask_fill",
        "masked_fill always runs",
        "the branch depends on the mask's values: dynamo refuses it, TorchScript keeps only the path its example took; "
        "masked_fill with an all-False mask changes nothing",
        "GuardOnDataDependentSymNode, or attention_mask missing from the inputs (115 tensors instead of 116)",
    ),
    Patch(
        "fixed_rotary_table",
        "the rotary tables have a fixed length and are not cached",
        "a table cached on the module becomes a constant of an earlier call's length, and one as long as the largest "
        "position needs a Range in the dtype of the model",
        "Gather index out of bounds for a longer prompt; a half-precision Range that no runtime supports",
    ),
)
# Where it is absent nothing is left to patch: a fork that passes no layer_id through its loop has no tensor either.
HARMLESS_IF_ABSENT = frozenset({"integer_layer_id"})


def find_blockers(source: str) -> dict[str, Blocker]:
    """State and sites of every blocker, by its patch's name. Raises WorkbookError for what `patch_source` refuses."""
    return {patch.name: inspect_blocker(parse(source), patch.name, Edits(), 0) for patch in PATCHES}


def patch_source(source: str, max_length: int, only: Collection[str] | None = None) -> str:
    """The source with all its blockers patched, or those in `only`; what is patched already stays byte for byte.

    max_length: rows of the rotary tables, the checkpoint's max_sequence_length.
    Raises WorkbookError, naming line and construct, for another model's source, for an ambiguous construct, and for a
    blocker that is neither present nor patched (except those in HARMLESS_IF_ABSENT).
    """
    edits, names = Edits(), _selected(only)
    blockers = {name: inspect_blocker(parse(source), name, edits, max_length) for name in names}
    for name, blocker in blockers.items():
        if blocker.state == ABSENT and name not in HARMLESS_IF_ABSENT:
            raise WorkbookError(f"{CONSTRUCTS[name]} is neither present nor patched ({name}): {ADVICE}.")
    patched = parse(source).rewritten(edits)
    for name, blocker in blockers.items():
        if blocker.state == UNPATCHED and inspect_blocker(parse(patched), name, Edits(), max_length).state != PATCHED:
            site = blocker.sites[0]
            raise WorkbookError(
                f"line {site.line}: {CONSTRUCTS[name]} has a form here that this workbook cannot patch "
                f"({site.text}): {ADVICE}."
            )
    return patched


def _selected(only: Collection[str] | None) -> list[str]:
    names = [patch.name for patch in PATCHES]
    unknown = sorted(set(only or ()) - set(names))
    if unknown:
        raise WorkbookError(f"there is no patch {unknown[0]!r}: choose from {', '.join(names)}.")
    return [name for name in names if only is None or name in only]


def diff_sources(before: str, after: str) -> str:
    """Unified diff of two sources, empty if they are equal."""
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"{CODE_NAME}, before", f"{CODE_NAME}, after"
    )
    return "".join(line if line.endswith("\n") else line + "\n" for line in lines)


def patch_checkpoint(directory: str | Path, only: Collection[str] | None = None) -> list[str]:
    """Patch `modeling_chatglm.py` in a checkpoint's directory and return the names of the patches that it needed.

    The unpatched source is kept as `.orig` beside it.
    Either the whole file is replaced or nothing changes. Raises WorkbookError as `patch_source` does, with the file's
    name, and where the `.orig` beside it belongs to another source.
    """
    path, source = _read(directory)
    backup = path.with_name(BACKUP_NAME)
    blockers, patched = _dry_run(path, source, only)
    if patched != source:
        if not backup.exists():
            _write(backup, source, like=path)
        _write(path, patched, like=path)
    return [name for name in _selected(only) if blockers[name].state == UNPATCHED]


def check_checkpoint(directory: str | Path) -> dict[str, Blocker]:
    """`find_blockers` in a checkpoint's source; changes nothing."""
    path, source = _read(directory)
    with naming(path):
        return find_blockers(source)


def try_patching(directory: str | Path) -> dict[str, Blocker]:
    """`check_checkpoint`, but raises what `patch_checkpoint` would raise; changes nothing, either."""
    path, source = _read(directory)
    return _dry_run(path, source, None)[0]


def _dry_run(path: Path, source: str, only: Collection[str] | None) -> tuple[dict[str, Blocker], str]:
    """The blockers of a source and what patching makes of it."""
    max_length = _max_length(path.with_name("config.json"))
    with naming(path):
        blockers = find_blockers(source)
        patched = patch_source(source, max_length, only)
    backup = path.with_name(BACKUP_NAME)
    if backup.exists() and not _is_backup(backup, source, max_length):
        raise WorkbookError(
            f"{backup} is not the original of {CODE_NAME}, which was replaced or changed by hand: remove "
            f"{backup.name} to keep the file as it is, or run `glmtrt patch {path.parent} --restore`."
        )
    return blockers, patched


def restore_checkpoint(directory: str | Path) -> Path | None:
    """Put the unpatched source back, byte for byte, and remove the backup.

    A patched source that was changed by hand is kept beside it as `.edited`, whose path is returned.
    Raises WorkbookError without a backup, and where the source has none of its patches: then it is another source, such
    as a newer revision, and stays.
    """
    path = Path(directory) / CODE_NAME
    backup = path.with_name(BACKUP_NAME)
    if not backup.exists():
        raise WorkbookError(f"{backup} is missing: nothing was patched here, so there is nothing to restore.")
    edited = None
    if path.exists() and not _is_ours(path, backup):
        edited = free_name(path.with_name(f"{CODE_NAME}.edited"))
        with replacing(edited) as temporary:
            shutil.copy(path, temporary)
    backup.replace(path)
    return edited


def _is_ours(path: Path, backup: Path) -> bool:
    """Whether the source is its backup, patched; False for a hand edit. Raises WorkbookError for another source."""
    for file in (path, backup):
        records.check_regular(file)
    if path.read_bytes() == backup.read_bytes():
        return True
    try:
        source = read_source(path)
        blockers = find_blockers(source)
        if _is_backup(backup, source, _max_length(path.with_name("config.json"))):
            return True
    except WorkbookError:
        return False  # an edit that can no longer be read, or a configuration: nothing says that it is ours
    if all(blocker.state != PATCHED for blocker in blockers.values()):
        raise WorkbookError(
            f"{path} has no patch to undo and {backup.name} holds another source: it was replaced, perhaps by a newer "
            f"revision, and stays; remove {backup.name} to patch it, or rename that to {CODE_NAME} to go back."
        )
    return False


def _read(directory: str | Path) -> tuple[Path, str]:
    path = Path(directory) / CODE_NAME
    try:
        return path, read_source(path)
    except (FileNotFoundError, NotADirectoryError):
        raise WorkbookError(
            f"{path} is missing: it comes with the checkpoint and defines the model, copy it there."
        ) from None


class _Length(msgspec.Struct):
    max_sequence_length: Annotated[int, msgspec.Meta(ge=1, le=2**20)] = 2048


def _max_length(config: Path) -> int:
    """Of a folder that may hold no more of a checkpoint than its source and its configuration."""
    try:
        return records.read(config, _Length, "copy it from the checkpoint again").max_sequence_length
    except FileNotFoundError:
        raise WorkbookError(f"{config} is missing: copy it from the checkpoint again.") from None


def _is_backup(backup: Path, source: str, max_length: int) -> bool:
    """Whether the backup is the source before its patches; if not, restoring would bring back another file."""
    done = [name for name, blocker in find_blockers(source).items() if blocker.state == PATCHED]
    original = read_source(backup)
    with naming(backup):
        return patch_source(original, max_length, done) == source


def _write(path: Path, source: str, like: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(source.encode("utf-8"))
        shutil.copymode(like, temporary)
