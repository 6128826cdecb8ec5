"""The hash of remote code covers all that can run, and nothing else runs."""

import importlib.util
import marshal
import os
import shutil
from pathlib import Path

import pytest
from support.command_line import InProcess
from support.exporting import exported_copy

from glmtrt_helpers.checkpoints import code_hash, loading
from glmtrt_helpers.checkpoints.checkpoint import BACKUP_NAME, open_checkpoint
from glmtrt_helpers.checkpoints.code_hash import CODE_NAME, code_sha256
from glmtrt_helpers.checkpoints.working_copy import make_working_copy
from glmtrt_helpers.core.errors import WorkbookError


@pytest.mark.parametrize(
    "file", [CODE_NAME, "configuration_chatglm.py", "quantization.py", "added.py", "package/__init__.py", "a/b/deep.py"]
)
def test_every_source_that_can_be_imported_counts(tiny_random: Path, file: str) -> None:
    before, path = code_sha256(tiny_random / CODE_NAME), tiny_random / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + "# changed\n")
    assert code_sha256(tiny_random / CODE_NAME) != before
    copy = make_working_copy(tiny_random)
    assert code_sha256(copy / CODE_NAME) == code_sha256(tiny_random / CODE_NAME)


def test_what_does_not_run_does_not_count(tiny_random: Path, tmp_path: Path) -> None:
    before = code_sha256(tiny_random / CODE_NAME)
    for name in (BACKUP_NAME, f"{CODE_NAME}.edited", "notes.txt", "__pycache__/x.py", ".git/hook.py"):
        (tiny_random / name).parent.mkdir(exist_ok=True)
        (tiny_random / name).write_text("# not run\n")
    assert code_sha256(tiny_random / CODE_NAME) == before
    assert code_sha256(shutil.copytree(tiny_random, tmp_path / "elsewhere") / CODE_NAME) == before
    assert code_sha256(tiny_random / BACKUP_NAME) != before, "another source in its place"
    shutil.copy(tiny_random / CODE_NAME, tiny_random / BACKUP_NAME)
    assert code_sha256(tiny_random / BACKUP_NAME) == before, "the same source in its place"


def test_bytecode_that_lies_there_is_not_run(tiny_random: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Python takes bytecode that asks for no check in place of the source, whose text says nothing of it."""
    program = marshal.dumps(compile("raise SystemExit('bytecode was run')", "hidden", "exec"))
    for name in (CODE_NAME, "configuration_chatglm.py"):
        cached = Path(importlib.util.cache_from_source(str(tiny_random / name)))
        cached.parent.mkdir(exist_ok=True)
        cached.write_bytes(importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8) + program)
    loading.load_model(open_checkpoint(tiny_random), meta=True)
    assert code_sha256(tiny_random / CODE_NAME)[:16] in capsys.readouterr().err


def test_a_package_behind_a_symbolic_link_is_not_run(tiny_random: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "__init__.py").write_text("raise SystemExit('foreign code was run')\n")
    (tiny_random / "linked").symlink_to(tmp_path / "elsewhere")
    code = tiny_random / CODE_NAME
    code.write_text(f"from . import linked\n{code.read_text()}")
    with pytest.raises(WorkbookError, match="symbolic link"):
        loading.load_model(open_checkpoint(tiny_random), meta=True)


def test_a_changed_sibling_is_imported_again_and_announced(
    tiny_random: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loading.load_model(open_checkpoint(tiny_random), meta=True)
    with (tiny_random / "configuration_chatglm.py").open("a") as stream:
        stream.write("raise ValueError('the new sibling was run')\n")
    capsys.readouterr()
    with pytest.raises(WorkbookError, match="the new sibling was run"):
        loading.load_model(open_checkpoint(tiny_random), meta=True)
    assert code_hash.code_sha256(tiny_random / CODE_NAME)[:16] in capsys.readouterr().err


@pytest.mark.parametrize("name", [CODE_NAME, f"{CODE_NAME}.orig", "quantization.py", "package/__init__.py"])
@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_a_source_that_is_no_regular_file_is_refused_not_read(
    tmp_path: Path, glmtrt: InProcess, name: str, target: str
) -> None:
    """A pipe waits for a writer, and /dev/zero never ends."""
    directory = exported_copy(tmp_path).directory
    file = directory / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.symlink_to(target)
    if target == "pipe":
        os.mkfifo(file.parent / target)
    commands = [["verify", directory, "--case", "prompt"]]
    if name.endswith(".orig"):
        commands += [["patch", directory], ["patch", directory, "--restore"]]
    else:
        commands += [[step, directory] for step in ("export", "copy")]
        commands += [["chat", directory, "--backend", "ort", "--prompt", "a"]]
    for command in commands:
        status, lines = glmtrt(*command)
        assert status == 1 and f"glmtrt: {file} is a pipe, a socket or a device" in lines[-1], (command, lines)
