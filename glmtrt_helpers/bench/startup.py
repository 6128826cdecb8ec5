"""`glmtrt bench startup`: the CPU time of `glmtrt --help`, which every command spends before it begins."""

import resource
import subprocess

from glmtrt_helpers.core.processes import GLMTRT


def cpu_seconds() -> float:
    """User and system time of one `glmtrt --help`, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*GLMTRT, "--help"], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
