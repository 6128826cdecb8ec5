"""Notebook 05: memory in pages of 2 MB, for a build that takes 13 GB of it.

Linux gives a process its memory when it is first touched, a page of 4 KB at a time: 6.3 million times in a build of the
real size, a quarter of its time. glibc asks for pages of 2 MB where it is told to, and it listens only when a process
starts (The GNU C Library manual, "Memory Allocation Tunables"). Other systems and libraries pass over the variable.
"""

import os
import sys

VARIABLE = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb"


def environment() -> dict[str, str]:
    """This process's environment for another one that is to have large pages; whoever chose otherwise keeps that."""
    chosen = os.environ.get(VARIABLE, "")
    if TUNABLE in chosen:
        return dict(os.environ)
    return {**os.environ, VARIABLE: ":".join(filter(None, [chosen, f"{TUNABLE}=1"]))}


def restart() -> None:
    """Begin this process again, same program, same arguments, same id, where it has no large pages yet."""
    if sys.platform == "linux" and TUNABLE not in os.environ.get(VARIABLE, ""):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment())
