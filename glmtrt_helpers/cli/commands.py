"""The commands of `glmtrt`. Each imports what it needs itself, so that `glmtrt --help` starts quickly."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from glmtrt_helpers.cli import bench as bench_commands
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.progress import bytes_bar, phase_bars, say
from glmtrt_helpers.core.text import tell

HELP = """The steps of the notebooks on the command line.

Each command prints a short table and exits with 0 only if its work is done and correct. Bad input is answered with one
line on standard error and exit code 1, a wrong option with the usage and exit code 2.
"""
# rich_markup_mode: help as plain text, because loading rich takes longer than everything else in `glmtrt --help`.
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=HELP
)
app.add_typer(bench_commands.app, name="bench")
Directory = Annotated[Path, typer.Argument(help="a checkpoint, usually its working copy models/run/NAME")]
Dtype = Annotated[Literal["fp16", "fp32"], typer.Option()]
Seed = typer.Option(min=0, max=2**63 - 1, help="random seed, for the same numbers again")


@app.command()
def doctor(
    model: Annotated[Path | None, typer.Option(help="predict the GPU memory of an engine of this checkpoint")] = None,
    batch: Annotated[int, typer.Option(min=1, help="with --model: conversations at once")] = 1,
    length: Annotated[
        int | None, typer.Option(min=2, help="with --model: tokens of prompt and answer together (default: up to 2048)")
    ] = None,
    dtype: Dtype = "fp16",
) -> None:
    """Report this machine, and which parts of the workbook run on it."""
    from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
    from glmtrt_helpers.cli import doctor as checks
    from glmtrt_helpers.core.display import print_table

    if model:
        checkpoint = open_checkpoint(model)
        print_table(
            ["part", "size", "note"],
            checks.model_report(checkpoint, batch, length or min(2048, checkpoint.max_length), dtype),
            str(model),
        )
        return
    print_table(["item", "found", "meaning"], checks.report())
    print_table(["part", "small checkpoint", "real checkpoint (6.7 billion)"], checks.parts())


@app.command()
def standin(
    directory: Annotated[Path, typer.Argument(help="where to write the checkpoint")],
    size: Annotated[
        Literal["tiny", "300m", "6b"], typer.Option(help="tiny: trained; 300m and 6b: random weights, for measuring")
    ] = "tiny",
    weights: Annotated[
        Literal["safetensors", "bin"], typer.Option("--format", help="format of random weights")
    ] = "safetensors",
    seed: Annotated[int, Seed] = 0,
) -> None:
    """Train the stand-in, or write random weights of a larger size.

    Training took 48 minutes on two cores that did other work, too.
    """
    from glmtrt_helpers.core.display import print_table
    from glmtrt_helpers.standin import conversations, random_weights, train

    if size != "tiny":
        with bytes_bar("random weights") as show:
            random_weights.write_random(directory, size, weights=weights, seed=seed, progress=show)
        tell(f"{directory} holds random weights, for measuring: its answers mean nothing.")
        return
    results = train.build_standin(directory, seed=seed)
    written = sum(file.stat().st_size for file in directory.iterdir())
    rows: list[tuple[str, object]] = [("answers learned", len(conversations.load_corpus())), ("bytes", written)]
    rows += [(f"lowest margin, {name}", results[name]) for name in ("fp32", "fp16")]
    rows += [("right within a conversation", f"{results['conversations']:.0%}")]
    rows += [("refused outside the corpus", f"{results['outside']:.0%}")]
    print_table(["what", "value"], rows)


@app.command()
def copy(
    source: Annotated[Path, typer.Argument(help="a checkpoint")] = Path("models/chatglm_tiny"),
    full: Annotated[bool, typer.Option("--full", help="copy the shards, too, instead of linking them")] = False,
) -> None:
    """Make or refresh the working copy of a checkpoint.

    It is models/run/NAME; every later step reads and writes there.
    """
    from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint, unread_note
    from glmtrt_helpers.checkpoints.working_copy import hard_links_note, make_working_copy
    from glmtrt_helpers.core.display import print_table

    target = make_working_copy(source, full=full)
    opened = open_checkpoint(target)
    columns = ["working copy", "layers", "hidden", "tensors", "bytes of weights"]
    row = (str(target), opened.num_layers, opened.hidden_size, len(opened.tensors), opened.weight_bytes)
    print_table(columns, [row])
    _say_note(unread_note(opened))
    _say_note(hard_links_note(opened))


def _say_note(note: str) -> None:
    if note:
        tell(note)


@app.command()
def inputs(
    directory: Directory,
    prompt: Annotated[str, typer.Option(help="the question to record")] = "你好",
    max_new: Annotated[int, typer.Option(min=1, help="largest number of answer tokens")] = 32,
    layers: Annotated[
        int | None, typer.Option(min=1, help="run only the first LAYERS layers (default: 2 of a large checkpoint)")
    ] = None,
) -> None:
    """Record the inputs of forward during a chat, in inputs.json.

    Shapes, positions and masks do not depend on the number of layers, so two layers of a large checkpoint suffice.
    """
    import torch

    from glmtrt_helpers.checkpoints import loading
    from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
    from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
    from glmtrt_helpers.core.display import print_table
    from glmtrt_helpers.core.files import check_writable
    from glmtrt_helpers.inputs import recording
    from glmtrt_helpers.inputs.prompts import chat_prompt
    from glmtrt_helpers.sessions.decode_loop import greedy
    from glmtrt_helpers.sessions.pytorch import TorchSession

    checkpoint = open_checkpoint(directory)
    check_writable(checkpoint.directory / recording.RECORD_NAME)
    tokenizer = load_tokenizer(checkpoint)
    ids = chat_prompt(tokenizer, prompt)
    if layers and layers > checkpoint.num_layers:
        raise WorkbookError(f"{directory} has {checkpoint.num_layers} layers, fewer than --layers {layers}.")
    if len(ids) + max_new > checkpoint.max_length:
        room = checkpoint.max_length - len(ids)
        raise WorkbookError(
            f"{directory} has {checkpoint.max_length} positions, of which the prompt takes {len(ids)}: lower --max-new "
            f"to {room}."
            if room > 0
            else f"{directory} has {checkpoint.max_length} positions, the prompt alone takes {len(ids)}: shorten it."
        )
    part = checkpoint.first_layers(layers or (2 if checkpoint.is_large else checkpoint.num_layers))
    dtype = torch.float16 if checkpoint.is_large else torch.float32  # in fp16 the weights stay memory-mapped
    session = TorchSession(loading.load_model(part, dtype))
    with recording.record(session.model) as calls:
        answer = greedy(session, part, ids, max_length=len(ids) + max_new)
    path = recording.save_record(checkpoint, calls)
    names = ["input_ids", "position_ids", "attention_mask", "past_key_values.0.key"]
    rows = [(call.kind, *(str(tuple(call.shapes[name])) for name in names)) for call in (*calls[:3], calls[-1])]
    print_table(["call", *names], rows)
    tell(f"{tokenizer.decode(answer)}\n{len(calls)} calls recorded in {path}")
    if part.num_layers < checkpoint.num_layers:
        layers_text = f"the first {part.num_layers} of {checkpoint.num_layers} layers"
        tell(f"Run with {layers_text}: the answer means nothing, the shapes are right.")


@app.command()
def patch(
    directory: Directory,
    check: Annotated[bool, typer.Option("--check", help="change nothing; exit 1 if something is unpatched")] = False,
    restore: Annotated[bool, typer.Option("--restore", help="restore the original source")] = False,
) -> None:
    """Patch the export blockers in modeling_chatglm.py.

    The original source is kept next to it.
    """
    from glmtrt_helpers.checkpoints.working_copy import is_working_copy
    from glmtrt_helpers.core.display import print_table
    from glmtrt_helpers.patches import patching

    if check and restore:
        raise typer.BadParameter("--check changes nothing and --restore does: choose one of them.")
    if restore:
        edited = patching.restore_checkpoint(directory)
        tell(f"{directory / 'modeling_chatglm.py'} is the original again.", sys.stdout)
        _say_note(f"It had been changed by hand; that file is kept as {edited}." if edited else "")
        return
    before = patching.try_patching(directory)
    if not check:
        patching.patch_checkpoint(directory)
    now = patching.check_checkpoint(directory)
    rows = [(name, before[name].state, now[name].state, _lines(now[name])) for name in before]
    print_table(["patch", "before", "now", "at line"], rows)
    if before != now and not is_working_copy(directory):
        tell(f"{directory} is not a working copy: its own source is patched now; --restore brings the original back.")
    if any(blocker.state == "unpatched" for blocker in now.values()):
        raise typer.Exit(1)


def _lines(blocker: Any) -> str:
    return ", ".join(str(site.line) for site in blocker.sites)


@app.command()
def export(
    directory: Directory,
    dtype: Dtype = "fp16",
    exporter: Annotated[Literal["dynamo", "torchscript"], typer.Option()] = "dynamo",
    opset: Annotated[
        int | None,
        typer.Option(
            min=17, max=24, help="18 to 24 for dynamo, 17 to 20 for torchscript (default: 18, of packed weights 21)"
        ),
    ] = None,
) -> None:
    """Export the patched model to ONNX.

    The weights stay where they are: the graph refers to the bytes in the checkpoint's shards.
    """
    from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint, unread_note
    from glmtrt_helpers.checkpoints.working_copy import hard_links_note
    from glmtrt_helpers.core.display import print_table
    from glmtrt_helpers.export import exporting

    checkpoint = open_checkpoint(directory)
    done = exporting.export_model(checkpoint, dtype, exporter=exporter, opset=opset, progress=say)
    row = (str(done.path), done.file_bytes, done.referred_bytes, sum(done.nodes.values()), done.seconds)
    print_table(["written", "bytes", "bytes referred to in the shards", "nodes", "seconds"], [row])
    checkpoint = open_checkpoint(directory)  # with the shards that the export may have made
    _say_note(unread_note(checkpoint))
    _say_note(hard_links_note(checkpoint))


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="an ONNX model, or a working copy with exports")]) -> None:
    """Summarise an ONNX graph, or every graph of a working copy.

    Exit code 1 if a dimension is static that should be dynamic, or an input has no effect.
    """
    from glmtrt_helpers.core.artifacts import graphs_of
    from glmtrt_helpers.core.display import print_rich
    from glmtrt_helpers.graphs.checks import problems
    from glmtrt_helpers.graphs.summary import summarize

    found: list[str] = []
    for file in graphs_of(path):
        print_rich(summarize(file))
        found += [f"{file.name}: {problem}" for problem in problems(file)]
    for problem in found:
        tell(f"glmtrt: {problem}")
    if found:
        raise typer.Exit(1)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="an ONNX model")],
    second: Annotated[Path, typer.Argument(help="another one")],
) -> None:
    """Compare two ONNX graphs: opsets, inputs and outputs, nodes, weights, and where they part.

    Exit code 1 if they differ. Weights are compared by name, type and shape, constants by value.
    """
    from glmtrt_helpers.core.display import print_table
    from glmtrt_helpers.graphs.comparison import compare_graphs

    rows = [(each.what, each.first, each.second) for each in compare_graphs(first, second)]
    print_table(["difference", str(first), str(second)], rows or [("none", "", "")])
    if rows:
        raise typer.Exit(1)


@app.command()
def verify(
    directory: Directory,
    dtype: Dtype = "fp16",
    case: Annotated[list[str] | None, typer.Option(help="only cases whose name contains this; repeatable")] = None,
    onnx: Annotated[Path | None, typer.Option(help="another graph of this model (default: model.DTYPE.onnx)")] = None,
) -> None:
    """Compare an exported graph with PyTorch.

    The cases have shapes that the export did not use. Exit code 1 if an error exceeds the tolerance.
    """
    from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
    from glmtrt_helpers.core.display import print_rich
    from glmtrt_helpers.graphs import verification
    from glmtrt_helpers.graphs.reference import CASES

    selected = [each for each in CASES if not case or any(part in each.name for part in case)]
    for part in case or ():
        if not part or not any(part in each.name for each in CASES):
            names = ", ".join(repr(each.name) for each in CASES)  # some have a comma
            raise typer.BadParameter(f"{part!r} is part of no case's name: {names}.", param_hint="--case")
    result = verification.verify(open_checkpoint(directory), dtype, selected, onnx, progress=say)
    print_rich(result)
    for problem in result.problems:
        tell(f"glmtrt: {problem}")
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def locate(
    directory: Directory,
    dtype: Dtype = "fp16",
    onnx: Annotated[Path | None, typer.Option(help="another graph of this model (default: model.DTYPE.onnx)")] = None,
) -> None:
    """Find the layer and the node where a graph begins to differ from PyTorch.

    Exit code 1 if it differs.
    """
    from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
    from glmtrt_helpers.core.display import print_rich
    from glmtrt_helpers.graphs import locate

    found = locate.locate(open_checkpoint(directory), dtype, onnx, progress=say)
    print_rich(found)
    if found.first is None:
        tell("No point is over its tolerance.", sys.stdout)
        return
    tell(f"The first point over its tolerance: {found.first.name}.", sys.stdout)
    if found.fault:
        tell(
            f"The first node whose result PyTorch does not compute: {found.fault}. Look there, and at what it reads.",
            sys.stdout,
        )
    raise typer.Exit(1)


@app.command()
def quantize(
    directory: Directory,
    bits: Annotated[int, typer.Option(min=4, max=8, help="of a weight: 4, or 8 with one scale a row")],
    group: Annotated[
        int, typer.Option(min=32, max=128, help="4 bits: neighbours in a row that share a scale, 32, 64 or 128")
    ] = 32,
    method: Annotated[
        Literal["rtn", "gptq"],
        typer.Option(help="rtn: each weight to the nearest; gptq: by what it is multiplied with"),
    ] = "rtn",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help='gptq: conversations to calibrate with, a line each, as {"rounds": [["question", "answer"]]} '
            "(default: those about this workbook that the stand-in was trained with)"
        ),
    ] = None,
) -> None:
    """Write another working copy whose matrices are of 8 or 4 bits.

    It is models/run/NAME-int8 or NAME-int4. A run that was stopped goes on where it was.
    """
    from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
    from glmtrt_helpers.core.display import print_table
    from glmtrt_helpers.quantize import quantize_checkpoint
    from glmtrt_helpers.standin import conversations, train

    if calibration and method != "gptq":
        raise typer.BadParameter("only --method gptq calibrates.", param_hint="--calibration")
    before = open_checkpoint(directory)
    examples = conversations.load_corpus(calibration or conversations.CORPUS) if method == "gptq" else []
    sequences = train.encode_examples(before, examples)
    with bytes_bar(f"{bits} bits") as show:
        target = quantize_checkpoint(directory, bits, group, sequences=sequences, progress=show)
    after = open_checkpoint(target)
    columns = ["written", "bytes of weights", "before", "share"]
    share = after.weight_bytes / before.weight_bytes
    print_table(columns, [(str(target), after.weight_bytes, before.weight_bytes, f"{share:.0%}")])


@app.command()
def build(
    directory: Directory,
    dtype: Dtype = "fp16",
    batch: Annotated[str, typer.Option(help="batch as min,opt,max")] = "1,1,1",
    prompt: Annotated[
        str, typer.Option(help="tokens of a prompt as min,opt,max (default: up to the model's length)")
    ] = "",
    past: Annotated[
        str, typer.Option(help="tokens in the cache as min,opt,max (default: up to the model's length)")
    ] = "",
    package: Annotated[
        Literal["tensorrt-rtx", "tensorrt"] | None, typer.Option(help="default: what suits this GPU")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="tensorrt-rtx: only for this compute capability; repeatable")
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="weights may stay in host memory, for small GPUs")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="tensorrt: the plan also runs on other GPUs")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="tensorrt: later releases load the plan, too")
    ] = False,
    tf32: Annotated[bool, typer.Option(help="allow fp32 matmuls to round inputs to TF32")] = True,
    fp16_sums: Annotated[bool, typer.Option("--fp16-sums", help="allow fp16 matmuls to accumulate in fp16")] = False,
) -> None:
    """Build a TensorRT engine from the exported model; needs no GPU.

    Writes model.fp16.plan and a description of it in JSON.
    """
    from glmtrt_helpers.core.processes import restart_with_huge_pages

    restart_with_huge_pages()
    from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
    from glmtrt_helpers.core.display import print_table
    from glmtrt_helpers.engines import plan_info
    from glmtrt_helpers.engines.builder import BuildOptions, build_engine
    from glmtrt_helpers.engines.profiles import chat_profiles

    checkpoint = open_checkpoint(directory)
    texts = {"--batch": batch, "--prompt": prompt, "--past": past}
    ranges = [_range(text, what) if text else None for what, text in texts.items()]
    options = BuildOptions(
        tuple(target or ()), weight_streaming, hardware_compatible, version_compatible, tf32, fp16_sums
    )
    profiles = chat_profiles(checkpoint, *ranges)
    with phase_bars() as progress:
        built = build_engine(checkpoint, dtype, profiles, options=options, package=package, progress=progress)
    tell(built.package.reason)
    for index, profile in enumerate(built.info.profiles):
        rows = [row for row in plan_info.tensor_rows(built.info.tensors, index) if row[1] == "input"]
        columns = ["input", "dtype", "shape", "min", "opt", "max"]
        title = f"{built.plan.name}, profile {profile.name}"
        print_table(columns, [(row[0], *row[2:]) for row in (*rows[:4], rows[-1])], title)
    print_table(["written", "bytes", "seconds"], [(str(built.plan), built.info.plan_bytes, built.info.seconds)])


def _range(text: str, option: str) -> Any:
    from glmtrt_helpers.engines.profiles import Range

    try:
        return Range.parse(text, smallest=0 if option == "--past" else 1)
    except WorkbookError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


@app.command()
def chat(
    directory: Directory,
    backend: Annotated[
        Literal["torch", "ort", "tensorrt", "cuda"] | None,
        typer.Option(help="default: the fastest that can run here; cuda: one kernel a token, from the shards"),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="ask this, print only the answer, and exit")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="always take the most likely token")] = False,
    temperature: Annotated[
        float, typer.Option(min=0.01, max=100, help="divides the logits; higher is more random")
    ] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="keep the k most likely tokens; 0 keeps all")] = 50,
    top_p: Annotated[
        float,
        typer.Option(min=0.0001, max=1, help="keep the fewest tokens whose probability reaches this"),
    ] = 0.7,
    seed: Annotated[int | None, Seed] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="tokens of prompt and answer together")] = None,
    drop_oldest: Annotated[bool, typer.Option("--drop-oldest", help="at the limit, drop the oldest rounds")] = False,
    dtype: Dtype = "fp16",
) -> None:
    """Chat with the model.

    Ctrl-C ends an answer, an empty line or Ctrl-D the conversation.
    """
    from glmtrt_helpers.chat import backends, terminal
    from glmtrt_helpers.chat.conversation import Chat
    from glmtrt_helpers.chat.sampling import Sampling
    from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint

    terminal.use_utf8()
    checkpoint = open_checkpoint(directory)
    if max_length and max_length > checkpoint.max_length:
        raise WorkbookError(f"{directory} has {checkpoint.max_length} positions: --max-length can be no more.")
    if checkpoint.is_random:
        tell(f"{directory} holds random weights, for measuring: its answers mean nothing.")
    sampling = Sampling(greedy, temperature, top_k, top_p, seed)
    if backend is None:
        chosen, why = backends.best_backend(checkpoint, dtype)
        tell(f"Answering on {chosen}." + (f" Not on tensorrt: {why}" if why else ""))
    session = backends.open_session(checkpoint, backend or chosen, dtype)
    try:
        conversation = Chat(checkpoint, session, sampling, max_length=max_length, drop_oldest=drop_oldest)
        if prompt is not None:
            terminal.answer(conversation, prompt)
        else:
            terminal.converse(conversation)
    finally:
        session.close()


@app.command()
def workbook(
    model: Annotated[str, typer.Option(help="the checkpoint to run them on")] = "models/chatglm_tiny",
    output: Annotated[Path, typer.Option(help="folder for the executed copies")] = Path("build/notebooks"),
    only: Annotated[list[str] | None, typer.Option(help="only the notebook of this number, as 06; repeatable")] = None,
) -> None:
    """Execute every notebook in order, each in a clean kernel.

    One of --only reads what the notebooks before it have left in the working copy, and says what is missing there.
    """
    from glmtrt_helpers.workbook import run_notebooks

    paths = {path.name[:2]: path for path in run_notebooks.notebooks()}
    for number in only or ():
        if number not in paths:
            raise typer.BadParameter(
                f"there is no notebook {number!r}: choose {', '.join(paths)}.", param_hint="--only"
            )
    selected = [path for number, path in paths.items() if number in (only or paths)]
    tell(f"Executing {len(selected)} notebooks on {model} into {output}", sys.stdout)
    run_notebooks.run_all(model, output, selected)
