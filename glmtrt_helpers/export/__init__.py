"""Notebook 03: export the patched model to ONNX; its weights stay in the checkpoint's shards."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "exporting": ["ExportReport", "export_model", "onnx_path", "quiet", "torchscript_export"],
    },
)
