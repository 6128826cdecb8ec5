"""The chat in a terminal: a real pseudo-terminal, Chinese typed and erased, answers streamed, Ctrl-C, pipes."""

import io
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.scripted import Scripted

from glmtrt_helpers.chat import backends
from glmtrt_helpers.chat.conversation import Chat
from glmtrt_helpers.chat.questions import known_questions
from glmtrt_helpers.chat.sampling import Sampling
from glmtrt_helpers.chat.terminal import answer, converse
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.tensorrt_package import gpus
from glmtrt_helpers.standin import conversations

GLMTRT = [sys.executable, "-c", "from glmtrt_helpers.cli import boundary; boundary.main()"]
ANSWERS = {example.question: example.answer for example in conversations.load_corpus() if not example.history}


def run(*arguments: str | Path, typed: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command, settings = [*GLMTRT, *map(str, arguments)], {**os.environ, **environment}
    return subprocess.run(command, input=typed, capture_output=True, encoding="utf-8", check=False, env=settings)


def test_the_answer_alone_on_standard_output(exported_standin: Path) -> None:
    for question in ("你好", "What is a profile?"):
        done = run("chat", exported_standin, "--backend", "ort", "--prompt", question, "--greedy")
        assert done.returncode == 0 and done.stdout == ANSWERS[question] + "\n", done.stderr
    done = run("chat", exported_standin, "--prompt", "你好", "--greedy", LANG="C", LC_ALL="C")
    assert done.stdout == ANSWERS["你好"] + "\n" and "Answering on" in done.stderr


@pytest.mark.slow
def test_every_trained_answer_is_printed_exactly(exported_standin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = open_checkpoint(exported_standin)
    session = backends.open_session(checkpoint, "ort")
    for example in conversations.load_corpus():
        chat = Chat(checkpoint, session, Sampling(greedy=True))
        chat.history = list(example.history)
        answer(chat, example.question)
        assert capsys.readouterr().out == example.answer + "\n"


def test_a_pipe_holds_a_conversation(exported_standin: Path) -> None:
    example = next(e for e in conversations.load_corpus() if len(e.history) == 1)
    typed = f"{example.history[0][0]}\n{example.question}\n"
    done = run("chat", exported_standin, "--backend", "ort", "--greedy", typed=typed)
    assert done.stdout == f"{example.history[0][1]}\n{example.answer}\n", done.stderr


def test_bad_input_is_one_line(exported_standin: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (
            ("chat", exported_standin, "--backend", "tensorrt", "--prompt", "a"),
            "is missing: run notebook 05" if gpus() else "no GPU, or its driver does not answer",
        ),
        (("chat", exported_standin, "--backend", "ort", "--prompt", " "), "the question is empty"),
        (
            ("chat", exported_standin, "--backend", "ort", "--prompt", "a", "--max-length", "3"),
            "leave room for an answer",
        ),
        (("chat", tmp_path / "nowhere", "--prompt", "a"), "is not a directory"),
    ):
        done = run(*arguments)
        assert done.returncode == 1 and done.stdout == "", arguments
        (line,) = [line for line in done.stderr.splitlines() if not line.startswith("Answering on")]
        assert line.startswith("glmtrt: ") and message in line


class Terminal:
    """A program in a pseudo-terminal: what it printed, and a keyboard."""

    def __init__(self, *command: str | Path, **environment: str):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update({"TERM": "xterm", "LANG": "C.UTF-8", **environment})
            os.execv(sys.executable, [*GLMTRT, *map(str, command)])
        self.output = ""

    def expect(self, text: str, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        raw = b""
        while text not in self.output:
            assert time.monotonic() < end, f"no {text!r} in {self.output!r}"
            raw += os.read(self.fd, 1)
            try:
                self.output += raw.decode()
                raw = b""
            except UnicodeDecodeError:
                continue
        self.output = self.output.partition(text)[2]

    def wait_for_text(self, characters: int) -> None:
        while len(self.output) < characters:
            self.output += os.read(self.fd, 64).decode(errors="replace")

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())


@pytest.fixture
def terminal(exported_standin: Path) -> Iterator[Terminal]:
    opened = Terminal("chat", exported_standin, "--backend", "ort", "--greedy")
    yield opened
    os.close(opened.fd)
    os.waitpid(opened.pid, 0)


def test_chinese_is_typed_erased_and_answered(terminal: Terminal) -> None:
    terminal.expect("> ")
    terminal.type("你坏\x7f好\n")  # one backspace takes one Chinese character
    terminal.expect(ANSWERS["你好"])
    terminal.expect("> ")
    terminal.type("\n")


@pytest.mark.parametrize("locale", ["zh_CN.GBK", "xx_YY", "C"])
def test_a_locale_that_is_not_utf8_or_not_installed_converses(exported_standin: Path, locale: str) -> None:
    terminal = Terminal("chat", exported_standin, "--backend", "ort", "--greedy", LC_ALL=locale)
    terminal.expect("> ")
    terminal.type("你坏\x7f好\n")
    terminal.expect("\n")
    terminal.expect(ANSWERS["你好"])
    terminal.expect("> ")
    terminal.type("\n")
    assert os.waitpid(terminal.pid, 0)[1] == 0
    os.close(terminal.fd)


@pytest.mark.slow
def test_ctrl_c_ends_the_answer_not_the_conversation(exported_standin: Path) -> None:
    wild = ("--temperature", "5", "--top-k", "0", "--top-p", "1", "--seed", "3")
    terminal = Terminal("chat", exported_standin, "--backend", "torch", *wild)
    terminal.expect("> ")
    terminal.type("你好\n")
    terminal.expect("\n")
    terminal.wait_for_text(3)  # now it is answering; with such settings an answer is long
    os.kill(terminal.pid, signal.SIGINT)
    terminal.expect("(stopped)")
    terminal.expect("> ")
    terminal.type("\x04")
    assert os.waitpid(terminal.pid, 0)[1] == 0
    os.close(terminal.fd)


def test_text_appears_before_the_last_token_is_computed(exported_standin: Path) -> None:
    """Every step of the session prints a mark; there must be text between the marks."""
    program = (
        "import sys\n"
        "from glmtrt_helpers.cli import boundary\n"
        "from glmtrt_helpers.sessions.onnxruntime import OrtSession\n"
        "step = OrtSession.step\n"
        "def counted(self, call):\n"
        "    sys.stdout.write('|'); sys.stdout.flush(); return step(self, call)\n"
        "OrtSession.step = counted\n"
        f"sys.argv = ['glmtrt', 'chat', {str(exported_standin)!r}, '--backend', 'ort']\n"
        "sys.argv += ['--prompt', '你好', '--greedy']\n"
        "boundary.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False)
    pieces = done.stdout.rstrip("\n").split("|")
    assert "".join(pieces) == ANSWERS["你好"] and sum(bool(piece) for piece in pieces) > 10, done.stderr
    assert pieces[0] == "" and any(pieces[:4]), "the first text comes with the first tokens"


def test_an_answer_cannot_steer_the_terminal(tiny_random: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal sequence in bytes, one token each, so that no piece holds a whole one."""
    checkpoint = open_checkpoint(tiny_random)
    tokenizer = load_tokenizer(checkpoint)
    script = [tokenizer._ids[f"<0x{byte:02X}>"] for byte in "a\x1b[2J\u202e你".encode()]
    session = Scripted(checkpoint, [*script, tokenizer.eop_id])
    answer(Chat(checkpoint, session, Sampling(greedy=True)), "a")
    assert capsys.readouterr().out == r"a\x1b[2J\u202e你" + "\n"


def test_questions_that_a_standin_knows_are_listed_to_who_types(
    tiny_random: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    chat: Any = SimpleNamespace(checkpoint=open_checkpoint(tiny_random))
    monkeypatch.setattr("sys.stdin", Typed("\n"))
    converse(chat)
    assert "questions" not in capsys.readouterr().err
    (tiny_random / "questions.json").write_text('["你好", "What is a profile?"]', encoding="utf-8")
    monkeypatch.setattr("sys.stdin", Typed("\n"))
    converse(chat)
    assert "This model knows 2 questions, such as: 你好  What is a profile?" in capsys.readouterr().err
    (tiny_random / "questions.json").write_text('{"no": "list"}', encoding="utf-8")
    with pytest.raises(WorkbookError, match=r"questions\.json holds what is not expected there"):
        known_questions(chat.checkpoint)
