"""Notebook 07: names that can be read, a layer found in a step, and its picture."""

import json
from pathlib import Path

import pytest
from support.checkpoints import ROOT

from glmtrt_helpers.bench import kernel_trace
from glmtrt_helpers.bench.kernel_trace import Kernel, Step
from glmtrt_helpers.bench.plots import LOOKS, plot_layer
from glmtrt_helpers.bench.results import Report
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.profiles import real_size

PRODUCT = "cudnn_generated_matMul_fort_ffma_grouped_sm50_kernel0_0"
NORM = "__myl_ReshReshReshAddReshMulReshAddCastMeanSubMulMeanAddSqrtDivMulCastMulAdd_0xffd08cd8_com_vec"
GELU = "__myl_ReshAddMulMulMulAddMulTanhAddMulMul_0x15d1b9d6951d0952c21a894ec33d6b6e_com_vec"


@pytest.mark.parametrize(
    ("name", "short", "kind"),
    [
        ("attend", "attend", "attention"),
        ("advance", "advance", "the rest"),
        (PRODUCT, "product", "product"),
        ("nvjet_sm90_hsh_64x8_64x16_4x1_v_bz_TNN", "product", "product"),
        ("void gemv2T_kernel_val<int, int, __half, __half>(cublasGemvParams)", "product", "product"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>(float)", "product", "product"),
        (NORM, "add, LayerNorm", "the rest"),
        ("__myl_ReshCastGathCastMeanSubMulMeanAddSqrtDivMulCastMulAdd_0xd991_com", "look-up, LayerNorm", "the rest"),
        (GELU, "GELU", "the rest"),
        ("__myl_SlicReshSeleSeleConcCastMulMaxrSubExpSum_0xc48d4d3456610b30_com", "softmax", "attention"),
        ("__myl_ReshAddReshSlicSlicSlicConcMulMulAddSlicSlicSlic_0x7475_com_vec", "rotary", "the rest"),
        ("__myl_Topk_0xf70c1db97b129531c2dd9065779a95c3_com", "choose the best", "the rest"),
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
def test_names_that_can_be_read(name: str, short: str, kind: str) -> None:
    assert (kernel_trace.short_name(name), kernel_trace.kind_of(name)) == (short, kind)


def step(layers: int = 28) -> Step:
    """A look-up and a product, layers of five kernels, a last product and our own `advance`; 10 us each, 1 us apart."""
    layer = ["attend", PRODUCT, NORM, PRODUCT, GELU]
    names = ["__myl_ReshGath_0x1", PRODUCT, *layer * layers, PRODUCT, "advance"]
    return Step("fast", "decode", 1, 512, 0.1, [Kernel(name, 11.0 * i, 10.0) for i, name in enumerate(names)])


@pytest.mark.parametrize("layers", [4, 28])
def test_a_layer_is_what_the_middle_repeats(layers: int) -> None:
    found = kernel_trace.one_layer(step(layers))
    names = [kernel_trace.short_name(kernel.name) for kernel in found]
    assert names == ["attend", "product", "add, LayerNorm", "product", "GELU"]
    assert found[0].start_us < step(layers).kernels[-1].start_us / 2 + 100


def test_a_layer_that_begins_with_no_kernel_of_ours() -> None:
    others = [Kernel("Memset", kernel.start_us, kernel.duration_us) if kernel.name == "attend" else kernel
              for kernel in step().kernels]  # fmt: skip
    found = kernel_trace.one_layer(Step("classical", "decode", 1, 512, 0.1, others))
    assert sorted(kernel_trace.short_name(k.name) for k in found) == sorted(
        ["fill", "product", "add, LayerNorm", "product", "GELU"]
    )


def test_a_step_that_repeats_nothing() -> None:
    kernels = [Kernel(f"kernel_{i * i}", 2.0 * i, 1.0) for i in range(40)]
    with pytest.raises(WorkbookError, match="the 40 kernels of this step repeat nothing"):
        kernel_trace.one_layer(Step("fast", "decode", 1, 512, 0.1, kernels))
    with pytest.raises(WorkbookError, match="the 0 kernels"):
        kernel_trace.one_layer(Step("fast", "decode", 1, 512, 0.1, []))


def test_sums_by_name_the_longest_first() -> None:
    rows = kernel_trace.kernel_rows(step(4))
    assert rows[0] == ("product", 10, 100.0, pytest.approx(100 / 240))
    assert sum(row[1] for row in rows) == 24 and sum(row[3] for row in rows) == pytest.approx(1)
    assert [row[2] for row in rows] == sorted((row[2] for row in rows), reverse=True)


def test_what_was_kept_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    kernels = [{"name": "attend", "start_us": 0.0, "duration_us": 2.5}]
    kept = {"engine": "fast", "phase": "decode", "batch": 1, "past": 512, "idle_fraction": 0.1, "kernels": kernels}
    entry = {"gpu": "a card", "date": "2026-11-23", "versions": {"torch": "2.11.0"}, "command": "x", "steps": [kept]}
    path.write_text(json.dumps(entry))
    assert kernel_trace.load_trace(path) == (
        [Step("fast", "decode", 1, 512, 0.1, [Kernel("attend", 0.0, 2.5)])], "a card, 2026-11-23, torch 2.11.0"
    )  # fmt: skip
    del kept["idle_fraction"]
    path.write_text(json.dumps(entry))
    with pytest.raises(WorkbookError, match=r"is no whole trace .*idle_fraction"):
        kernel_trace.load_trace(path)
    with pytest.raises(WorkbookError, match=r"none\.json is missing: record it with `glmtrt bench DIR --trace"):
        kernel_trace.load_trace(tmp_path / "none.json")


def test_a_step_that_was_not_recorded() -> None:
    assert kernel_trace.find_step([step()], "fast").past == 512
    with pytest.raises(WorkbookError, match=r"no step of fast, decode, batch 8, 512 tokens .* fast, decode, batch 1"):
        kernel_trace.find_step([step()], "fast", batch=8)


def test_a_layer_on_its_time_line(_random_master: Path) -> None:
    """Bars begin with the layer; the last one is what its weights take, 12 H^2 + 13 H numbers of two bytes."""
    real = real_size(open_checkpoint(_random_master))
    card = Report(4000.0, 800.0, 12_346_572_800)
    (axis,) = plot_layer(real, card, step(), "a card").axes
    bars = [(bar.get_x(), bar.get_width()) for bar in axis.patches if bar.get_width()]  # type: ignore[attr-defined]
    assert bars[:5] == [(pytest.approx(11.0 * i), 10.0) for i in range(5)]
    assert bars[5] == (0, pytest.approx((12 * 4096**2 + 13 * 4096) * 2 / 4e12 * 1e6))
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["attend", "product", "add, LayerNorm", "product", "GELU", "its weights, read once"]
    assert axis.get_xlabel() == "microseconds, 54 in all (a card)"


def test_the_committed_trace_shows_a_layer_of_the_fast_engine() -> None:
    steps, about = kernel_trace.load_trace(ROOT / "benchmarks" / "trace_h200.json")
    layer = kernel_trace.one_layer(kernel_trace.find_step(steps, "fast"))
    assert "H200" in about and [kernel_trace.short_name(kernel.name) for kernel in layer].count("product") == 4
    assert LOOKS.keys() >= {each.engine for each in steps}
