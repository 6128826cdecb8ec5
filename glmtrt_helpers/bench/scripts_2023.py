"""Export and build as the scripts of 2023 did, for comparison: every step holds the weights, some hold them twice.

python -m glmtrt_helpers.bench.scripts_2023 export|build DIR OUTPUT
"""

import sys
from pathlib import Path

from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.progress import say
from glmtrt_helpers.engines.builder import add_profiles
from glmtrt_helpers.engines.callbacks import make_log
from glmtrt_helpers.engines.profiles import chat_profiles
from glmtrt_helpers.graphs.tensorrt_parser import parse

GRAPH, PLAN = "scripts_2023.onnx", "scripts_2023.plan"


def export(directory: Path, output: Path) -> None:
    """Load all weights, trace the model with them, and write them into the ONNX file."""
    # Here, or PyTorch would count in the memory of `build`, which does without it.
    import torch

    from glmtrt_helpers.checkpoints import loading
    from glmtrt_helpers.export import exporting

    say("loading the weights")
    checkpoint = open_checkpoint(directory)
    model = loading.load_model(checkpoint, torch.float16)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    say("tracing")
    with exporting.quiet():
        exporting.torchscript_export(model, checkpoint, torch.float16, 17, exporting.EXAMPLE, str(output / GRAPH))


def build(directory: Path, output: Path) -> None:
    """Read the whole file, parse it from memory, and hold the whole plan before writing it."""
    checkpoint = open_checkpoint(directory)
    trt = tensorrt_package.choose(building=True).module
    log = make_log(trt)
    say("reading the file")
    data = (output / GRAPH).read_bytes()
    say("parsing")
    builder, network, parser, errors = parse(trt, log, data)
    if errors:
        raise SystemExit(errors[0])
    config = builder.create_builder_config()
    add_profiles(builder, network, config, chat_profiles(checkpoint))
    say("building")
    plan = builder.build_serialized_network(network, config)
    del parser  # it owns the weights until here
    say("writing")
    (output / PLAN).write_bytes(plan)


if __name__ == "__main__":
    {"export": export, "build": build}[sys.argv[1]](*map(Path, sys.argv[2:4]))
