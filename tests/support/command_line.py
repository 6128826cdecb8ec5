"""`glmtrt` as tests run it: in a process of its own, or faster in this one."""

import subprocess
from collections.abc import Callable

from glmtrt_helpers.core.processes import GLMTRT

# Of the fixture `glmtrt`: arguments to exit code and lines on standard error, without progress.
InProcess = Callable[..., tuple[int, list[str]]]


def run_glmtrt(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GLMTRT, *map(str, arguments)], capture_output=True, text=True, check=False)
