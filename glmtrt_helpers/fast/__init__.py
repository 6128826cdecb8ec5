"""Notebook 07: a decoder step in one CUDA kernel, over the checkpoint's own shards."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cuda_session": ["CudaSession"],
        "masks": ["read_mask"],
        "memory_prediction": ["predict_memory"],
        "programs": ["Sizes", "compile_program", "defines", "resources", "sizes_of"],
        "weights": ["EMBEDDING", "HEAD", "layer_weights", "rotary_tables"],
    },
)
