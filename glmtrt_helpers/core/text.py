"""Text that a model, a file or its name brought along, shown as text: it steers no terminal and is no markup."""

import builtins
import html
import re
import sys
from typing import TextIO

# Control characters except tab and line feed, what reorders or breaks a line of its own (UAX 9, U+2028, U+2029), and
# lone surrogates, which stand for bytes that are not UTF-8. A terminal sequence begins with one of the first.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with all that would steer a terminal spelt out, as \x1b; tabs and line breaks stay."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def as_html(text: str) -> str:
    """The same for HTML: what is markup there is shown, too."""
    return html.escape(printable(text))


def shorten(text: str, width: int) -> str:
    """The text on one line, cut after a word where it is longer than `width`."""
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    return (line[: width - 3].rpartition(" ")[0] or line[: width - 4]) + " ..."


def tell(text: str, file: TextIO | None = None) -> None:
    """Print a line as `printable` text: on standard error, but in a notebook, where that is red, on standard output."""
    in_notebook = hasattr(builtins, "get_ipython")
    print(printable(text), file=file or (sys.stdout if in_notebook else sys.stderr), flush=True)
