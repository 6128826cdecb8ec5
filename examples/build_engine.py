"""Build a TensorRT engine with two profiles from an ONNX file: python build_engine.py MODEL.onnx OUTPUT.plan

TensorRT-RTX builds without a GPU. For the full package, which needs one, import tensorrt in place of tensorrt_rtx. Its
release 10 computes in the precision of the graph only in a strongly typed network, which is made by
create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)); in release 11 every network is one.
"""

import sys
from pathlib import Path

import tensorrt_rtx as trt

# The smallest, typical and largest size of each dynamic dimension: one profile for prompts, one for decoding.
PREFILL = {"batch": (1, 1, 1), "sequence": (1, 128, 2047), "past": (0, 0, 0), "total": (1, 128, 2047)}
DECODE = {"batch": (1, 1, 1), "sequence": (1, 1, 1), "past": (1, 512, 2047), "total": (2, 513, 2048)}
AXES = {
    "input_ids": ("batch", "sequence"),
    "position_ids": ("batch", 2, "sequence"),
    "attention_mask": ("batch", 1, "sequence", "total"),
}


def build(onnx_path, plan_path, profiles=(PREFILL, DECODE)):
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):  # the file, not its bytes: the weights are next to it
        raise RuntimeError(str(parser.get_error(0)))
    config = builder.create_builder_config()
    for sizes in profiles:
        profile = builder.create_optimization_profile()
        for tensor in (network.get_input(i) for i in range(network.num_inputs)):
            axes = AXES.get(tensor.name, ("past", "batch", *tensor.shape[2:]))
            smallest, typical, largest = zip(*(sizes.get(axis, (axis,) * 3) for axis in axes), strict=True)
            profile.set_shape(tensor.name, smallest, typical, largest)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT did not build the engine; its log says why")
    Path(plan_path).write_bytes(plan)


if __name__ == "__main__":
    build(*sys.argv[1:])
