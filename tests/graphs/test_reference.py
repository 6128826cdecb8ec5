"""The reference: cases are what a chat would send, and PyTorch's unpatched source says what is expected."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.graphs.reference import CASES, Case, Point, case_inputs, fit, references, run_tensors
from glmtrt_helpers.inputs.examples import empty_past
from glmtrt_helpers.sessions.pytorch import TorchSession


@pytest.fixture(scope="module")
def checkpoint(_random_master: Path) -> Checkpoint:
    return open_checkpoint(_random_master)


@pytest.fixture(scope="module")
def session(checkpoint: Checkpoint) -> TorchSession:
    return TorchSession(loading.load_model(checkpoint))


def test_cases_are_not_the_exports_example() -> None:
    shapes = {(case.batch, case.sequence, case.past) for case in CASES}
    assert (2, 5, 3) not in shapes and len(shapes) == len(CASES)
    assert {0, 600} <= {case.past for case in CASES} and {1, 4} <= {case.batch for case in CASES}
    assert 1 in {case.sequence for case in CASES} and any(case.padding for case in CASES)


@pytest.mark.parametrize("case", [case for case in CASES if case.past and case.past < 100], ids=lambda case: case.name)
def test_a_case_with_a_past_is_the_end_of_one_prompt(checkpoint: Checkpoint, session: TorchSession, case: Case) -> None:
    """Past and new tokens in one call, with one mask, give the logits that the two calls gave."""
    calls = []

    class Recorder:
        dtype = torch.float32

        def run(self, flat: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            calls.append(flat)
            return session.run(flat)

    flat = case_inputs(checkpoint, case, Recorder(), torch.float32)
    (prefix,) = calls
    whole = empty_past(checkpoint, case.batch, torch.float32)
    for name in ("input_ids", "position_ids"):
        whole[name] = torch.cat([prefix[name], flat[name]], dim=-1)
    hidden_from_past = torch.ones(case.batch, 1, case.past, case.sequence, dtype=torch.bool)
    upper = torch.cat([prefix["attention_mask"], hidden_from_past], dim=-1)
    whole["attention_mask"] = torch.cat([upper, flat["attention_mask"]], dim=-2)
    actual, expected = run_tensors(session, flat), run_tensors(session, whole)
    for row, left in enumerate(case.padding or (0,) * case.batch):
        first = max(left - case.past, 0)
        torch.testing.assert_close(
            actual["logits"][row, first:], expected["logits"][row, case.past + first :], rtol=0, atol=2e-6
        )
        torch.testing.assert_close(
            actual["present.1.key"][left:, row], expected["present.1.key"][left:, row], rtol=0, atol=2e-6
        )


@pytest.mark.parametrize("case", [case for case in CASES if case.padding], ids=lambda case: case.name)
def test_a_padded_row_is_the_row_alone(checkpoint: Checkpoint, session: TorchSession, case: Case) -> None:
    flat = case_inputs(checkpoint, case, session, torch.float32)
    together = run_tensors(session, flat)["logits"]
    for row, left in enumerate(case.padding):
        alone = {}
        for name, tensor in flat.items():
            one = tensor[:, row : row + 1] if name.startswith("past") else tensor[row : row + 1]
            keys = left if case.past else 0
            new = left - keys
            alone[name] = {
                "input_ids": lambda t, n=new: t[:, n:],
                "position_ids": lambda t, n=new: t[:, :, n:],
                "attention_mask": lambda t, n=new, k=left: t[:, :, n:, k:],
            }.get(name, lambda t, k=keys: t[k:])(one)
        assert not alone["attention_mask"][0, 0, -1].any()
        assert alone["position_ids"].min() >= 0
        torch.testing.assert_close(run_tensors(session, alone)["logits"][0, -1], together[row, -1], rtol=0, atol=2e-6)
    # A padded token attends to nothing, as in a batch of a chat.
    if not case.past:
        padded = flat["attention_mask"][1, 0, : case.padding[1]]
        assert padded.all() and (flat["input_ids"][1, : case.padding[1]] == checkpoint.config["pad_token_id"]).all()


def test_at_end_reaches_the_last_position(checkpoint: Checkpoint, session: TorchSession) -> None:
    case = next(case for case in CASES if case.at_end)
    positions = case_inputs(checkpoint, case, session, torch.float32)["position_ids"]
    assert positions[:, 0].max() == positions[:, 1].max() == checkpoint.max_length - 1


def test_a_case_too_long_is_cut_or_skipped() -> None:
    long = Case("long", 1, 4, 600)
    assert fit(long, 604) == (long, "")
    cut, why = fit(long, 603)
    assert cut == replace(long, past=599) and "600" in why and "599" in why and "603" in why
    assert fit(long, 4)[0] is None and "4 positions" in fit(long, 4)[1]
    assert fit(replace(long, padding=(7,)), 11)[0] is None
    assert fit(Case("prompt", 1, 17, 0), 16)[0] is None


def test_fp16_is_measured_against_its_own_angles(checkpoint: Checkpoint) -> None:
    """Late positions rotate by other angles in fp16; the reference uses the same, so only rounding noise is left."""
    case = next(case for case in CASES if case.at_end)
    (one,) = references(checkpoint, "fp16", [case])
    (exact,) = references(checkpoint, "fp32", [case])
    scale = float(one.expected["present.0.key"].abs().max())
    assert 1e-4 * scale < one.own_errors["present.0.key"] < 2e-3 * scale
    new = slice(case.past, None)
    between = (one.expected["present.0.key"][new] - exact.expected["present.0.key"][new]).abs().max()
    assert between > 5e-3 * scale
    assert exact.own_errors == {} and one.expected["logits"].dtype == torch.float32
    assert one.flat["past_key_values.0.key"].dtype == torch.float16
    # All backends read the same cache, so its part of the presents differs in nothing.
    torch.testing.assert_close(
        one.expected["present.1.value"][: case.past], one.flat["past_key_values.1.value"].float(), rtol=0, atol=0
    )


def test_the_reference_is_the_unpatched_source(tiny_random: Path) -> None:
    """What patching did to the source, right or wrong, cannot reach the reference."""
    code = tiny_random / "modeling_chatglm.py"
    case = Case("prompt", 1, 4, 0)
    (before,) = references(open_checkpoint(tiny_random), "fp32", [case])
    shutil.copyfile(code, tiny_random / "modeling_chatglm.py.orig")
    code.write_text(code.read_text().replace("num_layers=28", "num_layers=20"))
    (after,) = references(open_checkpoint(tiny_random), "fp32", [case])
    assert torch.equal(before.expected["logits"], after.expected["logits"])
    (tiny_random / "modeling_chatglm.py.orig").unlink()
    (changed,) = references(open_checkpoint(tiny_random), "fp32", [case])
    assert not torch.allclose(before.expected["logits"], changed.expected["logits"], atol=1e-3)


def test_points_are_recorded_at_their_modules(checkpoint: Checkpoint) -> None:
    points = [
        Point(1, "output", "transformer.final_layernorm", "in", "block"),
        Point(1, "mlp", "transformer.layers.1.mlp", "out", "mlp"),
        Point(1, "post", "transformer.layers.1.post_attention_layernorm", "out", "post"),
    ]
    (one,) = references(checkpoint, "fp16", [Case("prompt", 2, 4, 0)], points)
    alpha = (2 * 28) ** 0.5
    torch.testing.assert_close(
        one.expected["block"], one.expected["post"] * alpha + one.expected["mlp"], rtol=0, atol=1e-5
    )
    assert one.expected["mlp"].shape == (4, 2, checkpoint.hidden_size)
    assert {"block", "mlp", "post", "logits", "present.0.key"} <= set(one.own_errors)
    assert points[0].name == "layer 1 output" and replace(points[0], layer=None).name == "output"
