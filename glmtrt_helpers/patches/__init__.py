"""Notebook 02: find the export blockers in ChatGLM-6B's source and patch them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "patching": [
            "PATCHES",
            "check_checkpoint",
            "diff_sources",
            "find_blockers",
            "patch_checkpoint",
            "patch_source",
            "restore_checkpoint",
        ],
    },
)
