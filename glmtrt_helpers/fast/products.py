"""Matrix products of many rows by cuBLASLt, through ctypes.

ctypes, since the whole of nvmath-python would be installed for a dozen calls. The library is NVIDIA's package
nvidia-cublas, which PyTorch's CUDA wheels bring; its 444 MB are asked of nobody who has no GPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.cuda import DeviceMemory
from glmtrt_helpers.fast.memory_prediction import WORKSPACE

_F32, _F16, _COMPUTE_F32 = 0, 2, 68  # cudaDataType, cublasComputeType_t
_TRANSA, _EPILOGUE, _BIAS = 3, 7, 8  # cublasLtMatmulDescAttributes_t
_EPILOGUES = {None: 1, "bias": 4, "gelu": 36}  # cublasLtEpilogue_t: the last adds a bias and applies tanh-GELU
_T, _MAX_WORKSPACE = 1, 1


class _Heuristic(ctypes.Structure):
    _fields_ = (("algo", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int),
                ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4))  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A product x (rows, width) times the transpose of weights (outputs, width), both fp16; the result is fp16.

    after: what is done to it, None, "bias" or "gelu" (a bias, then GELU by tanh). sums: the result is fp32, and added
    to what is there. fresh: it is fp32.
    """

    outputs: int
    width: int
    after: str | None = None
    sums: bool = False
    fresh: bool = False


def load_library() -> ctypes.CDLL:
    """cuBLASLt. Raises WorkbookError where it is not installed."""
    try:
        return ctypes.CDLL(load_nvidia_dynamic_lib("cublasLt").abs_path)
    except (DynamicLibNotFoundError, OSError) as error:
        raise WorkbookError(
            f"cuBLASLt is missing, which prompts need on this backend ({str(error).splitlines()[0]}): pip install "
            "nvidia-cublas."
        ) from None


class Products:
    """cuBLASLt on the current GPU."""

    def __init__(self) -> None:
        self._library = load_library()
        self._handle = ctypes.c_void_p()
        self._call("cublasLtCreate", ctypes.byref(self._handle))
        self._workspace = DeviceMemory(WORKSPACE, "cuBLASLt's workspace")
        self._preference = ctypes.c_void_p()
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(self._preference))
        size = ctypes.c_size_t(WORKSPACE)
        self._call(
            "cublasLtMatmulPreferenceSetAttribute",
            self._preference,
            _MAX_WORKSPACE,
            ctypes.byref(size),
            ctypes.c_size_t(8),
        )
        self._plans: dict[tuple[Kind, int], tuple[Any, ...]] = {}

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise WorkbookError(f"{name} of cuBLASLt failed with status {status}; see `glmtrt doctor`.")

    def _plan(self, kind: Kind, rows: int) -> tuple[Any, ...]:
        """Descriptors and the algorithm for this number of rows.

        The library stores matrices by columns: there the product is its own transpose, weights^T x.
        """
        key = kind, rows
        if key not in self._plans:
            result = _F32 if kind.sums or kind.fresh else _F16
            desc, layouts = ctypes.c_void_p(), []
            self._call("cublasLtMatmulDescCreate", ctypes.byref(desc), _COMPUTE_F32, _F32)
            for attribute, value in ((_TRANSA, _T), (_EPILOGUE, _EPILOGUES[kind.after])):
                self._set(desc, attribute, ctypes.c_int32(value))
            if kind.after:
                self._set(desc, _BIAS, ctypes.c_void_p(256))  # there is one: it may matter to what is chosen
            for dtype, height, columns in (
                (_F16, kind.width, kind.outputs), (_F16, kind.width, rows), (result, kind.outputs, rows)
            ):  # fmt: skip
                layout = ctypes.c_void_p()
                self._call(
                    "cublasLtMatrixLayoutCreate", ctypes.byref(layout), dtype, ctypes.c_uint64(height),
                    ctypes.c_uint64(columns), ctypes.c_int64(height),
                )  # fmt: skip
                layouts.append(layout)
            found, count = _Heuristic(), ctypes.c_int()
            a, b, c = layouts
            found_of = ctypes.byref(found), ctypes.byref(count)
            self._call("cublasLtMatmulAlgoGetHeuristic", self._handle, desc, a, b, c, c, self._preference, 1, *found_of)
            if not count.value:
                raise WorkbookError(f"cuBLASLt has no way to make a product of {rows} rows with {kind} on this GPU.")
            self._plans[key] = desc, a, b, c, found
        return self._plans[key]

    def _set(self, desc: Any, attribute: int, value: Any) -> None:
        self._call(
            "cublasLtMatmulDescSetAttribute",
            desc,
            attribute,
            ctypes.byref(value),
            ctypes.c_size_t(ctypes.sizeof(value)),
        )

    def multiply(self, kind: Kind, rows: int, x: int, weights: int, result: int, bias: int, stream: Any) -> None:
        """Enqueue a product of what lies at these addresses."""
        desc, a, b, c, found = self._plan(kind, rows)
        if kind.after:
            self._set(desc, _BIAS, ctypes.c_void_p(bias))
        one, beta = ctypes.c_float(1), ctypes.c_float(1 if kind.sums else 0)
        place = ctypes.c_void_p(result)
        self._call(
            "cublasLtMatmul", self._handle, desc, ctypes.byref(one), ctypes.c_void_p(weights), a, ctypes.c_void_p(x), b,
            ctypes.byref(beta), place, c, place, c, ctypes.byref(found), ctypes.c_void_p(self._workspace.address),
            ctypes.c_size_t(WORKSPACE), ctypes.c_void_p(int(stream)),
        )  # fmt: skip

    def close(self) -> None:
        for desc, *layouts, _ in self._plans.values():
            self._call("cublasLtMatmulDescDestroy", desc)
            for layout in layouts:
                self._call("cublasLtMatrixLayoutDestroy", layout)
        self._plans.clear()
        self._workspace.free()
        self._call("cublasLtMatmulPreferenceDestroy", self._preference)
        self._call("cublasLtDestroy", self._handle)
