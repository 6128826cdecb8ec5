"""The phases that `glmtrt bench memory` measures; of its own, because the command line lists them at its start."""

from enum import StrEnum


class Phase(StrEnum):
    """Each is a command of glmtrt that takes a working copy."""

    INPUTS = "inputs"
    PATCH = "patch"
    EXPORT = "export"
    BUILD = "build"
    VERIFY = "verify"
