"""Positions and mask of a chat: by hand, from the formulas of the public source, and against the model itself."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.positions_and_mask import decode, prefill
from glmtrt_helpers.sessions.pytorch import TorchSession


@pytest.fixture(scope="module")
def checkpoint(_random_master: Path) -> Checkpoint:
    return open_checkpoint(_random_master)


def prompt(checkpoint: Checkpoint, *ids: int) -> list[int]:
    return [*ids, checkpoint.config["gmask_token_id"], checkpoint.config["bos_token_id"]]


def test_prefill_and_two_decodes_by_hand(checkpoint: Checkpoint) -> None:
    """Two rows, the second padded by two: columns before <sop> are seen by all, later ones only from below."""
    gmask, sop = prompt(checkpoint)
    call = prefill(checkpoint, [prompt(checkpoint, 10, 11, 12), prompt(checkpoint, 10)])
    assert call["input_ids"].tolist() == [[10, 11, 12, gmask, sop], [3, 3, 10, gmask, sop]]
    assert call["position_ids"].tolist() == [
        [[0, 1, 2, 3, 3], [0, 0, 0, 0, 1]],
        [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]],
    ]
    seen = (~call["attention_mask"][:, 0]).astype(int).tolist()
    assert seen[0] == [[1, 1, 1, 1, 0]] * 4 + [[1, 1, 1, 1, 1]]
    assert seen[1] == [[0] * 5] * 2 + [[0, 0, 1, 1, 0]] * 2 + [[0, 0, 1, 1, 1]]
    for block in (2, 3):
        call = decode(call, np.array([20, 21]))
        assert call["input_ids"].tolist() == [[20], [21]] and call["input_ids"].dtype == np.int64
        assert call["position_ids"].tolist() == [[[3], [block]], [[1], [block]]]
        total = 5 + block - 1
        assert (~call["attention_mask"][:, 0, 0]).astype(int).tolist() == [[1] * total, [0, 0] + [1] * (total - 2)]


def test_the_models_own_positions_and_mask_are_the_same(checkpoint: Checkpoint) -> None:
    model: torch.nn.Module = loading.load_model(checkpoint)
    session = TorchSession(model)
    call = prefill(checkpoint, [prompt(checkpoint, 20, 21, 22)])
    ids = torch.from_numpy(call["input_ids"])
    np.testing.assert_array_equal(call["attention_mask"], model.get_masks(ids, device="cpu").numpy())
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=True, return_dict=False)[0]
    np.testing.assert_array_equal(session.run({**call, **session.empty_past(1)})["logits"], own.numpy())


def test_a_left_padded_batch_gives_the_scores_of_single_prompts(checkpoint: Checkpoint) -> None:
    session = TorchSession(loading.load_model(checkpoint))

    def scores(prompts: list[list[int]], tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        session.reset()
        call = prefill(checkpoint, prompts)
        return session.step(call), session.step(decode(call, np.array(tokens)))

    prompts, tokens = [prompt(checkpoint, 20, 21, 22, 23), prompt(checkpoint, 24)], [11, 12]
    batch = scores(prompts, tokens)
    for row in (0, 1):
        for together, alone in zip(batch, scores([prompts[row]], [tokens[row]]), strict=True):
            np.testing.assert_allclose(together[row], alone[0], rtol=0, atol=1e-5)


def test_a_prompt_without_gmask_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(WorkbookError, match=r"prompt 1 has no \[gMASK\]"):
        prefill(checkpoint, [prompt(checkpoint, 20), [20, 21]])


def test_a_chat_needs_no_pytorch(_random_master: Path) -> None:
    """Everything between a checkpoint and a session can be imported and used where PyTorch is not installed."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from glmtrt_helpers import checkpoints, inputs\n"
        "from glmtrt_helpers.chat import backends, conversation\n"
        "from glmtrt_helpers.engines import session\n"
        f"c = checkpoints.open_checkpoint({str(_random_master)!r})\n"
        "t = checkpoints.load_tokenizer(c)\n"
        "print(inputs.prefill(c, [inputs.chat_prompt(t, 'a')])['input_ids'].shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("(1, "), done.stderr
