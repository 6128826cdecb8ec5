"""Notebook 05: what an fp16 engine computes in fp32 all the same.

ONNX does not say in which precision a product of fp16 numbers is summed up, and a strongly typed network only says that
the result is fp16. Left to itself TensorRT sums long products in fp16 and so rounds them many times; of a LayerNorm it
rounds what comes before the weight and what comes before the bias. PyTorch rounds each once, at its end. What makes
TensorRT do the same is a pattern that it documents: all inputs cast to fp32, the operation, its output cast back. No
such cast is carried out; kernels read and write the fp16 numbers as before.
"""

import mmap
import re
from collections import Counter
from pathlib import Path
from typing import Any


def round_once(trt: Any, network: Any) -> int:
    """Put those casts around every fp16 product and LayerNorm of a parsed network; returns how many there were.

    Names, types and order of the network's outputs stay what they were. trt: the package's module.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    kinds = (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.NORMALIZATION)
    chosen = {layer.name for layer in layers if layer.type in kinds and layer.get_output(0).dtype == trt.float16}
    rounded: dict[str, Any] = {}  # by the name of the fp32 tensor that is read no more
    for layer in layers:  # in the order of the graph, so that what a layer reads was dealt with
        for index in range(layer.num_inputs):
            given = layer.get_input(index)
            if given is None:
                continue
            tensor = rounded.get(given.name, given)
            if layer.name in chosen:
                tensor = network.add_cast(tensor, trt.float32).get_output(0)
            if tensor is not given:
                layer.set_input(index, tensor)
        if layer.name in chosen:
            exact = layer.get_output(0)
            name, exact.name = exact.name, f"{exact.name} in fp32"
            rounded[exact.name] = network.add_cast(exact, trt.float16).get_output(0)
            rounded[exact.name].name = name
    for tensor in outputs:
        network.unmark_output(tensor)
    for tensor in outputs:
        network.mark_output(rounded.get(tensor.name, tensor))
    return len(chosen)


def sums(plan: Path) -> Counter[str]:
    """How many of a plan's products are summed in what. tensorrt-rtx writes it legibly, the full tensorrt does not."""
    kinds = {b"0": "as TensorRT likes", b"2": "in fp32"}
    with plan.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        found = re.findall(rb"accumulation_type=(\d)", text)
    return Counter(kinds.get(kind, kind.decode()) for kind in found)
