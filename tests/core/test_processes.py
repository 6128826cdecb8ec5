"""Memory measured from outside: a command of known size is seen at that size."""

import sys
from pathlib import Path

import pytest

from glmtrt_helpers.core import processes

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


def test_known_sizes_are_seen(tmp_path: Path) -> None:
    taken = processes.measure([sys.executable, "-c", TAKE, tmp_path / "file"], tmp_path)
    assert taken.returncode == 0 and taken.output.startswith("done")
    assert 200 * MB <= taken.peak_anonymous < 430 * MB  # twice that while the block is made
    assert 100 * MB <= taken.peak_mapped < 140 * MB
    assert taken.added == pytest.approx(100 * MB, rel=0.01)
    assert [phase for _, phase in taken.phases] == ["anonymous", "mapped"]
    begin = dict((phase, seconds) for seconds, phase in taken.phases)
    before = [s.anonymous for s in taken.samples if s.seconds < begin["anonymous"]]
    assert all(anonymous < 60 * MB for anonymous in before)


def test_a_command_that_fails_says_so() -> None:
    failed = processes.measure([sys.executable, "-c", "import sys; print('no', file=sys.stderr); sys.exit(3)"])
    assert failed.returncode == 3 and failed.errors == "no\n" and failed.added is None
