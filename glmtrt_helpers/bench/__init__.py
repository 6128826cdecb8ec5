"""Measure memory and speed, and draw the measurements next to what bounds them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "gpu_tests": ["load_gpu_tests"],
        "kernel_trace": ["find_step", "kernel_rows", "kind_of", "load_trace"],
        "memory": ["measure_memory"],
        "plots": [
            "COLOURS",
            "plot_batches",
            "plot_bounds",
            "plot_layer",
            "plot_memory",
            "plot_past",
            "plot_roofline",
            "plot_usage",
        ],
        "results": ["load", "read_json"],
        "roofline": ["bounds", "floor_ms"],
        "speed": ["measure"],
    },
)
