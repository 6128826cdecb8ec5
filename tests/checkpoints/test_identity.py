"""An export and the files that it was made from: whatever changed since is one sentence, in every command."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import SHARD, to_bin
from support.command_line import InProcess
from support.exporting import editing, exported_copy, path_of, shift_weight

from glmtrt_helpers.checkpoints import identity
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.identity import CODE_KEY, CONFIG_KEY, SHARDS_KEY, open_export
from glmtrt_helpers.core import processes
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.export import exporting
from glmtrt_helpers.patches import patching

WEIGHT = "transformer.layers.0.mlp.dense_h_to_4h.weight"
Change = Callable[[Checkpoint], object]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return exported_copy(tmp_path)


@pytest.fixture(autouse=True)
def no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """`build` starts its process again unless large pages have been decided on."""
    monkeypatch.setenv(processes.MALLOC_VARIABLE, f"{processes.HUGE_PAGES}=0")


def shard(checkpoint: Checkpoint) -> Path:
    return checkpoint.tensors[WEIGHT].file


def other_shard(checkpoint: Checkpoint) -> Path:
    return next(tensor.file for tensor in checkpoint.tensors.values() if tensor.file != shard(checkpoint))


def save_again(checkpoint: Checkpoint) -> None:
    file = shard(checkpoint)
    save_file(load_file(file), file, metadata={"format": "pt", "saved": "by another program, and longer than before"})


def reorder_header(checkpoint: Checkpoint) -> None:
    """The same tensors at the same offsets and the same size; only the order of the keys differs."""
    file = shard(checkpoint)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode()
    assert len(text) <= length
    file.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])


def set_dtype(checkpoint: Checkpoint) -> None:
    """BF16 is a letter longer than F16; one space of the padding goes."""
    file = shard(checkpoint)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length].rstrip().replace(b'"F16"', b'"BF16"', 1)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def flip(checkpoint: Checkpoint, where: str) -> None:
    tensor = checkpoint.tensors[WEIGHT]
    assert tensor.offset is not None
    at = {"start": 0, "middle": tensor.nbytes // 2, "between": identity.SAMPLE + 10}[where]
    assert where != "between" or at < tensor.nbytes // 2
    data = bytearray(tensor.file.read_bytes())
    data[tensor.offset + at] ^= 1
    tensor.file.write_bytes(data)


def swap(checkpoint: Checkpoint) -> None:
    one, other = shard(checkpoint), other_shard(checkpoint)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def edit_code(checkpoint: Checkpoint) -> None:
    checkpoint.code.write_text(checkpoint.code.read_text() + "\n# edited\n")


def edit_config(checkpoint: Checkpoint, **fields: object) -> None:
    path = checkpoint.directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def drop(key: str) -> Change:
    def change(checkpoint: Checkpoint) -> None:
        with editing(path_of(checkpoint)) as model:
            kept = [(entry.key, entry.value) for entry in model.metadata_props if entry.key != key]
            del model.metadata_props[:]
            for name, value in kept:
                model.metadata_props.add(key=name, value=value)

    return change


def edit_record(checkpoint: Checkpoint, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    with editing(path_of(checkpoint)) as model:
        entry = next(entry for entry in model.metadata_props if entry.key == SHARDS_KEY)
        record = json.loads(entry.value)
        change(record)
        entry.value = json.dumps(record)


def truncate(checkpoint: Checkpoint) -> None:
    shard(checkpoint).write_bytes(shard(checkpoint).read_bytes()[:-1])


def append(checkpoint: Checkpoint) -> None:
    shard(checkpoint).write_bytes(shard(checkpoint).read_bytes() + b"\0")


HEADER = r"its header differs \([\d,]+ bytes instead of [\d,]+\), as when another program saved it again"
SIZE, CONTENT = r"its size differs \([\d,]+ bytes instead of [\d,]+\)", "its content differs"
OLDER = "is missing\\), so it is of an older version"
CHANGES: dict[str, tuple[Change, str]] = {
    "saved by another program": (save_again, HEADER),
    "header in another order": (reorder_header, HEADER),
    "another dtype": (set_dtype, HEADER),
    "first byte of a weight": (lambda c: flip(c, "start"), CONTENT),
    "middle of a weight": (lambda c: flip(c, "middle"), CONTENT),
    "two shards swapped": (swap, "the file that"),
    "truncated": (truncate, SIZE),
    "appended bytes": (append, SIZE),
    "renamed": (lambda c: shard(c).rename(shard(c).with_name("renamed.safetensors")), "is missing, and"),
    "edited source": (edit_code, "another version of modeling_chatglm.py"),
    "an edited configuration": (lambda c: edit_config(c, layernorm_epsilon=2e-5), "another config.json than"),
    "a shorter context": (lambda c: edit_config(c, max_sequence_length=512), "another config.json than"),
    "no record of the configuration": (drop(CONFIG_KEY), OLDER),
    "no record of the shards": (drop(SHARDS_KEY), OLDER),
    "no record of the source": (drop(CODE_KEY), OLDER),
    "a damaged record": (lambda c: edit_record(c, lambda r: r[SHARD].update(size="1")), "has damaged metadata"),
    "no shard": (lambda c: edit_record(c, lambda r: r.clear()), "has damaged metadata"),
    "a shard too many": (
        lambda c: edit_record(c, lambda r: r.update({"../x": r[SHARD]})),
        "has damaged metadata",
    ),
    "a shard too few": (lambda c: edit_record(c, lambda r: r.pop(SHARD)), "was exported from .* now: "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_since_the_export_is_named(checkpoint: Checkpoint, change: str) -> None:
    make, message = CHANGES[change]
    assert open_export(path_of(checkpoint)).origin is not None
    make(checkpoint)
    with pytest.raises(WorkbookError, match=message) as caught:
        open_export(path_of(checkpoint))
    sentence = str(caught.value)
    assert f"`glmtrt export {checkpoint.directory}` again" in sentence and "\n" not in sentence
    assert message not in (SIZE, CONTENT, HEADER) or shard(checkpoint).name in sentence


def test_a_configuration_written_in_another_order_is_the_same(checkpoint: Checkpoint) -> None:
    path = checkpoint.directory / "config.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert open_export(path_of(checkpoint)).origin


def test_the_whole_content_is_compared_where_it_is_asked_for(checkpoint: Checkpoint) -> None:
    flip(checkpoint, "between")
    assert open_export(path_of(checkpoint)).origin
    with pytest.raises(WorkbookError, match=f"{shard(checkpoint).name} is not the file .*, {CONTENT}"):
        open_export(path_of(checkpoint), whole=True)


COMMANDS: dict[str, Callable[[Checkpoint], tuple[object, ...]]] = {
    "chat": lambda c: ("chat", c.directory, "--backend", "ort", "--prompt", "the"),
    "inspect": lambda c: ("inspect", path_of(c)),
    "verify": lambda c: ("verify", c.directory),
    "build": lambda c: ("build", c.directory),
}


def run(glmtrt: InProcess, command: str, checkpoint: Checkpoint) -> tuple[int, list[str]]:
    code, lines = glmtrt(*COMMANDS[command](checkpoint))
    return code, [line for line in lines if line]  # a progress bar ends with an empty one


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("change", ["saved by another program", "edited source", "no record of the shards"])
def test_every_command_that_reads_an_export_says_so(
    checkpoint: Checkpoint, glmtrt: InProcess, command: str, change: str
) -> None:
    make, message = CHANGES[change]
    make(checkpoint)
    code, lines = run(glmtrt, command, checkpoint)
    assert code == 1 and len(lines) == 1 and re.search(message, lines[0]), lines
    assert not list(checkpoint.directory.glob("*.plan*"))


@pytest.mark.parametrize("command", ["verify", "build"])
def test_verify_and_build_compare_every_byte(checkpoint: Checkpoint, glmtrt: InProcess, command: str) -> None:
    flip(checkpoint, "between")
    code, lines = run(glmtrt, command, checkpoint)
    assert code == 1 and len(lines) == 1 and CONTENT in lines[0], lines


def point(location: str | None = None, offset: str | None = None, length: str | None = None) -> Change:
    def change(checkpoint: Checkpoint) -> None:
        with editing(path_of(checkpoint)) as model:
            tensor = next(tensor for tensor in model.graph.initializer if tensor.name == WEIGHT)
            for entry in tensor.external_data:
                new = {"location": location, "offset": offset, "length": length}[entry.key]
                entry.value = entry.value if new is None else new

    return change


def two_bytes_on(checkpoint: Checkpoint) -> None:
    with editing(path_of(checkpoint)) as model:
        shift_weight(WEIGHT, 2)(model)


def to_another(checkpoint: Checkpoint) -> None:
    """The bytes of the next layer's weight, which has the same shape."""
    source = checkpoint.tensors[WEIGHT.replace("layers.0", "layers.1")]
    point(source.file.name, str(source.offset))(checkpoint)


def edit_tensor(**fields: object) -> Change:
    def change(checkpoint: Checkpoint) -> None:
        with editing(path_of(checkpoint)) as model:
            tensor = next(tensor for tensor in model.graph.initializer if tensor.name == WEIGHT)
            for name, value in fields.items():
                if name == "dims":
                    del tensor.dims[:]
                    tensor.dims.extend(value)  # type: ignore[arg-type]
                else:
                    setattr(tensor, name, value)

    return change


def through_a_link(checkpoint: Checkpoint) -> None:
    (checkpoint.directory / "link.bin").symlink_to("/etc/passwd")
    point("link.bin", "0")(checkpoint)


def through_a_folder(checkpoint: Checkpoint) -> None:
    (checkpoint.directory / "link").symlink_to("/etc")
    point("link/passwd", "0")(checkpoint)


PLACES: dict[str, tuple[Change, str]] = {
    "negative offset": (point(offset="-8"), "but not where"),
    "negative length": (point(length="-1"), "but not where"),
    "no number": (point(offset="ten"), "but not where"),
    "more than 64 bits": (point(offset="9" * 30), "but not where"),
    "too short": (point(length="2"), "but not where"),
    "two bytes on": (two_bytes_on, "that tensor is in .*, from byte"),
    "another tensor's": (to_another, "that tensor is in .*, from byte"),
    "beyond the end": (point(offset=str(2**40)), "ends at byte"),
    "absolute": (point("/etc/passwd", "0"), "which is not in its folder"),
    "the folder above": (point("../chatglm_random/../../etc/passwd", "0"), "which is not in its folder"),
    "nothing": (point(""), "but not where"),
    "missing": (point("no.safetensors"), "no.safetensors is missing, but"),
    "another file of the folder": (point("ice_text.model", "0", None), "(that tensor is in|ends at byte)"),
    "zero byte": (point("a\0b"), "is missing, but"),
    "a long name": (point("a" * 5000), "is missing, but"),
    "a link": (through_a_link, "which is not in its folder"),
    "a linked folder": (through_a_folder, "which is not in its folder"),
    "another dtype": (edit_tensor(data_type=onnx.TensorProto.BFLOAT16), "as bfloat16"),
    "no dtype": (edit_tensor(data_type=999), "but not where"),
    "turned": (edit_tensor(dims=[64, 256]), "its header says F16"),
    "negative dims": (edit_tensor(dims=[-256, -64]), "but not where"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_weight_that_points_elsewhere_is_named(checkpoint: Checkpoint, place: str) -> None:
    change, message = PLACES[place]
    change(checkpoint)
    with pytest.raises(WorkbookError, match=message) as caught:
        open_export(path_of(checkpoint))
    sentence = str(caught.value)
    assert repr(WEIGHT) in sentence and "export" in sentence and "\n" not in sentence


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["negative offset", "two bytes on", "absolute"])
def test_no_command_reads_elsewhere(checkpoint: Checkpoint, glmtrt: InProcess, command: str, place: str) -> None:
    change, message = PLACES[place]
    change(checkpoint)
    code, lines = run(glmtrt, command, checkpoint)
    assert code == 1 and len(lines) == 1 and re.search(message, lines[0]) and WEIGHT in lines[0], lines


def test_a_weight_in_an_attribute_or_a_subgraph_is_checked_too(checkpoint: Checkpoint) -> None:
    for place in ("attribute", "subgraph"):
        with editing(path_of(checkpoint)) as model:
            tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
            tensor.external_data.add(key="location", value="/etc/passwd")
            node = model.graph.node.add(op_type="Constant" if place == "attribute" else "If", output=["unused"])
            if place == "attribute":
                node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, t=tensor)
            else:
                inner = onnx.GraphProto(name="then", initializer=[tensor])
                node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH, g=inner)
        with pytest.raises(WorkbookError, match="'hidden' in '/etc/passwd', which is not in its folder"):
            open_export(path_of(checkpoint))
        with editing(path_of(checkpoint)) as model:
            model.graph.node.pop()


def test_every_export_records_its_origin(checkpoint: Checkpoint) -> None:
    """Also the other exporter's; a copy in another folder belongs to that folder's files, which are the same."""
    report = exporting.export_model(checkpoint, "fp32", exporter="torchscript")
    files = {tensor.file.name for tensor in checkpoint.tensors.values()}
    for path in (report.path, path_of(checkpoint), path_of(checkpoint, "fp32")):
        origin = open_export(path, whole=True).origin
        assert origin is not None and set(origin.shards) == files
        for name, shard in origin.shards.items():
            assert shard.content == identity.file_blake3(checkpoint.directory / name)
            assert shard.size == (checkpoint.directory / name).stat().st_size


def test_another_program_s_graph_is_not_asked_for_its_origin(tmp_path: Path) -> None:
    """But what it points into has to be there: notebook 02 runs such graphs."""
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 18]> g (float x) => (float y) { y = Abs(x) }')
    onnx.save(model, tmp_path / "model.onnx")
    assert open_export(tmp_path / "model.onnx").origin is None


@pytest.mark.slow
def test_shards_converted_from_bin_are_recorded(tiny_random: Path) -> None:
    to_bin(tiny_random)
    patching.patch_checkpoint(tiny_random)
    path = exporting.export_model(open_checkpoint(tiny_random)).path
    origin = open_export(path, whole=True).origin
    assert origin is not None and all(name.endswith(".safetensors") for name in origin.shards)


@pytest.mark.parametrize("folder", ["{0}/../{1}", "{0}/inside/..", "{0}/./", "{0}/../../{2}/{1}"])
def test_a_path_with_dots_is_the_same_export(checkpoint: Checkpoint, folder: str) -> None:
    directory = checkpoint.directory
    (directory / "inside").mkdir()
    same = Path(folder.format(directory, directory.name, directory.parent.name))
    expected = [tensor.file.name for tensor in open_export(path_of(checkpoint)).external]
    assert [tensor.file.name for tensor in open_export(same / path_of(checkpoint).name).external] == expected
