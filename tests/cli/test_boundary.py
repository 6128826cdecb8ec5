"""Every command, whatever happens to it, ends with 0, one sentence and 1, its usage and 2, or as interrupted.

The commands are asked of the program: one that is new fails here until CALLS says how to call it.
"""

import errno
import gc
import inspect
import os
import shutil
import signal
import subprocess
import sys
import time
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
from support.command_line import run_glmtrt
from support.exporting import exported_copy

from glmtrt_helpers.bench import memory, startup
from glmtrt_helpers.checkpoints import checkpoint as checkpoints
from glmtrt_helpers.checkpoints import working_copy
from glmtrt_helpers.cli import boundary, doctor
from glmtrt_helpers.cli.commands import app
from glmtrt_helpers.core import display, processes
from glmtrt_helpers.core.processes import GLMTRT
from glmtrt_helpers.graphs import comparison
from glmtrt_helpers.standin import train
from glmtrt_helpers.workbook import run_notebooks


@dataclass(frozen=True)
class Call:
    """How a command is called. DIR: a working copy, in FOLDER. early: a function that it calls.

    writes: in FOLDER. scratch: it leaves nothing there, and has to write there all the same.
    """

    arguments: str = "DIR"
    writes: bool = True
    early: tuple[Any, str] = (checkpoints, "open_checkpoint")
    scratch: bool = False


CALLS = {
    "doctor": Call("--model DIR", writes=False, early=(doctor, "model_report")),
    "standin": Call("FOLDER/new", early=(train, "build_standin")),
    "copy": Call(early=(working_copy, "make_working_copy")),
    "inputs": Call("DIR --max-new 1"),
    "patch": Call("DIR --restore", early=(Path, "exists")),
    "export": Call(),
    "inspect": Call("DIR/model.fp16.onnx", writes=False, early=(display, "print_rich")),
    "compare": Call("DIR/model.fp16.onnx DIR/model.fp16.onnx", writes=False, early=(comparison, "compare_graphs")),
    "locate": Call("DIR", writes=False, scratch=True),
    "verify": Call("DIR --case one", writes=False),
    "quantize": Call("DIR --bits 8"),
    "build": Call("DIR --past 1,2,8 --prompt 1,2,8"),
    "chat": Call("DIR --backend ort --prompt a --max-length 12", writes=False),
    "workbook": Call("--model DIR --output FOLDER/executed", early=(run_notebooks, "notebooks")),
    "bench speed": Call("DIR --engine ort-cpu --samples 1 --past 2 --output FOLDER/speed.json"),
    "bench memory": Call("DIR --phase patch --output FOLDER/memory.json", early=(memory, "measure_memory")),
    "bench startup": Call("", writes=False, early=(startup, "cpu_seconds")),
}
WRITING = [name for name, call in CALLS.items() if call.writes]
NEEDING_ROOM = [name for name, call in CALLS.items() if call.writes or call.scratch]
READING = [name for name, call in CALLS.items() if "DIR" in call.arguments]


def commands() -> dict[str, Callable[..., None]]:
    """Every command by its full name."""
    found = {info.name or info.callback.__name__: info.callback for info in app.registered_commands}  # type: ignore[union-attr]
    for group in app.registered_groups:
        inner = group.typer_instance.registered_commands  # type: ignore[union-attr]
        found |= {f"{group.name} {info.name or info.callback.__name__}": info.callback for info in inner}  # type: ignore[union-attr]
    return found  # type: ignore[return-value]


def test_every_command_is_called_here() -> None:
    assert set(commands()) == set(CALLS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """FOLDER, with a working copy, exported and patched. Training, notebooks and restarts are cut short."""
    folder = tmp_path / "folder"
    folder.mkdir()
    exported_copy(folder)
    monkeypatch.setenv(processes.MALLOC_VARIABLE, f"{processes.HUGE_PAGES}=1")
    monkeypatch.setattr(train, "_fit", lambda *_: None)
    monkeypatch.setattr(train, "MARGIN", float("-inf"))
    notebook = tmp_path / "00_short.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1)")]), notebook)
    monkeypatch.setattr(run_notebooks, "notebooks", lambda: [notebook])
    return folder


@dataclass(frozen=True)
class Ended:
    """Exit code, and the lines on standard error without the note on remote code."""

    code: int
    lines: list[str]

    @property
    def sentence(self) -> str:
        """The one line that it said, which no traceback is."""
        (line,) = self.lines
        assert line.startswith("glmtrt: ") and line.endswith(".") and len(line) < 700, line
        return line


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """`boundary.main` in this process, and its code; what it changes for the end of a process is put back."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def run() -> int:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
        try:
            with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
                boundary.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run


@pytest.fixture
def end(
    folder: Path, main: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Call a command by its name, or with other arguments, and see how it ends."""

    def run(name: str, arguments: str | None = None, *, where: Path = folder) -> Ended:
        arguments = CALLS[name].arguments if arguments is None else arguments
        filled = arguments.replace("DIR", str(where / "chatglm_random")).replace("FOLDER", str(where))
        monkeypatch.setattr(sys, "argv", ["glmtrt", *name.split(), *filled.split()])
        capfd.readouterr()
        code = main()
        lines = capfd.readouterr().err.splitlines()
        return Ended(code, [line for line in lines if line.strip() and not line.endswith("is downloaded.")])

    return run


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): hash(path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


SLOW = {"export", "standin", "bench speed", "bench memory"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CALLS])
def test_it_ends_well(end: Callable[..., Ended], folder: Path, name: str) -> None:
    assert end(name).code == 0
    assert not list(folder.rglob(".*.tmp"))


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def terminate(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)  # until it arrives


def leaves(*_: Any, **__: Any) -> None:
    sys.exit(0)


def broken_import(*_: Any, **__: Any) -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise ImportError("initialization failed") from None


FAULTS: dict[str, tuple[Callable[..., Any], int, str]] = {
    "Ctrl-C": (raising(KeyboardInterrupt()), 130, "interrupted"),
    "Ctrl-C in an import": (broken_import, 130, "interrupted"),
    "SIGTERM": (terminate, 143, "terminated"),
    "no memory": (raising(MemoryError()), 1, "not enough memory"),
    "no permission": (
        raising(PermissionError(errno.EACCES, "Permission denied", "/a/b")),
        1,
        "/a/b cannot be used (Perm",
    ),
    "no room": (raising(OSError(errno.ENOSPC, "No space left on device", "/a/b")), 1, "free room in /a"),
    "a broken disk": (
        raising(OSError(errno.EIO, "Input/output error")),
        1,
        "a file cannot be used (Input/output error)",
    ),
    "a closed pipe": (raising(BrokenPipeError(errno.EPIPE, "Broken pipe")), 1, "output was closed"),
    "code that ends the process": (leaves, 1, "did not foresee (SystemExit: 0)"),
    "unforeseen": (raising(KeyError("boom\nand \x1b[31mmore")), 1, "did not foresee (KeyError: "),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_it_meets_early_is_one_sentence(
    end: Callable[..., Ended], folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = contents(folder)
    for fault, code, says in FAULTS.values():
        with monkeypatch.context() as patch:
            patch.setattr(*CALLS[name].early, fault)
            ended = end(name)
        assert (ended.code, says in ended.sentence) == (code, True), ended
        assert "\x1b" not in ended.sentence and contents(folder) == before
        if "traceback is in" in ended.sentence:
            file = Path(ended.sentence.partition("traceback is in ")[2].partition(",")[0])
            assert "Traceback" in file.read_text()
            file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("name", WRITING)
def test_interrupted_before_its_first_file_is_whole_it_leaves_none(
    end: Callable[..., Ended], folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    before = contents(folder)
    action, code, says = FAULTS[fault]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", action)
        ended = end(name)
    assert ended.code == code and says in ended.lines[-1] and "Traceback" not in " ".join(ended.lines)
    assert contents(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("chat", "workbook", "bench startup", "patch")])
def test_interrupted_while_it_reports_its_work_stands(
    end: Callable[..., Ended], folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for what in ("print_table", "print_rich"):
        monkeypatch.setattr(display, what, raising(KeyboardInterrupt()))
    ended = end(name)
    assert ended.code == 130 and ended.lines[-1].startswith("glmtrt: interrupted; ")
    assert not list(folder.rglob(".*.tmp"))


@pytest.fixture
def mounted(folder: Path) -> Iterator[Path]:
    """FOLDER on a file system of its own, of 32 MB."""
    mount = folder.parent / "mounted"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    shutil.copytree(folder, mount, dirs_exist_ok=True)
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def assert_refused_before_the_work(name: str, ended: Ended, where: Path, reason: str) -> None:
    assert ended.code == 1 and len(ended.lines) == 1, (name, ended)
    assert str(where) in ended.sentence, ended  # and so no line that begins a phase
    assert reason in ended.sentence


def test_where_nothing_can_be_written_that_is_said_first(
    end: Callable[..., Ended], folder: Path, mounted: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    for name in NEEDING_ROOM:
        assert_refused_before_the_work(name, end(name, where=mounted), mounted, "Read-only file system")
    for name in sorted(CALLS.keys() - set(NEEDING_ROOM) - {"bench startup"}):
        assert end(name, where=mounted).code == 0, name


def test_where_no_room_is_left_that_is_said_first(end: Callable[..., Ended], folder: Path, mounted: Path) -> None:
    with (mounted / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError, match="No space"):
        while True:
            ballast.write(bytes(4096))
    before = contents(mounted)
    for name in sorted(set(NEEDING_ROOM) - {"patch"}):  # the original source takes the place of the patched one
        ended = end(name, where=mounted)
        assert_refused_before_the_work(name, ended, mounted, "No space left on device")
        assert contents(mounted) == before, name
    for name in sorted(CALLS.keys() - set(NEEDING_ROOM) - {"bench startup"}):
        assert end(name, where=mounted).code == 0, name


@pytest.mark.parametrize("what", ["missing", "a file", "a device", "folder for config.json", "no permission"])
def test_what_cannot_be_read_is_one_sentence(
    end: Callable[..., Ended], folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    directory = folder / "chatglm_random"
    broken = [directory / "model.fp16.onnx", directory / "config.json", directory / "modeling_chatglm.py"]
    replaced = directory if what in ("missing", "a file", "a device") else None
    if replaced:
        shutil.rmtree(directory)
    if what == "a file":
        directory.write_text("")
    if what == "a device":
        directory.symlink_to("/dev/null")
    if what == "folder for config.json":
        for file in broken:
            file.unlink()
            file.mkdir()
    if what == "no permission":
        for module in ("io", "builtins"):
            opened = getattr(__import__(module), "open")  # noqa: B009

            def refuse(file: Any, *args: Any, opened: Any = opened, **options: Any) -> Any:
                if file in broken or file in map(str, broken):
                    raise PermissionError(errno.EACCES, "Permission denied", str(file))
                return opened(file, *args, **options)

            monkeypatch.setattr(f"{module}.open", refuse)
    for name in READING:
        ended = end(name)
        assert ended.code == 1 and str(folder) in ended.sentence and "not foresee" not in ended.sentence, (name, ended)


def test_a_full_or_closed_output_is_one_sentence() -> None:
    for redirection, reason in ((">/dev/full", "No space left on device"), ("| true", "output was closed")):
        command = " ".join(f"'{part}'" for part in (*GLMTRT, "inspect", "--help"))
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; sleep 0.1; {command} {redirection}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
        assert done.returncode == 0 or reason in done.stderr, done
    assert run_glmtrt("--help").returncode == 0


def options() -> Iterator[tuple[str, str, Any]]:
    """(command, option, annotation) of every option that takes a value."""
    for name, function in commands().items():
        hints = typing.get_type_hints(function, include_extras=True)
        for parameter in inspect.signature(function).parameters.values():
            kind, *details = typing.get_args(hints[parameter.name])
            named = [each for each in details[0].param_decls or () if each.startswith("--")]
            if type(details[0]).__name__ == "OptionInfo":
                yield name, (named or [f"--{parameter.name.replace('_', '-')}"])[0], kind


def wrong_values(kind: Any) -> list[str]:
    kinds = set(typing.get_args(kind)) | {kind}
    kinds |= {inner for each in kinds for inner in typing.get_args(each)}
    if int in kinds:
        return ["-1", "x", "nan", "1e3", ""]
    if float in kinds:
        return ["-1", "x", "nan", "inf", "-inf", "1e999", ""]
    if any(typing.get_origin(each) is typing.Literal or hasattr(each, "__members__") for each in kinds):
        return ["no-such", "", "-1"]
    return []


@pytest.mark.parametrize(
    ("name", "option", "kind"), [pytest.param(*each, id=f"{each[0]} {each[1]}") for each in options()]
)
def test_a_value_outside_an_options_range_is_a_usage_error(
    end: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, name: str, option: str, kind: Any
) -> None:
    for value in wrong_values(kind):
        required = [word for word in CALLS[name].arguments.split() if word.startswith(("DIR", "FOLDER"))][:1]
        monkeypatch.setattr(checkpoints, "open_checkpoint", raising(AssertionError("the work began")))
        monkeypatch.setattr(train, "build_standin", raising(AssertionError("the work began")))
        arguments = [] if name in ("doctor", "workbook", "bench startup") else required
        ended = end(name, " ".join([*arguments, f"{option}={value}"]))
        assert ended.code == 2 and option in ended.lines[-1], (value, ended)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("verify", "DIR --case= ", "--case"),
        ("verify", "DIR --case nothing", "part of no case's name: 'one token, no past', 'prompt', 'decode', "),
        ("build", "DIR --past 1,2", "--past"),
        ("build", "DIR --prompt 0,1,2", "--prompt"),
        ("build", "DIR --batch 3,2,1", "--batch"),
        ("patch", "DIR --check --restore", "--restore"),
        ("export", "", "directory"),
        ("chat", "DIR --no-such-option", "--no-such-option"),
        ("workbook", "--only 00 --only 6", "--only: there is no notebook '6': choose 00."),
        ("chat", "DIR --backend y", "'--backend': 'y' is not one of 'torch', "),
    ],
)
def test_other_usage_errors(end: Callable[..., Ended], name: str, arguments: str, says: str) -> None:
    ended = end(name, arguments)
    assert ended.code == 2 and says in ended.lines[-1], ended


def test_sizes_beyond_the_model_are_refused(end: Callable[..., Ended]) -> None:
    for name, arguments in (
        ("build", "DIR --prompt 1,1,1000000000"),
        ("bench speed", "DIR --prompt 1000000000"),
        ("bench speed", "DIR --past 1024"),
        ("inputs", "DIR --layers 1000000000"),
        ("inputs", "DIR --max-new 1000000000"),
        ("doctor", "--model DIR --length 1000000000"),
        ("chat", "DIR --backend ort --prompt a --max-length 1000000000"),
    ):
        ended = end(name, arguments)
        assert len(ended.lines) == 1, (name, ended)
        assert (ended.code == 1 and "1024" in ended.sentence) or "2 layers" in ended.sentence, (name, ended)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["export", "inputs", "verify", "workbook"])
def test_signals_while_it_works(tmp_path: Path, name: str, number: signal.Signals) -> None:
    directory = exported_copy(tmp_path).directory
    before = contents(tmp_path)
    arguments = CALLS[name].arguments.replace("DIR", str(directory)).replace("FOLDER", str(tmp_path))
    for seconds in (0.5, 1.5, 3.0):
        command = [*GLMTRT, name, *arguments.split()]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:  # it was faster
            break
        assert process.returncode in (128 + number, 130, -number), (process.returncode, errors)
        assert "Traceback" not in errors and not list(tmp_path.rglob(".*.tmp")), errors
        assert before.items() <= contents(tmp_path).items()


def test_what_was_half_made_when_a_signal_came_is_not_told(
    main: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As asyncio's event loop, whose `__del__` fails where its `__init__` was interrupted."""

    class HalfMade:
        def __init__(self) -> None:
            raise SystemExit(boundary.TERMINATED)

        def __del__(self) -> None:
            print(self.never_set)  # type: ignore[attr-defined]

    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr(boundary, "_run", lambda arguments: HalfMade())
    assert main() == boundary.TERMINATED
    gc.collect()
    assert not told
    assert capsys.readouterr().err.startswith("glmtrt: terminated; ")
