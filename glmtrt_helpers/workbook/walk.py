"""Notebook 00: the whole walk, as a table and as one picture with the files on its arrows."""

from dataclasses import dataclass

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from glmtrt_helpers.core.display import PREFILL, SEEN

SHARDS = "the weights in the shards"


@dataclass(frozen=True)
class Step:
    """A notebook and its command. reads, writes: files of the working copy. at: place in the picture, in percent."""

    notebook: str
    command: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    at: tuple[float, float]


STEPS = (
    Step("00_start_here", "glmtrt copy", ("the checkpoint",), ("modeling_chatglm.py", SHARDS), (50, 94)),
    Step("01_debug_forward_inputs", "glmtrt inputs", ("modeling_chatglm.py", SHARDS), ("inputs.json",), (17, 72)),
    Step(
        "02_patch_rotary_flatten",
        "glmtrt patch",
        ("modeling_chatglm.py",),
        ("modeling_chatglm.py", "modeling_chatglm.py.orig"),
        (66, 72),
    ),
    Step("03_export_onnx", "glmtrt export", ("modeling_chatglm.py",), ("model.fp16.onnx",), (50, 50)),
    Step(
        "04_inspect_graph",
        "glmtrt verify",
        ("model.fp16.onnx", "modeling_chatglm.py.orig", SHARDS),
        (),
        (84, 28),
    ),
    Step(
        "05_build_profiles",
        "glmtrt build",
        ("inputs.json", "model.fp16.onnx", SHARDS),
        ("model.fp16.plan", "model.fp16.plan.json"),
        (17, 28),
    ),
    Step(
        "06_chat_inference",
        "glmtrt chat",
        ("model.fp16.plan", "model.fp16.plan.json", "model.fp16.onnx", "modeling_chatglm.py", SHARDS),
        (),
        (50, 6),
    ),
    Step(
        "07_make_it_fast",
        "glmtrt bench",
        ("model.fp16.plan", "model.fp16.onnx", "modeling_chatglm.py", SHARDS),
        (),
        (17, 6),
    ),
    Step(
        "08_debug_your_export",
        "glmtrt locate",
        ("model.fp16.onnx", "modeling_chatglm.py.orig", SHARDS),
        (),
        (84, 6),
    ),
)
# From, to, and the label: a file that the first writes and the second reads, and what the picture says of it.
ARROWS = (
    (0, 1, "modeling_chatglm.py", ""),
    (0, 2, "modeling_chatglm.py", ""),
    (1, 5, "inputs.json", ", for the notebook only"),
    (2, 3, "modeling_chatglm.py", ", patched"),
    (2, 4, "modeling_chatglm.py.orig", ""),
    (3, 4, "model.fp16.onnx", ""),
    (3, 5, "model.fp16.onnx", ""),
    (3, 6, "model.fp16.onnx", ""),
    (5, 6, "model.fp16.plan", ", .plan.json"),
    (5, 7, "model.fp16.plan", ""),
    (3, 8, "model.fp16.onnx", ""),
)


def walk_rows() -> list[tuple[str, str, str, str]]:
    """(notebook, command, reads, writes) of every step."""
    return [(s.notebook, s.command, "\n".join(s.reads), "\n".join(s.writes) or "nothing") for s in STEPS]


def draw_walk() -> Figure:
    """Every step as a box, and on each arrow between two the file that the first writes and the second reads."""
    figure, axis = plt.subplots(figsize=(9, 5.4), layout="constrained")
    box = {"boxstyle": "round,pad=0.5", "facecolor": SEEN, "edgecolor": PREFILL}
    names = [
        axis.annotate(
            f"{step.notebook}\n{step.command}", step.at, ha="center", va="center", fontsize=9, bbox=box, zorder=3
        )
        for step in STEPS
    ]
    for start, end, file, note in ARROWS:
        (x0, y0), (x1, y1) = STEPS[start].at, STEPS[end].at
        arrow = {"arrowstyle": "-|>", "color": "#555555", "patchA": names[start].get_bbox_patch(),
                 "patchB": names[end].get_bbox_patch(), "shrinkA": 2, "shrinkB": 2}  # fmt: skip
        axis.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
        label = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axis.text(
            (x0 + x1) / 2, (y0 + y1) / 2, file + note, ha="center", va="center", fontsize=8, color="#333333", bbox=label
        )
    axis.set_xlim(0, 100)
    axis.set_ylim(-8, 101)
    axis.text(50, -6, f"01 and 04 to 08 also read {SHARDS}, in place; only the plan of 05 holds them a second time",
              ha="center", fontsize=8, color="#555555")  # fmt: skip
    axis.set_axis_off()
    plt.close(figure)
    return figure
