"""Notebook 04: inspect an exported graph and compare it with PyTorch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attention_diagram": ["draw_layer", "layer_nodes"],
        "checks": ["dead_inputs", "missing_inputs", "problems", "static_dimensions"],
        "layer_errors": ["compare_layers", "first_difference", "load_errors", "save_errors"],
        "plots": ["netron_view", "plot_layer_errors"],
        "reference": ["CASES", "Case"],
        "scopes": ["GraphIndex"],
        "summary": ["location", "summarize"],
        "tensorrt_parser": ["inspect_capability", "tensorrt_errors"],
        "tolerances": ["largest_error", "tolerance"],
        "verification": ["verify"],
    },
)
