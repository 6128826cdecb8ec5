"""Notebook 06: a conversation on top of a session: sampling, rounds, terminal and panel."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "backends": ["BACKENDS", "best_backend", "open_session", "unavailable"],
        "conversation": ["Chat", "compare", "comparison_rows", "post_process", "settled_part"],
        "panel": ["WHERE", "ChatPanel"],
        "plots": ["draw_choice", "draw_rounds", "turn"],
        "sampling": ["Sampler", "Sampling", "softmax", "warp"],
    },
)
