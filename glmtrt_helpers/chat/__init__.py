"""Notebook 06: chat over any session: which backend, sampling, rounds, terminal and panel."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "backends": ["BACKENDS", "best_backend", "open_session", "unavailable"],
        "comparison": ["compare", "comparison_rows"],
        "conversation": ["Chat", "post_process", "settled_part"],
        "panel": ["WHERE", "ChatPanel"],
        "plots": ["draw_choice", "draw_rounds", "interact"],
        "sampling": ["Sampler", "Sampling", "softmax", "warp"],
    },
)
