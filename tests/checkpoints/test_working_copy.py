"""The working copy: what is copied, linked and kept."""

from pathlib import Path

import pytest
from support.checkpoints import SHARD

from glmtrt_helpers.checkpoints import working_copy
from glmtrt_helpers.checkpoints.checkpoint import BACKUP_NAME, CODE_NAME, open_checkpoint
from glmtrt_helpers.checkpoints.working_copy import make_working_copy


def test_working_copy_copies_links_and_keeps_patches(tiny_random: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_copy, "LINK_BYTES", 50_000)
    copy = make_working_copy(tiny_random)
    assert copy == tiny_random.parent / "run" / tiny_random.name
    assert (copy / SHARD).samefile(tiny_random / SHARD)
    assert not (copy / "config.json").samefile(tiny_random / "config.json")
    assert make_working_copy(copy) == copy  # a copy of the copy is itself

    code, backup = copy / CODE_NAME, copy / BACKUP_NAME
    backup.write_bytes(code.read_bytes())
    code.write_text("# patched\n")
    make_working_copy(tiny_random)
    assert code.read_text() == "# patched\n"
    assert open_checkpoint(copy).pristine_code == backup
    (tiny_random / CODE_NAME).write_text("# a newer revision\n")
    make_working_copy(tiny_random)
    assert code.read_text() == "# a newer revision\n" and not backup.exists()


def test_working_copy_resolves_symbolic_links(
    tiny_random: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_copy, "LINK_BYTES", 50_000)
    cache = tmp_path / "hub" / "chatglm"
    cache.mkdir(parents=True)
    for file in tiny_random.iterdir():
        (cache / file.name).symlink_to(file)
    copy = make_working_copy(cache)
    assert not (copy / SHARD).is_symlink() and (copy / SHARD).samefile(tiny_random / SHARD)
