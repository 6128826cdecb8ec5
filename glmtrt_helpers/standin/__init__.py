"""Checkpoints made here: the trained stand-in, and random weights of larger sizes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "build": ["make_config", "write_checkpoint"],
        "random_weights": ["write_random"],
        "conversations": ["load_corpus"],
        "train": ["build_standin"],
    },
)
