"""What a chat feeds to forward: against the formulas of the model's public source, written out here by hand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.inputs import positions_and_mask
from glmtrt_helpers.inputs.prompts import chat_prompt


@pytest.fixture
def checkpoint(_random_master: Path) -> Checkpoint:
    return open_checkpoint(_random_master)


def test_chat_prompt_follows_the_rounds(checkpoint: Checkpoint) -> None:
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.decode(chat_prompt(tokenizer, "你好")) == "你好"
    prompt = chat_prompt(tokenizer, "c", [("a", "b"), ("d", "e")])
    assert tokenizer.decode(prompt) == "[Round 0]\n问：a\n答：b\n[Round 1]\n问：d\n答：e\n[Round 2]\n问：c\n答："


def test_prefill_and_two_decodes_by_hand(checkpoint: Checkpoint) -> None:
    """Two rows, the second padded by two: columns before <sop> are seen by all, later ones only from below."""
    gmask, sop = checkpoint.config["gmask_token_id"], checkpoint.config["bos_token_id"]
    call = positions_and_mask.prefill(checkpoint, [[10, 11, 12, gmask, sop], [10, gmask, sop]])
    assert call["input_ids"].tolist() == [[10, 11, 12, gmask, sop], [3, 3, 10, gmask, sop]]
    assert call["position_ids"].tolist() == [
        [[0, 1, 2, 3, 3], [0, 0, 0, 0, 1]],
        [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]],
    ]
    seen = (~call["attention_mask"][:, 0]).astype(int).tolist()
    assert seen[0] == [[1, 1, 1, 1, 0]] * 4 + [[1, 1, 1, 1, 1]]
    assert seen[1] == [[0] * 5] * 2 + [[0, 0, 1, 1, 0]] * 2 + [[0, 0, 1, 1, 1]]
    for block in (2, 3):
        call = positions_and_mask.decode(call, np.array([20, 21]))
        assert call["input_ids"].tolist() == [[20], [21]] and call["input_ids"].dtype == np.int64
        assert call["position_ids"].tolist() == [[[3], [block]], [[1], [block]]]
        total = 5 + block - 1
        assert (~call["attention_mask"][:, 0, 0]).astype(int).tolist() == [[1] * total, [0, 0] + [1] * (total - 2)]


def test_a_chat_needs_no_pytorch(_random_master: Path) -> None:
    """Everything between a checkpoint and a session is importable and usable where PyTorch is not installed."""
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
