"""Notebook 06: a chat in a terminal; answers stream to standard output, everything else goes to standard error."""

import contextlib
import io
import os
import sys

from glmtrt_helpers.chat.conversation import Chat, Reply
from glmtrt_helpers.chat.questions import known_questions
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.text import printable, tell

PROMPT = "> "


def use_utf8() -> None:
    """Read and write UTF-8 in any locale; an invalid byte becomes U+FFFD. Call it before the first read."""
    # readline sets its own locale by this variable. In one that is not UTF-8, or not installed, it takes the bytes of
    # a Chinese character for commands: one of them lists the files of the folder.
    os.environ["LC_ALL"] = "C.UTF-8"
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")


def converse(chat: Chat) -> None:
    """Answer every line until an empty one or the end of the input; Ctrl-C ends an answer, not the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lets input() edit by characters, so that Chinese can be erased)
    interactive = sys.stdin.isatty()
    if interactive:
        print("An empty line or Ctrl-D ends the conversation, Ctrl-C an answer.", file=sys.stderr)
        if questions := known_questions(chat.checkpoint):
            some = questions[:: max(1, len(questions) // 8)][:8]
            tell(f"This model knows {len(questions)} questions, such as: {'  '.join(some)}")
    while True:
        try:
            query = input(PROMPT if interactive else "")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not query.strip():
            return
        try:
            answer(chat, query)
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)
        except WorkbookError as error:
            tell(f"glmtrt: {error}")


def answer(chat: Chat, query: str) -> Reply:
    """Print one answer as it grows, and a line break; text is printed once it cannot change any more."""
    printed, reply = 0, None
    try:
        for reply in chat.stream(query):
            print(printable(reply.settled[printed:]), end="", flush=True)
            printed = max(printed, len(reply.settled))
    finally:
        if reply is not None:
            print(flush=True)
    assert reply is not None  # a stream yields at least once, or raises
    if reply.dropped:
        print(f"({reply.dropped} of the oldest rounds were dropped to make room)", file=sys.stderr)
    if reply.ended == "length":
        print(f"(the answer was cut off at the limit of {chat.limit} tokens)", file=sys.stderr)
    return reply
