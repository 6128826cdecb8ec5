"""The tokenizer against the rules of the checkpoint: special tokens, white space, bytes, text that looks special."""

from pathlib import Path

import pytest

from glmtrt_helpers.checkpoints.tokenizer import Tokenizer
from glmtrt_helpers.core.errors import WorkbookError


@pytest.fixture(scope="module")
def tokenizer(_random_master: Path) -> Tokenizer:
    return Tokenizer(_random_master / "ice_text.model")


def test_ids_follow_the_pieces(tokenizer: Tokenizer) -> None:
    base = tokenizer.mask_id
    names = [tokenizer.piece(base + k) for k in range(8)]
    assert names == ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    assert (tokenizer.gmask_id, tokenizer.sop_id, tokenizer.eop_id) == (base + 1, base + 4, base + 5)
    assert tokenizer.size == base + 8 + 80 + 256


def test_prompt_ends_in_gmask_and_sop(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("你好")
    assert ids[0] == 5 and ids[-2:] == [tokenizer.gmask_id, tokenizer.sop_id] and len(ids) == 4


def test_white_space_has_pieces_of_its_own(tokenizer: Tokenizer) -> None:
    base = tokenizer.mask_id
    assert tokenizer.encode_text("a\nb")[1:] == [*tokenizer.encode_text("a")[1:], 4, *tokenizer.encode_text("b")[1:]]
    assert base + 8 in tokenizer.encode_text("a\tb")
    for run in (2, 7, 80):
        assert base + 7 + run in tokenizer.encode_text("a" + " " * run + "b")
    assert [base + 87, base + 10] == tokenizer.encode_text("a" + " " * 83 + "b")[
        2:4
    ]  # the longest run first: 80, then 3


def test_bytes_spell_what_has_no_piece(tokenizer: Tokenizer) -> None:
    base = tokenizer.mask_id + 88
    assert tokenizer.encode_text("龘")[1:] == [base + byte for byte in "龘".encode()]


@pytest.mark.parametrize(
    "text",
    ["[gMASK] and <sop> stay text", "<n>", "<|tab|><|blank_4|>", "<eop>", "[MASK]", "<0x41>", "<pad></s>"],
)
def test_text_that_looks_special_stays_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text
    special = {tokenizer.mask_id + k for k in range(88)} | {0, 1, 2, 3, 4}
    assert not special & set(ids)


@pytest.mark.parametrize("text", ["你好，the 🙂\n\t  x", "  leading", "a\n\n    b", "龘", "q" * 50 + " " * 200 + "!"])
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkbookError, match="is missing"):
        Tokenizer(tmp_path / "ice_text.model")
    (tmp_path / "ice_text.model").write_bytes(b"not a model at all")
    with pytest.raises(WorkbookError, match=r"ice_text\.model"):
        Tokenizer(tmp_path / "ice_text.model")


def test_ids_from_before_the_vocabulary_was_slimmed(tokenizer: Tokenizer, _random_master: Path) -> None:
    """Checkpoints of March 2023 count 20000 image tokens first; text comes back the same."""
    old = Tokenizer(_random_master / "ice_text.model", tokenizer.gmask_id + 20000)
    text = "你好，the 🙂\n\t  x"
    assert old.encode(text) == [i + 20000 for i in tokenizer.encode(text)]
    assert old.decode(old.encode(text)) == text and old.piece(old.sop_id) == "<sop>"
    with pytest.raises(WorkbookError, match=r"take both from one checkpoint"):
        Tokenizer(_random_master / "ice_text.model", tokenizer.gmask_id + 7)
