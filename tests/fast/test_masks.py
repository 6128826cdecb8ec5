"""The attention mask of a chat in two numbers a row."""

from pathlib import Path

import numpy as np
import pytest

from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.fast.masks import read_mask
from glmtrt_helpers.inputs import positions_and_mask


def test_a_mask_says_what_is_padding_and_what_sees_what(_random_master: Path) -> None:
    checkpoint = open_checkpoint(_random_master)
    tokenizer = load_tokenizer(checkpoint)
    prompts = [tokenizer.encode("a"), tokenizer.encode("the good dog")]
    call = positions_and_mask.prefill(checkpoint, prompts)
    length = call["input_ids"].shape[1]
    padding = [length - len(prompts[0]), 0]
    assert padding[0] > 0 and prompts[0][-1] == checkpoint.config["bos_token_id"]
    skip, context = read_mask(call, 0)
    assert skip.tolist() == padding and context.tolist() == [length - 1] * 2, "all before <sop> see one another"
    skip, context = read_mask(positions_and_mask.decode(call, np.array([7, 8])), length)
    assert skip.tolist() == padding and context.tolist() == [length + 1] * 2
    # Behind <sop> each sees what came before it; what padding sees means nothing.
    longer = positions_and_mask.prefill(checkpoint, [[*prompt, 7, 8, 9] for prompt in prompts])
    longer["attention_mask"][0, 0, 0] = False
    assert [part.tolist() for part in read_mask(longer, 0)] == [padding, [length - 1] * 2]
    for row, columns in ((1, [2]), (length, [3]), (length, [length + 1]), (length, [3, length + 1])):
        wrong = {name: array.copy() for name, array in longer.items()}
        wrong["attention_mask"][1, 0, row, columns] ^= True
        with pytest.raises(WorkbookError, match=r"takes masks of a chat: padding .* take another backend"):
            read_mask(wrong, 0)
    hole = positions_and_mask.decode(call, np.array([7, 8]))
    hole["attention_mask"][1, 0, 0, 1] = True
    with pytest.raises(WorkbookError, match="takes masks of a chat"):
        read_mask(hole, length)
    with pytest.raises(WorkbookError, match="tokens, where 2 lie in the cache and 1 are new"):
        read_mask(hole, 2)
    both = {"attention_mask": np.zeros((1, 1, 2, 5), np.bool_)}
    with pytest.raises(WorkbookError, match="takes masks of a chat"):
        read_mask(both, 3)  # two new ones on a past that see each other
