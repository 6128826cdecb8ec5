"""The four patches on the stand-in's source: the files, the numbers, and the failure that each patch prevents."""

import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from support.checkpoints import make_random

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.inputs.names import STEP_INPUTS, axis_names, flat_outputs, forward_kwargs, input_names, output_names
from glmtrt_helpers.patches import patching

ALL = [patch.name for patch in patching.PATCHES]
Load = Callable[..., torch.nn.Module]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """2 layers, hidden 64, 4 heads, 256 positions; its directory is only read."""
    directory = tmp_path_factory.mktemp("small") / "chatglm_small"
    return open_checkpoint(make_random(directory, inner_hidden_size=128, max_sequence_length=256))


@pytest.fixture(scope="module")
def source(small: Checkpoint) -> str:
    return small.code.read_bytes().decode("utf-8")


@pytest.fixture(scope="module")
def load(small: Checkpoint, source: str, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Load the model from its source with some patches; always a fresh one."""

    @cache
    def code(names: tuple[str, ...]) -> Path:
        file = tmp_path_factory.mktemp("code") / "modeling_chatglm.py"
        file.write_bytes(patching.patch_source(source, small.max_length, names).encode("utf-8"))
        return file

    def build(names: list[str], dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        return loading.load_model(small, dtype, code=code(tuple(names)))

    return build


def without(name: str) -> list[str]:
    return [other for other in ALL if other != name]


def states(source: str) -> dict[str, str]:
    return {name: blocker.state for name, blocker in patching.find_blockers(source).items()}


def run(model: torch.nn.Module, flat: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return flat_outputs(model(**forward_kwargs(flat)))


# ---------------------------------------------------------------- source and files


def test_the_template_has_all_blockers_and_everything_else_stays(source: str, small: Checkpoint) -> None:
    assert states(source) == dict.fromkeys(ALL, "unpatched")
    patched = patching.patch_source(source, small.max_length)
    assert patching.patch_source(patched, small.max_length) == patched
    changed = [line for line in patching.diff_sources(source, patched).splitlines() if line.startswith(("+", "-"))]
    gone, new = ([line[1:].strip() for line in changed if line[0] == sign and line[:3] != sign * 3] for sign in "-+")
    assert [line for line in new if "flatten(1, 2)" in line] and not [line for line in new if "squeeze(1)" in line]
    assert "layer_id=i, layer_past=layer_past, use_cache=use_cache," in new
    assert "attention_scores.masked_fill_(attention_mask, -10000.0)" in new
    assert "t = torch.arange(seq_len, device=x.device).to(self.inv_freq.dtype)" in new
    assert not [line for line in gone if line.startswith("#") and line not in new], "a comment was lost"
    assert patching.diff_sources(source, source) == ""


@pytest.mark.parametrize("name", ALL)
def test_one_patch_leaves_the_other_blockers(name: str, source: str) -> None:
    expected = {other: "patched" if other == name else "unpatched" for other in ALL}
    assert states(patching.patch_source(source, 256, [name])) == expected


def test_patch_check_and_restore_a_checkpoint(tiny_random: Path) -> None:
    code, backup = tiny_random / "modeling_chatglm.py", tiny_random / "modeling_chatglm.py.orig"
    code.write_bytes(b"\xef\xbb\xbf" + code.read_bytes().replace(b"\n", b"\r\n") + b"# no line end")
    pristine = code.read_bytes()
    assert {blocker.state for blocker in patching.check_checkpoint(tiny_random).values()} == {"unpatched"}
    assert code.read_bytes() == pristine and not backup.exists()

    assert patching.patch_checkpoint(tiny_random) == ALL
    patched = code.read_bytes()
    assert backup.read_bytes() == pristine
    assert patched.decode() == patching.patch_source(pristine.decode(), 1024)
    assert b"seq_len = 1024  #" in patched
    assert {blocker.state for blocker in patching.check_checkpoint(tiny_random).values()} == {"patched"}

    assert patching.patch_checkpoint(tiny_random) == []
    assert (code.read_bytes(), backup.read_bytes()) == (patched, pristine)

    assert patching.restore_checkpoint(tiny_random) is None
    assert code.read_bytes() == pristine and not backup.exists()
    with pytest.raises(WorkbookError, match=r"\.orig is missing: nothing was patched"):
        patching.restore_checkpoint(tiny_random)


def test_patching_in_two_steps_keeps_the_first_backup(tiny_random: Path) -> None:
    code = tiny_random / "modeling_chatglm.py"
    pristine = code.read_bytes()
    assert patching.patch_checkpoint(tiny_random, only=[ALL[2]]) == [ALL[2]]
    assert patching.patch_checkpoint(tiny_random) == without(ALL[2])
    assert code.read_bytes().decode() == patching.patch_source(pristine.decode(), 1024)
    patching.restore_checkpoint(tiny_random)
    assert code.read_bytes() == pristine


def test_a_source_that_came_patched_gets_no_backup_and_a_half_patched_one_the_other_patches(tiny_random: Path) -> None:
    code, backup = tiny_random / "modeling_chatglm.py", tiny_random / "modeling_chatglm.py.orig"
    pristine = code.read_bytes().decode()
    code.write_bytes(patching.patch_source(pristine, 1024).encode())
    assert patching.patch_checkpoint(tiny_random) == [] and not backup.exists()
    half = patching.patch_source(pristine, 1024, ["rotary_flatten"]).encode()
    code.write_bytes(half)
    assert patching.patch_checkpoint(tiny_random) == without("rotary_flatten")
    assert backup.read_bytes() == half and code.read_bytes().decode() == patching.patch_source(pristine, 1024)


def test_a_backup_of_another_source_is_neither_used_nor_overwritten(tiny_random: Path) -> None:
    code, backup = tiny_random / "modeling_chatglm.py", tiny_random / "modeling_chatglm.py.orig"
    pristine = code.read_bytes()
    patching.patch_checkpoint(tiny_random)
    newer = pristine + b"# a newer revision\n"
    code.write_bytes(newer)
    with pytest.raises(WorkbookError, match=r"\.orig is not the original of modeling_chatglm\.py"):
        patching.patch_checkpoint(tiny_random)
    assert (code.read_bytes(), backup.read_bytes()) == (newer, pristine)


@pytest.mark.parametrize("edit", [b"# by hand\n", b"def broken(:\n", b"\xff"])
def test_restoring_keeps_what_was_changed_by_hand(tiny_random: Path, edit: bytes) -> None:
    code = tiny_random / "modeling_chatglm.py"
    pristine, edited = code.read_bytes(), [code.with_name(f"{code.name}.edited{end}") for end in ("", "2")]
    for expected in edited:
        patching.patch_checkpoint(tiny_random)
        changed = code.read_bytes() + edit
        code.write_bytes(changed)
        assert patching.restore_checkpoint(tiny_random) == expected
        assert code.read_bytes() == pristine and expected.read_bytes() == changed
    assert edited[0].exists() and not code.with_name(f"{code.name}.orig").exists()


def test_restoring_half_a_patch_or_none_keeps_no_edit(tiny_random: Path) -> None:
    code, backup = tiny_random / "modeling_chatglm.py", tiny_random / "modeling_chatglm.py.orig"
    pristine = code.read_bytes()
    backup.write_bytes(pristine)
    assert patching.restore_checkpoint(tiny_random) is None
    patching.patch_checkpoint(tiny_random, only=[ALL[1]])
    assert patching.restore_checkpoint(tiny_random) is None
    assert code.read_bytes() == pristine and not list(tiny_random.glob("*.edited*"))


def test_an_old_backup_does_not_replace_a_newer_source(tiny_random: Path) -> None:
    code, backup = tiny_random / "modeling_chatglm.py", tiny_random / "modeling_chatglm.py.orig"
    pristine = code.read_bytes()
    patching.patch_checkpoint(tiny_random)
    newer = pristine + b"# a newer revision\n"
    code.write_bytes(newer)
    with pytest.raises(WorkbookError, match=r"no patch to undo .* newer revision, and stays; remove .*\.orig"):
        patching.restore_checkpoint(tiny_random)
    assert (code.read_bytes(), backup.read_bytes()) == (newer, pristine)
    backup.unlink()
    assert patching.patch_checkpoint(tiny_random) == ALL
    patching.restore_checkpoint(tiny_random)
    assert code.read_bytes() == newer


@pytest.mark.parametrize("change", ["hand edit", "newer source", "absent", "other backup", "length", "none"])
def test_check_and_patch_agree(tiny_random: Path, change: str) -> None:
    code, backup = tiny_random / "modeling_chatglm.py", tiny_random / "modeling_chatglm.py.orig"
    pristine = code.read_bytes()
    if change == "absent":
        code.write_text("import torch\n")
    else:
        patching.patch_checkpoint(tiny_random)
    if change == "hand edit":
        code.write_bytes(code.read_bytes() + b"# by hand\n")
    elif change == "newer source":
        code.write_bytes(pristine + b"# a newer revision\n")
    elif change == "other backup":
        backup.write_text("import torch\n")
    elif change == "length":
        config = json.loads((tiny_random / "config.json").read_text())
        (tiny_random / "config.json").write_text(json.dumps(config | {"max_sequence_length": 512}))
    before = {path.name: path.read_bytes() for path in tiny_random.iterdir()}
    messages = []
    for command in (patching.try_patching, patching.patch_checkpoint):
        try:
            command(tiny_random)
        except WorkbookError as error:
            messages.append(str(error))
    assert len(messages) == (0 if change == "none" else 2) and len(set(messages)) <= 1, messages
    assert {path.name: path.read_bytes() for path in tiny_random.iterdir()} == before


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_interrupted_write_leaves_the_original_and_nothing_else(
    tiny_random: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    code, replace, calls = tiny_random / "modeling_chatglm.py", os.replace, []
    before = {file.name: file.read_bytes() for file in tiny_random.iterdir()}

    def interrupted(old: Any, new: Any) -> None:
        calls.append(new)
        assert Path(old).parent == tiny_random, "a rename over file systems is not atomic"
        assert code.read_bytes() == before[code.name], "the original was touched before the rename"
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            patching.patch_checkpoint(tiny_random)
    after = {file.name: file.read_bytes() for file in tiny_random.iterdir()}
    kept = {code.name + ".orig": before[code.name]} if fails_at == 2 else {}
    assert after == before | kept
    assert patching.patch_checkpoint(tiny_random) == ALL


def test_a_linked_source_is_replaced_not_written_through(tiny_random: Path, tmp_path: Path) -> None:
    """A hub cache lays its files out as links to blobs that other checkpoints share."""
    code, blob = tiny_random / "modeling_chatglm.py", tmp_path / "blob"
    code.rename(blob)
    code.symlink_to(blob)
    pristine = blob.read_bytes()
    patching.patch_checkpoint(tiny_random)
    assert blob.read_bytes() == pristine and code.read_bytes() != pristine
    patching.restore_checkpoint(tiny_random)
    assert code.read_bytes() == pristine


def test_length_of_the_table_follows_the_configuration(tiny_random: Path) -> None:
    path = tiny_random / "config.json"
    config = json.loads(path.read_text())
    del config["max_sequence_length"]
    path.write_text(json.dumps(config))
    patching.patch_checkpoint(tiny_random)
    assert "seq_len = 2048  #" in (tiny_random / "modeling_chatglm.py").read_text()
    path.write_text(json.dumps(config | {"max_sequence_length": 512}))
    with pytest.raises(WorkbookError, match=r"modeling_chatglm\.py: line \d+: .*512, rows; restore and patch again"):
        patching.patch_checkpoint(tiny_random)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("modeling_chatglm.py", None, r"modeling_chatglm\.py is missing"),
        ("modeling_chatglm.py", b"x = 1\ndef f(:\n", r"modeling_chatglm\.py: line 2: this is not Python"),
        ("modeling_chatglm.py", b"\xff\xfe\0", r"modeling_chatglm\.py is not UTF-8"),
        (
            "modeling_chatglm.py",
            b"import torch\n",
            r"modeling_chatglm\.py: .*nor patched \(rotary_flatten",
        ),
        ("config.json", b"{", r"config\.json is not JSON"),
        (
            "config.json",
            b'{"max_sequence_length": "2048"}',
            r"config\.json holds what is not expected there .*max_sequence_length",
        ),
    ],
)
def test_bad_files_are_one_clear_sentence(tiny_random: Path, file: str, content: bytes | None, words: str) -> None:
    (tiny_random / file).unlink()
    if content is not None:
        (tiny_random / file).write_bytes(content)
    with pytest.raises(WorkbookError, match=words) as refusal:
        patching.patch_checkpoint(tiny_random)
    assert "\n" not in str(refusal.value)
    assert not (tiny_random / "modeling_chatglm.py.orig").exists()


# ---------------------------------------------------------------- numbers

SHAPES = {
    "prefill": {"batch": 1, "sequence": 9, "past": 0},
    "decode": {"batch": 1, "sequence": 1, "past": 9},
    "zero-length past": {"batch": 2, "sequence": 5, "past": 0},
    "left-padded prefill": {"batch": 3, "sequence": 8, "past": 0, "padding": (0, 3, 5)},
    "left-padded decode": {"batch": 2, "sequence": 1, "past": 8, "padding": (0, 4)},
}


@pytest.mark.parametrize("names", [[name] for name in ALL] + [ALL], ids=[*ALL, "all"])
def test_patched_computes_what_unpatched_computes(small: Checkpoint, load: Load, names: list[str]) -> None:
    """Bit for bit, also where the mask hides nothing and where forward gets no past at all."""
    before, after = load([]), load(names)
    for shape in SHAPES.values():
        flat = example_inputs(small, **shape)
        expected, actual = run(before, flat), run(after, flat)
        assert all(torch.equal(expected[key], actual[key]) for key in expected)
    no_past = {key: tensor for key, tensor in example_inputs(small, 2, 5, 0).items() if "past" not in key}
    assert torch.equal(run(before, no_past)["logits"], run(after, no_past)["logits"])


def test_numbers_in_half_precision_at_the_last_position(small: Checkpoint, load: Load) -> None:
    flat = example_inputs(small, 1, 4, small.max_length - 4, torch.float16)
    expected, actual = (run(load(names, torch.float16), flat) for names in ([], ALL))
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    beyond = flat | {"position_ids": flat["position_ids"] + small.max_length}
    with pytest.raises(IndexError):
        run(load(ALL, torch.float16), beyond)


# ---------------------------------------------------------------- the failures


def trace(
    model: torch.nn.Module, checkpoint: Checkpoint, example: dict[str, torch.Tensor]
) -> tuple[onnx.ModelProto, int]:
    """Export with the TorchScript exporter; returns the graph and the number of tracer warnings."""
    names_in, names_out = input_names(checkpoint.num_layers), output_names(checkpoint.num_layers)
    buffer = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.onnx.export(
            model,
            kwargs=forward_kwargs(example),
            f=buffer,
            dynamo=False,
            do_constant_folding=False,
            opset_version=18,
            input_names=names_in,
            output_names=names_out,
            dynamic_axes={name: axis_names(name) for name in (*names_in, *names_out)},
        )
    graph = onnx.load_from_string(buffer.getvalue())
    return graph, sum(issubclass(warning.category, torch.jit.TracerWarning) for warning in caught)


def counts(graph: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph.node)


def ort(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feed(session: onnxruntime.InferenceSession, flat: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = session.run(["logits"], {tensor.name: flat[tensor.name].numpy() for tensor in session.get_inputs()})[0]
    return torch.from_numpy(logits)


@pytest.fixture(scope="module")
def example(small: Checkpoint) -> dict[str, torch.Tensor]:
    return example_inputs(small, 2, 5, 3)


def test_flatten_replaces_the_squeezes_of_the_tables(
    small: Checkpoint, load: Load, example: dict[str, torch.Tensor]
) -> None:
    """Two tables, looked up twice in each layer; the exporter keeps one of equal nodes."""
    plain, flat = (
        counts(trace(load(names), small, example)[0]) for names in (without("rotary_flatten"), ["rotary_flatten"])
    )
    assert plain["Flatten"] == 0 and flat["Flatten"] == 4 and plain["Squeeze"] - flat["Squeeze"] == 4


def test_a_python_int_for_the_layer_silences_the_tracer(
    small: Checkpoint, load: Load, example: dict[str, torch.Tensor]
) -> None:
    warned = {name: trace(load(names), small, example)[1] for name, names in (("none", []), ("all", ALL))}
    alone = trace(load(["integer_layer_id"]), small, example)[1]
    left_out = trace(load(without("integer_layer_id")), small, example)[1]
    # torch.tensor(i) and float(layer_id + 1), in each layer.
    assert warned["none"] - alone == left_out - warned["all"] == 2 * small.num_layers


@pytest.mark.slow
def test_dynamo_refuses_the_branch_on_the_mask(small: Checkpoint, load: Load, example: dict[str, torch.Tensor]) -> None:
    def export(names: list[str]) -> torch.onnx.ONNXProgram | None:
        dynamic = torch.export.Dim.DYNAMIC
        past = {0: dynamic, 1: dynamic}
        shapes = {name: dict.fromkeys(axis_names(name), dynamic) for name in STEP_INPUTS}
        shapes |= {"past_key_values": ((past, past),) * small.num_layers, "use_cache": None, "return_dict": None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                load(names),
                kwargs=forward_kwargs(example),
                dynamo=True,
                optimize=False,
                dynamic_shapes=shapes,
                verbose=False,
            )

    with pytest.raises(torch.onnx.OnnxExporterError, match="GuardOnDataDependentSymNode"):
        export(without("unconditional_mask_fill"))
    program = export(["unconditional_mask_fill"])
    assert program is not None and "attention_mask" in [value.name for value in program.model.graph.inputs]


def test_an_example_that_hides_nothing_loses_the_mask(small: Checkpoint, load: Load) -> None:
    decode = example_inputs(small, 2, 1, 4)
    assert not decode["attention_mask"].any()
    padded = example_inputs(small, 2, 1, 4, padding=(0, 2))
    expected = run(load([]), padded)["logits"]
    lost, kept = (
        trace(load(names), small, decode)[0]
        for names in (without("unconditional_mask_fill"), ["unconditional_mask_fill"])
    )
    names = input_names(small.num_layers)
    assert [value.name for value in lost.graph.input] == [name for name in names if name != "attention_mask"]
    assert [value.name for value in kept.graph.input] == names
    assert (feed(ort(lost), padded) - expected).abs().max() > 1e-3
    torch.testing.assert_close(feed(ort(kept), padded), expected, atol=1e-5, rtol=0)


def test_a_table_cached_by_an_earlier_call_becomes_a_constant(
    small: Checkpoint, load: Load, example: dict[str, torch.Tensor]
) -> None:
    later = example_inputs(small, 1, 40, 3)

    def export_after_a_chat(names: list[str]) -> onnxruntime.InferenceSession:
        model = load(names)
        with torch.no_grad():
            model(**forward_kwargs(example_inputs(small, 1, 12, 0)))
        return ort(trace(model, small, example)[0])

    baked = export_after_a_chat(without("fixed_rotary_table"))
    feed(baked, example)
    with pytest.raises(Exception, match=r"Gather.*out of data bounds"):
        feed(baked, later)
    expected = run(load([]), later)["logits"]
    torch.testing.assert_close(feed(export_after_a_chat(["fixed_rotary_table"]), later), expected, atol=1e-5, rtol=0)


def test_a_half_precision_range_is_refused_and_patched_away(small: Checkpoint, load: Load) -> None:
    half = example_inputs(small, 2, 5, 3, torch.float16)
    with_range, fixed = (
        trace(load(names, torch.float16), small, half)[0]
        for names in (without("fixed_rotary_table"), ["fixed_rotary_table"])
    )
    with pytest.raises(Exception, match=r"float16.*\(Range\).*is invalid"):
        ort(with_range)
    assert counts(with_range)["Range"] and not counts(fixed)["Range"] and not counts(fixed)["ReduceMax"]
    expected = run(load([], torch.float16), half)["logits"]
    torch.testing.assert_close(feed(ort(fixed), half), expected, atol=2e-3, rtol=0)
