"""Notebook 05: make an fp16 engine accumulate matmuls and LayerNorms in fp32.

ONNX does not say in which precision an fp16 matmul accumulates, and a strongly typed network only says that its result
is fp16. By default TensorRT accumulates long fp16 sums in fp16, rounding again and again, and rounds a LayerNorm before
its weight and before its bias, too. PyTorch rounds each once, at the end. TensorRT documents a pattern that asks for
the same: all inputs cast to fp32, the operation, its output cast back. It recognizes the pattern and executes none of
the casts; kernels still read and write fp16.
"""

import mmap
import re
from collections import Counter
from pathlib import Path
from typing import Any


def accumulate_in_fp32(trt: Any, network: Any) -> int:
    """Put these casts around every fp16 matmul and LayerNorm of a parsed network; returns how many there were.

    Names, types and order of the network's outputs do not change. trt: the package's module.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    kinds = (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.NORMALIZATION)
    selected = {layer.name for layer in layers if layer.type in kinds and layer.get_output(0).dtype == trt.float16}
    rounded: dict[str, Any] = {}  # by the name of an fp32 output, the fp16 tensor that takes its place
    for layer in layers:  # in the order of the graph: what produces a layer's inputs comes before it
        for index in range(layer.num_inputs):
            original = layer.get_input(index)
            if original is None:
                continue
            tensor = rounded.get(original.name, original)
            if layer.name in selected:
                tensor = network.add_cast(tensor, trt.float32).get_output(0)
            if tensor is not original:
                layer.set_input(index, tensor)
        if layer.name in selected:
            output = layer.get_output(0)
            name, output.name = output.name, f"{output.name} in fp32"
            rounded[output.name] = network.add_cast(output, trt.float16).get_output(0)
            rounded[output.name].name = name
    for tensor in outputs:
        network.unmark_output(tensor)
    for tensor in outputs:
        network.mark_output(rounded.get(tensor.name, tensor))
    return len(selected)


def accumulation_types(plan: Path) -> Counter[str]:
    """How many matmuls of a plan accumulate in what; tensorrt-rtx notes it there in plain text, tensorrt does not."""
    names = {b"0": "TensorRT's default", b"2": "fp32"}
    with plan.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        types = re.findall(rb"accumulation_type=(\d)", text)
    return Counter(names.get(kind, kind.decode()) for kind in types)
