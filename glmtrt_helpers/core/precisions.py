"""The precisions of graphs and engines, by the names that options and file names have for them; without PyTorch."""

import numpy as np

PRECISIONS: dict[str, np.dtype] = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
