"""Remote code that is about to run: said once, with the hash by which it can be told from another revision."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.records import check_regular
from glmtrt_helpers.core.text import tell

CODE_NAME = "modeling_chatglm.py"
_announced: set[str] = set()
_LOCAL_CLASS = re.compile(r"[^\W\d]\w*\.[^\W\d]\w*")  # module.Class


def code_files(directory: Path) -> list[Path]:
    """Every Python source that remote code in `directory` can import from there, packages in it included.

    Raises WorkbookError for one that is no regular file: reading it might not end.
    """
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if name.isidentifier() and name != "__pycache__"]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    for file in found:
        check_regular(file)
    return sorted(found)


def code_sha256(source: Path, directory: Path | None = None) -> str:
    """SHA-256 of a model's source and of all code beside it that it can import; `announce` prints how it begins.

    source: `modeling_chatglm.py`, or what runs in its place, such as the `.orig` that patching keeps. directory: of the
    code that it imports, its own by default. Hashed are name, size and bytes of each file, in the order of the names.
    """
    directory = directory or source.parent
    main = directory / CODE_NAME
    check_regular(source)
    digest = hashlib.sha256()
    for file in sorted({main, *code_files(directory)}):
        content = (source if file == main else file).read_bytes()
        digest.update(f"{file.relative_to(directory).as_posix()}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
    return digest.hexdigest()


def announce(source: Path, directory: Path | None = None) -> None:
    """Print, once for each text, that remote code is about to run, where it is and what its hash is."""
    sha256 = code_sha256(source, directory)
    if sha256 not in _announced:
        _announced.add(sha256)
        tell(f"Running remote code from {source} (sha256 {sha256[:16]}...); nothing is downloaded.")


def check_auto_map(directory: Path) -> None:
    """Raise WorkbookError for an `auto_map` that names code elsewhere, which transformers would fetch and run.

    To be called before any of transformers' Auto classes gets `trust_remote_code`; the workbook's own loader follows no
    `auto_map`. "owner/name--module.Class" is a class of another repository.
    """
    for file in sorted(directory.glob("*.json")):
        check_regular(file)
        try:
            # not `records.read`, which refuses some of what transformers would read
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            continue  # transformers cannot read it either
        for reference in _references(content.get("auto_map") if isinstance(content, dict) else None):
            if not _LOCAL_CLASS.fullmatch(reference):
                raise WorkbookError(
                    f"{file}: auto_map names {reference!r}, code that is not in this folder; nothing was loaded: copy "
                    'that source here and name it as "module.Class", or load the checkpoint without auto classes.'
                )


def _references(auto_map: Any) -> list[str]:
    """Every class that an auto_map names: under a key, in a list (slow and fast tokenizer), or alone."""
    if isinstance(auto_map, dict | list):
        values = auto_map.values() if isinstance(auto_map, dict) else auto_map
        return [reference for value in values for reference in _references(value)]
    return [] if auto_map is None else [str(auto_map)]
