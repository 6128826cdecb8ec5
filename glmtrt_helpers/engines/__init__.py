"""Notebook 05: optimization profiles, memory, and TensorRT engines: how to build, describe and run them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "builder": ["BuildOptions", "build_engine", "check_options"],
        "fp32_accumulation": ["accumulation_types"],
        "layer_check": ["layer_session"],
        "memory_prediction": ["EngineMemory", "predict_build", "predict_memory"],
        "plan_info": ["check_plan", "open_plan", "plan_path", "read_info", "tensor_rows", "write_info"],
        "plots": ["draw_measured_memory", "draw_memory", "draw_phases", "draw_profiles"],
        "profiles": ["Profile", "Range", "chat_profiles", "describe", "find_profile", "fit_to_record", "real_size"],
        "runner": ["read_engine"],
        "session": ["TensorRTSession"],
    },
)
