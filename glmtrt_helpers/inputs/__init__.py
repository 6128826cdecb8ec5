"""Notebook 01: what `forward` is called with: ids, positions, mask and cache, recorded from a chat or made up."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "examples": ["empty_past", "example_inputs", "prompt_inputs"],
        "names": ["axis_names", "flat_outputs", "forward_kwargs", "input_names", "output_names"],
        "plots": ["draw_calls", "draw_mask", "draw_positions"],
        "positions_and_mask": ["decode", "prefill"],
        "prompts": ["chat_prompt"],
        "recording": ["Call", "dynamic_axes", "load_record", "record", "save_record"],
    },
)
