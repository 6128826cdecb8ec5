"""Remote code that is about to run: said once, with the hash by which it can be told from another revision."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

_announced: set[str] = set()


def code_sha256(path: Path) -> str:
    """SHA-256 of a source file; `announce` prints how it begins."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def announce(source: Path) -> None:
    """Print, once for each text, that remote code is about to run, where it is and what its hash is."""
    sha256 = code_sha256(source)
    if sha256 not in _announced:
        _announced.add(sha256)
        print(f"Running remote code from {source} (sha256 {sha256[:16]}...); nothing is downloaded.", file=sys.stderr)
