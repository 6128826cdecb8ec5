"""What every step shares: errors, progress, atomic files, tables, processes, and the choice of TensorRT."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "display": ["format_cell", "print_rich", "print_table", "use_workbook_style"],
        "errors": ["WorkbookError"],
        "files": ["replacing"],
        "onnx_file": ["load_graph"],
        "processes": ["GLMTRT", "measure"],
        "progress": ["bytes_bar", "phase_bars", "say"],
        "tensorrt_package": ["Gpu", "Package", "choose", "gpus", "verdict"],
    },
)
