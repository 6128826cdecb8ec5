"""Sessions: one interface to the backends that run `forward`, and the decode loop on top of it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["Limits", "Session"],
        "decode_loop": ["generate", "greedy", "take_best"],
        "onnxruntime": ["OrtSession", "plain_session"],
        "pytorch": ["TorchSession"],
    },
)
