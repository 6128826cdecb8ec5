"""The working copy: what is copied, cloned, linked and kept, and where nothing is written."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import SHARD, make_random, to_bin
from support.command_line import InProcess

from glmtrt_helpers.checkpoints import shards, working_copy
from glmtrt_helpers.checkpoints.checkpoint import BACKUP_NAME, open_checkpoint
from glmtrt_helpers.checkpoints.code_hash import CODE_NAME
from glmtrt_helpers.checkpoints.working_copy import hard_links_note, is_working_copy, make_working_copy
from glmtrt_helpers.core.artifacts import MARKER
from glmtrt_helpers.core.errors import WorkbookError


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards count as large, on a file system that cannot share blocks."""
    monkeypatch.setattr(working_copy, "LINK_BYTES", 50_000)
    monkeypatch.setattr(working_copy, "_clone", lambda file, copy: False)


@pytest.mark.usefixtures("links")
def test_working_copy_copies_links_and_keeps_patches(tiny_random: Path) -> None:
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


@pytest.mark.usefixtures("links")
def test_working_copy_resolves_symbolic_links(tiny_random: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "chatglm"
    cache.mkdir(parents=True)
    for file in tiny_random.iterdir():
        (cache / file.name).symlink_to(file)
    copy = make_working_copy(cache)
    assert not (copy / SHARD).is_symlink() and (copy / SHARD).samefile(tiny_random / SHARD)


@pytest.mark.usefixtures("links")
def test_hard_links_are_told_and_a_full_copy_has_none(tiny_random: Path) -> None:
    copy = make_working_copy(tiny_random)
    note = hard_links_note(open_checkpoint(copy))
    assert str(copy / SHARD) in note and "multiple hard links" in note and "glmtrt copy --full" in note
    make_working_copy(tiny_random, full=True)
    assert not (copy / SHARD).samefile(tiny_random / SHARD) and not hard_links_note(open_checkpoint(copy))
    inode = (copy / SHARD).stat().st_ino
    make_working_copy(tiny_random)
    assert (copy / SHARD).stat().st_ino == inode, "a full copy that is up to date stays"
    save_file({name: tensor + 1 for name, tensor in load_file(tiny_random / SHARD).items()}, tiny_random / SHARD)
    make_working_copy(tiny_random)
    assert (copy / SHARD).read_bytes() == (tiny_random / SHARD).read_bytes()


def test_a_file_system_that_can_shares_blocks(tiny_random: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_copy, "LINK_BYTES", 50_000)
    asked = []

    def ioctl(target: int, request: int, source: int) -> None:
        asked.append(request)
        os.write(target, os.read(source, 10**8))

    monkeypatch.setattr(working_copy.fcntl, "ioctl", ioctl)
    copy = make_working_copy(tiny_random)
    assert len(asked) == 2 and (copy / SHARD).read_bytes() == (tiny_random / SHARD).read_bytes()
    assert not hard_links_note(open_checkpoint(copy))
    make_working_copy(tiny_random)
    assert len(asked) == 2, "what is up to date is not cloned again"


def test_a_path_without_a_name_is_resolved_first(tiny_random: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny_random / "inside").mkdir()
    for where, source in ((tiny_random, "."), (tiny_random / "inside", ".."), (tiny_random, "inside/..")):
        monkeypatch.chdir(where)
        before = files(tiny_random)
        assert make_working_copy(source) == tiny_random.parent / "run" / tiny_random.name
        assert files(tiny_random) == before


def test_a_checkpoint_that_lies_in_a_folder_called_run_is_not_a_working_copy(tmp_path: Path) -> None:
    real = make_random(tmp_path / "run" / "chatglm_6b")
    copy = make_working_copy(real)
    assert copy == tmp_path / "run" / "run" / "chatglm_6b" and is_working_copy(copy) and not is_working_copy(real)
    with pytest.raises(WorkbookError, match="would lie inside it"):
        make_working_copy(make_random(tmp_path / "run"))


@pytest.mark.parametrize("content", ["config.json", "notes.txt", "other checkpoint"])
def test_a_folder_of_somebody_elses_is_not_written(tiny_random: Path, content: str) -> None:
    target = tiny_random.parent / "run" / tiny_random.name
    if content == "other checkpoint":
        make_random(target, seed=1)
    else:
        target.mkdir(parents=True)
        (target / content).write_text("{}")
    before = files(tiny_random.parent)
    with pytest.raises(WorkbookError, match=r"run/chatglm_random holds files and no .*: move it away"):
        make_working_copy(tiny_random)
    assert files(tiny_random.parent) == before


@pytest.mark.parametrize("name", ["run", "run/chatglm_random"])
def test_a_file_in_the_way_is_named(tiny_random: Path, name: str) -> None:
    blocked = tiny_random.parent / name
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("mine")
    with pytest.raises(WorkbookError, match="a file is in its way"):
        make_working_copy(tiny_random)
    assert blocked.read_text() == "mine"


def test_an_empty_folder_and_one_that_a_killed_run_left_are_written(tiny_random: Path) -> None:
    target = tiny_random.parent / "run" / tiny_random.name
    target.mkdir(parents=True)
    (target / f".{MARKER}.999999999.tmp").write_text("{")
    assert is_working_copy(make_working_copy(tiny_random))


def test_a_working_copy_from_before_the_marker_is_recognised_by_its_contents(tiny_random: Path) -> None:
    copy = make_working_copy(tiny_random)
    (copy / MARKER).unlink()
    (copy / BACKUP_NAME).write_bytes((copy / CODE_NAME).read_bytes())
    (copy / CODE_NAME).write_text("# patched\n")
    (copy / "model.fp16.onnx").write_text("an export")
    before = files(copy)
    assert make_working_copy(tiny_random) == copy
    assert files(copy) == {**before, MARKER: (copy / MARKER).read_bytes()}


def test_a_refreshed_copy_mirrors_its_source_and_keeps_what_the_steps_made(tiny_random: Path) -> None:
    (tiny_random / "extra_code.py").write_text("x = 1\n")
    copy = make_working_copy(tiny_random)
    made = {"inputs.json": b"{}", "model.fp16.onnx": b"an export", "model.fp16.plan": b"an engine"}
    for name, data in made.items():
        (copy / name).write_bytes(data)
    whole = {name: tensor for file in tiny_random.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in (*tiny_random.glob("model[-.]*"), tiny_random / "extra_code.py"):
        file.unlink()
    save_file(whole, tiny_random / "model.safetensors", metadata={"format": "pt"})
    make_working_copy(tiny_random)
    assert files(copy) == {**files(tiny_random), **made, MARKER: (copy / MARKER).read_bytes()}


def test_shards_that_were_streamed_from_bin_ones_go_when_those_go(tiny_random: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(tiny_random, tmp_path / "whole"))
    to_bin(tiny_random)
    copy = make_working_copy(tiny_random)
    shards.to_safetensors(copy)
    streamed = files(copy)
    make_working_copy(tiny_random)
    assert files(copy) == streamed, "as long as the .bin shards are the same"
    for file in tiny_random.glob("pytorch_model*"):
        file.unlink()
    whole_state = {name: t for file in whole.glob("*.safetensors") for name, t in load_file(file).items()}
    save_file(whole_state, tiny_random / "model.safetensors", metadata={"format": "pt"})
    make_working_copy(tiny_random)
    assert files(copy) == {**files(tiny_random), MARKER: (copy / MARKER).read_bytes()}


@pytest.mark.parametrize("files_text", ["3", '{"../kept": 3}', '{"../kept": ""}', '["../kept"]', "{", None])
def test_a_damaged_marker_removes_nothing(tiny_random: Path, files_text: str | None) -> None:
    copy = make_working_copy(tiny_random)
    (copy / MARKER).write_text(f'{{"files": {files_text}}}' if files_text else "")
    kept, stranger = copy.parent / "kept", copy / "mine.txt"
    kept.write_text("kept")
    stranger.write_text("mine")
    make_working_copy(tiny_random)
    assert kept.exists() and stranger.exists()
    assert set(json.loads((copy / MARKER).read_text())["files"]) == set(files(tiny_random))


@pytest.mark.parametrize(
    ("name", "source"),
    [(CODE_NAME, "unchanged"), (CODE_NAME, "changed"), ("config.json", "changed"), ("quantization.py", "gone")],
)
def test_a_file_of_the_copy_that_was_changed_by_hand_is_kept(
    tiny_random: Path, capsys: pytest.CaptureFixture[str], name: str, source: str
) -> None:
    copy, original = make_working_copy(tiny_random), tiny_random / name
    (copy / name).write_text("my edit\n")
    if source == "changed":
        original.write_bytes(original.read_bytes() + b"\n")
    elif source == "gone":
        original.unlink()
    make_working_copy(tiny_random)
    assert (copy / f"{name}.edited").read_text() == "my edit\n"
    assert f"kept as {copy / name}.edited" in capsys.readouterr().err
    assert files(tiny_random).items() <= files(copy).items() and (copy / name).exists() == (source != "gone")
    (copy / name).write_text("another\n")
    make_working_copy(tiny_random)
    assert (copy / f"{name}.edited").read_text() == "my edit\n", "an earlier one is not replaced"
    assert source == "gone" or (copy / f"{name}.edited2").read_text() == "another\n"


def test_a_file_that_only_the_checkpoint_changed_is_replaced_without_a_word(
    tiny_random: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = make_working_copy(tiny_random)
    for name in (CODE_NAME, "config.json"):
        (tiny_random / name).write_bytes((tiny_random / name).read_bytes() + b"\n")
    (tiny_random / "quantization.py").unlink()
    make_working_copy(tiny_random)
    assert files(copy) == {**files(tiny_random), MARKER: (copy / MARKER).read_bytes()}
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.usefixtures("links")
def test_copy_and_export_tell_of_hard_links(tiny_random: Path, glmtrt: InProcess) -> None:
    """At both, because a copy may have been made long before."""
    status, lines = glmtrt("copy", tiny_random)
    copy = tiny_random.parent / "run" / tiny_random.name
    assert status == 0 and "multiple hard links" in lines[-1] and str(copy / SHARD) in lines[-1], lines
    assert glmtrt("patch", copy) == (0, [])
    status, lines = glmtrt("export", copy)
    assert status == 0 and "multiple hard links" in lines[-1] and str(copy / SHARD) in lines[-1], lines
    status, lines = glmtrt("copy", tiny_random, "--full")
    assert status == 0 and not any("hard link" in line for line in lines)
    status, lines = glmtrt("export", copy)
    assert status == 0 and not any("hard link" in line for line in lines)
