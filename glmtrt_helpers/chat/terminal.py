"""A chat in a terminal: answers stream to standard output, everything else goes to standard error."""

import contextlib
import io
import sys

from glmtrt_helpers.chat.conversation import Chat, Reply
from glmtrt_helpers.core.errors import WorkbookError

PROMPT = "> "


def use_utf8() -> None:
    """Before the first read: Chinese must pass whatever the locale says; a byte that is not UTF-8 becomes a mark."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")


def answer(talk: Chat, query: str) -> Reply:
    """Print one answer as it comes, a line break behind it; only text that cannot change any more is printed."""
    printed, reply = 0, None
    try:
        for reply in talk.stream(query):
            print(reply.settled[printed:], end="", flush=True)
            printed = max(printed, len(reply.settled))
    finally:
        if reply is not None:
            print(flush=True)
    assert reply is not None  # a stream yields once at least, or raises
    if reply.dropped:
        print(f"({reply.dropped} of the oldest rounds were dropped to make room)", file=sys.stderr)
    if reply.ended == "length":
        print(f"(the answer was cut at the limit of {talk.limit} tokens)", file=sys.stderr)
    return reply


def converse(talk: Chat) -> None:
    """Ask and answer until an empty line or the end of the input; Ctrl-C ends an answer, not the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (makes input() edit lines by characters, so that Chinese can be erased)
    interactive = sys.stdin.isatty()
    if interactive:
        print("An empty line or Ctrl-D ends the conversation, Ctrl-C an answer.", file=sys.stderr)
    while True:
        try:
            query = input(PROMPT if interactive else "")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not query.strip():
            return
        try:
            answer(talk, query)
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)
        except WorkbookError as error:
            print(f"glmtrt: {error}", file=sys.stderr)
