"""The memory of a command of known size, and large pages for a process that asks for them."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from glmtrt_helpers.core import processes
from glmtrt_helpers.workbook import run_notebooks

MB = 10**6
TAKE = """
import mmap, sys, time
print("anonymous ...", file=sys.stderr, flush=True)
block = bytearray(b"x" * 200_000_000)
print("mapped ...", file=sys.stderr, flush=True)
with open(sys.argv[1], "wb") as stream:
    stream.write(b"y" * 100_000_000)
with open(sys.argv[1], "rb") as stream:
    view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
total = sum(view[i] for i in range(0, len(view), 4096))
time.sleep(0.2)
print("done", total)
"""
SAY = "import os, sys; print(os.getpid(), sys.argv[1:], os.environ.get('GLIBC_TUNABLES'), flush=True)\n"
RESTART = "from glmtrt_helpers.core.processes import restart_with_huge_pages; restart_with_huge_pages()\n"
TOUCH = """
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = b"x" * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems ignore the variable")


def said(code: str, tunables: str | None = None, *arguments: str) -> list[str]:
    """The lines that Python code prints, run with this value of glibc's variable."""
    environment = {name: value for name, value in os.environ.items() if name != processes.MALLOC_VARIABLE}
    if tunables is not None:
        environment[processes.MALLOC_VARIABLE] = tunables
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


@on_linux
def test_known_sizes_are_measured(tmp_path: Path) -> None:
    usage = processes.measure([sys.executable, "-c", TAKE, tmp_path / "file"], tmp_path)
    assert usage.returncode == 0 and usage.output.startswith("done")
    assert 200 * MB <= usage.peak_anonymous < 430 * MB  # twice that while the block is made
    assert 100 * MB <= usage.peak_mapped < 140 * MB
    assert usage.added == pytest.approx(100 * MB, rel=0.01)
    assert [phase for _, phase in usage.phases] == ["anonymous", "mapped"]
    begin = dict((phase, seconds) for seconds, phase in usage.phases)
    before = [s.anonymous for s in usage.samples if s.seconds < begin["anonymous"]]
    assert all(anonymous < 60 * MB for anonymous in before)


@on_linux
def test_a_command_that_fails_says_so() -> None:
    failed = processes.measure([sys.executable, "-c", "import sys; print('no', file=sys.stderr); sys.exit(3)"])
    assert failed.returncode == 3 and failed.errors == "no\n" and failed.added is None


@on_linux
def test_it_restarts_once_with_the_same_arguments() -> None:
    before, after = (line.split(" ", 1) for line in said(SAY + RESTART, None, "a b", "c"))
    assert before[0] == after[0], "the process id is the same, so its memory can still be measured"
    assert before[1] == "['a b', 'c'] None" and after[1] == "['a b', 'c'] glibc.malloc.hugetlb=1"


@on_linux
def test_other_tunables_and_an_explicit_choice_are_kept() -> None:
    both = said(SAY + RESTART, "glibc.malloc.arena_max=1")[1]
    assert both.endswith("glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1")
    assert len(said(SAY + RESTART, "glibc.malloc.hugetlb=0")) == 1


@on_linux
def test_memory_then_comes_in_large_pages() -> None:
    state = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not state.exists() or "[madvise]" not in state.read_text() or not os.confstr("CS_GNU_LIBC_VERSION"):
        pytest.skip("this kernel gives large pages to every process, or to none")
    (small,), (large,) = said(TOUCH), said(RESTART + TOUCH)
    assert int(small) >= (64 << 20) // 4096 and int(large) < int(small) / 10


@on_linux
def test_a_build_asks_for_them() -> None:
    code = (
        "import os\n"
        "from glmtrt_helpers.checkpoints import checkpoint\n"
        "from glmtrt_helpers.cli import boundary\n"
        "checkpoint.open_checkpoint = lambda path: os.write(2, os.environ['GLIBC_TUNABLES'].encode()) and os._exit(1)\n"
        "boundary.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != processes.MALLOC_VARIABLE}
    command = [sys.executable, "-c", code, "build", "nowhere"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "glibc.malloc.hugetlb=1"


def test_notebooks_run_with_them(tmp_path: Path) -> None:
    cell = nbformat.v4.new_code_cell("import os; print(os.environ['GLIBC_TUNABLES'])")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "in.ipynb")
    run_notebooks.execute(tmp_path / "in.ipynb", tmp_path / "out.ipynb")
    (output,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[0].outputs
    assert output.text.strip() == processes.huge_page_environment()[processes.MALLOC_VARIABLE]
