"""Notebook 07: the fast engine, whose weights are inputs and whose decode attention is a kernel of its own."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "backends": ["best_backend", "open_session", "unavailable"],
        "decoder": ["build_fast", "export_fast"],
        "kernels": ["blocks_of", "compile_source"],
        "session": ["weight_names"],
    },
)
