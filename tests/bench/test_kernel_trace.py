"""Kernels of a step: recorded and cut into runs, given readable names, and one layer found among them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.checkpoints import ROOT
from torch.autograd import DeviceType

from glmtrt_helpers.bench import kernel_trace
from glmtrt_helpers.bench.kernel_trace import Kernel, Step
from glmtrt_helpers.bench.plots import LOOKS, plot_layer
from glmtrt_helpers.bench.results import Report
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.profiles import real_size

MATMUL = "cudnn_generated_matMul_fort_ffma_grouped_sm50_kernel0_0"
NORM = "__myl_ReshReshReshAddReshMulReshAddCastMeanSubMulMeanAddSqrtDivMulCastMulAdd_0xffd08cd8_com_vec"
GELU = "__myl_ReshAddMulMulMulAddMulTanhAddMulMul_0x15d1b9d6951d0952c21a894ec33d6b6e_com_vec"


def test_only_the_gpus_events_count_in_order_of_time() -> None:
    def event(name: str, start: float, duration: float, device: DeviceType = DeviceType.CUDA) -> SimpleNamespace:
        time = SimpleNamespace(start=start, elapsed_us=lambda: duration)
        return SimpleNamespace(name=name, time_range=time, device_type=device)

    events = [
        event("attend", 107.5, 4.0),
        event("cudaGraphLaunch", 90.0, 50.0, DeviceType.CPU),
        event("Memcpy DtoD", 100.0, 1.5),
    ]
    assert kernel_trace.gpu_kernels(events) == [Kernel("Memcpy DtoD", 0.0, 1.5), Kernel("attend", 7.5, 4.0)]


def test_a_recording_is_cut_into_equal_runs_or_refused() -> None:
    kernels = [Kernel("a", n * 2.0, 1.0) for n in range(6)]
    assert kernel_trace.split(kernels, 3) == [kernels[:2], kernels[2:4], kernels[4:]]
    for steps in (4, 7):
        with pytest.raises(WorkbookError, match=f"6 kernels are not {steps} equal runs"):
            kernel_trace.split(kernels, steps)


def test_idle_time_is_what_no_kernel_covers() -> None:
    """Steps of 10 us: kernels of 0 to 4 and 3 to 8, so 2 of 10 are idle; overlap counts once."""
    runs = [[Kernel("a", start, 4.0), Kernel("b", start + 3, 5.0)] for start in (0.0, 10.0, 20.0)]
    assert kernel_trace.idle_fraction(runs) == pytest.approx(0.2)
    made = kernel_trace.entry("cuda", "decode", 1, 512, runs)
    assert made["kernels"] == [
        {"name": "a", "start_us": 0.0, "duration_us": 4.0},
        {"name": "b", "start_us": 3.0, "duration_us": 5.0},
    ]
    assert made["idle_fraction"] == 0.2 and made["past"] == 512


def test_recording_without_a_gpu_is_refused() -> None:
    with pytest.raises(WorkbookError, match="a trace needs an NVIDIA GPU"):
        kernel_trace.record_kernels(lambda: None)


@pytest.mark.parametrize(
    ("name", "short", "kind"),
    [
        ("attend_rows", "attention", "attention"),
        ("normalize", "normalize", "the rest"),
        (MATMUL, "matmul", "matmul"),
        ("nvjet_sm90_hsh_64x8_64x16_4x1_v_bz_TNN", "matmul", "matmul"),
        ("void gemv2T_kernel_val<int, int, __half, __half>(cublasGemvParams)", "matmul", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>(float)", "matmul", "matmul"),
        (NORM, "add, LayerNorm", "the rest"),
        ("__myl_ReshCastGathCastMeanSubMulMeanAddSqrtDivMulCastMulAdd_0xd991_com", "gather, LayerNorm", "the rest"),
        (GELU, "GELU", "the rest"),
        ("__myl_SlicReshSeleSeleConcCastMulMaxrSubExpSum_0xc48d4d3456610b30_com", "softmax", "attention"),
        ("__myl_ReshAddReshSlicSlicSlicConcMulMulAddSlicSlicSlic_0x7475_com_vec", "rotary", "the rest"),
        ("__myl_Topk_0xf70c1db97b129531c2dd9065779a95c3_com", "top-k", "the rest"),
        ("__myl_ReshMove_0x96fd1a5528419d98cfd2d90fc0e5d63a_com", "copy", "the rest"),
        ("__myl_Tran_0xf04ca54b347df2b8c34f8e455a8ae4b6", "transpose", "the rest"),
        ("__myl_ReshReshReshMulReshCastReshAddCast_0x8437fe73_com", "multiply, add", "the rest"),
        ("__myl_ReshEqlAbcDefGhiCast_0x8437fe73_com", "compare, abc, def, ...", "the rest"),
        ("Memcpy DtoD (Device -> Device)", "copy", "the rest"),
        ("Memset (Unknown)", "fill", "the rest"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>(int)",
         "vectorized_elementwise_kernel", "the rest"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>>(Params)", "attention",
         "attention"),
    ],
)  # fmt: skip
def test_kernel_names_are_shortened(name: str, short: str, kind: str) -> None:
    assert (kernel_trace.short_name(name), kernel_trace.kind_of(name)) == (short, kind)


def step(layers: int = 28) -> Step:
    """A gather and a matmul, layers of five kernels, a last matmul and our own `choose`; 10 us each, 1 us apart."""
    layer = ["attend_rows", MATMUL, NORM, MATMUL, GELU]
    names = ["__myl_ReshGath_0x1", MATMUL, *layer * layers, MATMUL, "choose"]
    return Step("cuda", "decode", 1, 512, 0.1, [Kernel(name, 11.0 * i, 10.0) for i, name in enumerate(names)])


@pytest.mark.parametrize("layers", [4, 28])
def test_a_layer_is_the_sequence_that_the_middle_repeats(layers: int) -> None:
    layer = kernel_trace.one_layer(step(layers))
    names = [kernel_trace.short_name(kernel.name) for kernel in layer]
    assert names == ["attention", "matmul", "add, LayerNorm", "matmul", "GELU"]
    assert layer[0].start_us < step(layers).kernels[-1].start_us / 2 + 100


def test_a_layer_without_our_own_attention_kernel() -> None:
    others = [Kernel("Memset", kernel.start_us, kernel.duration_us) if kernel.name == "attend_rows" else kernel
              for kernel in step().kernels]  # fmt: skip
    layer = kernel_trace.one_layer(Step("classical", "decode", 1, 512, 0.1, others))
    assert sorted(kernel_trace.short_name(k.name) for k in layer) == sorted(
        ["fill", "matmul", "add, LayerNorm", "matmul", "GELU"]
    )


def test_a_step_that_repeats_nothing() -> None:
    kernels = [Kernel(f"kernel_{i * i}", 2.0 * i, 1.0) for i in range(40)]
    with pytest.raises(WorkbookError, match="the 40 kernels of this step contain no repeated sequence"):
        kernel_trace.one_layer(Step("cuda", "decode", 1, 512, 0.1, kernels))
    with pytest.raises(WorkbookError, match="the 0 kernels"):
        kernel_trace.one_layer(Step("cuda", "decode", 1, 512, 0.1, []))


def test_kernel_rows_sum_by_name_longest_first() -> None:
    rows = kernel_trace.kernel_rows(step(4))
    assert rows[0] == ("matmul", 10, 100.0, pytest.approx(100 / 240))
    assert sum(row[1] for row in rows) == 24 and sum(row[3] for row in rows) == pytest.approx(1)
    assert [row[2] for row in rows] == sorted((row[2] for row in rows), reverse=True)


def test_a_saved_trace_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    kernels = [{"name": "attend", "start_us": 0.0, "duration_us": 2.5}]
    saved = {"engine": "cuda", "phase": "decode", "batch": 1, "past": 512, "idle_fraction": 0.1, "kernels": kernels}
    entry = {"gpu": "a card", "date": "2026-11-23", "versions": {"torch": "2.11.0"}, "command": "x", "steps": [saved]}
    path.write_text(json.dumps(entry))
    assert kernel_trace.load_trace(path) == (
        [Step("cuda", "decode", 1, 512, 0.1, [Kernel("attend", 0.0, 2.5)])], "a card, 2026-11-23, torch 2.11.0"
    )  # fmt: skip
    del saved["idle_fraction"]
    path.write_text(json.dumps(entry))
    with pytest.raises(WorkbookError, match=r"is not a complete trace .*idle_fraction"):
        kernel_trace.load_trace(path)
    with pytest.raises(WorkbookError, match=r"none\.json is missing: record it with `glmtrt bench DIR --trace"):
        kernel_trace.load_trace(tmp_path / "none.json")


def test_a_step_that_was_not_recorded_is_refused() -> None:
    assert kernel_trace.find_step([step()], "cuda").past == 512
    with pytest.raises(WorkbookError, match=r"no step of cuda, decode, batch 8, 512 tokens .* cuda, decode, batch 1"):
        kernel_trace.find_step([step()], "cuda", batch=8)


def test_one_layer_drawn_on_a_time_line(_random_master: Path) -> None:
    """Bars start at the layer's start; the last one is the time to read 12 H^2 + 13 H numbers of two bytes."""
    real = real_size(open_checkpoint(_random_master))
    card = Report(4000.0, 800.0, 12_346_572_800)
    (axis,) = plot_layer(real, card, step(), "a card").axes
    bars = [(bar.get_x(), bar.get_width()) for bar in axis.patches if bar.get_width()]  # type: ignore[attr-defined]
    assert bars[:5] == [(pytest.approx(11.0 * i), 10.0) for i in range(5)]
    assert bars[5] == (0, pytest.approx((12 * 4096**2 + 13 * 4096) * 2 / 4e12 * 1e6))
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["attention", "matmul", "add, LayerNorm", "matmul", "GELU", "its weights, read once"]
    assert axis.get_xlabel() == "microseconds, 54 in total (a card)"


def test_the_committed_trace_shows_a_layer_and_a_step_of_one_kernel() -> None:
    steps, about = kernel_trace.load_trace(ROOT / "benchmarks" / "trace_h100.json")
    layer = kernel_trace.one_layer(kernel_trace.find_step(steps, "classical"))
    assert "H100" in about and [kernel_trace.short_name(kernel.name) for kernel in layer].count("matmul") >= 4
    assert [kernel.name for kernel in kernel_trace.find_step(steps, "cuda").kernels] == ["step1"]
    assert LOOKS.keys() >= {each.engine for each in steps}
