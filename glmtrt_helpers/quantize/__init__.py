"""Notebook 09: the weights of a checkpoint in 8 or 4 bits."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "gptq": ["gptq"],
        "rounding": ["round_to_nearest"],
        "writing": ["quantize_checkpoint"],
    },
)
