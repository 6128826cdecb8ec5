"""Large pages: a process begins again with them, once, as the same process; a build does, and so do notebooks."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from glmtrt_helpers.core import processes
from glmtrt_helpers.workbook import run_notebooks

SAY = "import os, sys; print(os.getpid(), sys.argv[1:], os.environ.get('GLIBC_TUNABLES'), flush=True)\n"
RESTART = "from glmtrt_helpers.core.processes import restart_with_huge_pages; restart_with_huge_pages()\n"
TOUCH = """
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = b"x" * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such pages to ask for")


def said(code: str, chosen: str | None = None, *arguments: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != processes.MALLOC_VARIABLE}
    if chosen is not None:
        environment[processes.MALLOC_VARIABLE] = chosen
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


@on_linux
def test_it_begins_again_once_with_the_same_arguments() -> None:
    before, after = (line.split(" ", 1) for line in said(SAY + RESTART, None, "a b", "c"))
    assert before[0] == after[0], "the process is the same, so whoever watches it goes on seeing it"
    assert before[1] == "['a b', 'c'] None" and after[1] == "['a b', 'c'] glibc.malloc.hugetlb=1"


@on_linux
def test_what_was_chosen_before_stays() -> None:
    both = said(SAY + RESTART, "glibc.malloc.arena_max=1")[1]
    assert both.endswith("glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1")
    assert len(said(SAY + RESTART, "glibc.malloc.hugetlb=0")) == 1


@on_linux
def test_memory_then_comes_in_large_pages() -> None:
    state = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not state.exists() or "[madvise]" not in state.read_text() or not os.confstr("CS_GNU_LIBC_VERSION"):
        pytest.skip("this kernel gives large pages to everybody, or to nobody")
    (small,), (large,) = said(TOUCH), said(RESTART + TOUCH)
    assert int(small) >= (64 << 20) // 4096 and int(large) < int(small) / 10


@on_linux
def test_a_build_asks_for_them() -> None:
    code = (
        "import os\n"
        "from glmtrt_helpers.checkpoints import checkpoint\n"
        "from glmtrt_helpers.cli import commands\n"
        "checkpoint.open_checkpoint = lambda path: exit(os.environ['GLIBC_TUNABLES'])\n"
        "commands.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != processes.MALLOC_VARIABLE}
    command = [sys.executable, "-c", code, "build", "nowhere"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "glibc.malloc.hugetlb=1"


def test_notebooks_are_run_with_them(tmp_path: Path) -> None:
    cell = nbformat.v4.new_code_cell("import os; print(os.environ['GLIBC_TUNABLES'])")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "in.ipynb")
    run_notebooks.execute(tmp_path / "in.ipynb", tmp_path / "out.ipynb")
    (output,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[0].outputs
    assert output.text.strip() == processes.huge_page_environment()[processes.MALLOC_VARIABLE]
