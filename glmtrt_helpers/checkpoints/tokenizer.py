"""A tokenizer over `ice_text.model` that follows the checkpoint's rules and nothing else.

Text becomes the same pieces as upstream: a line break, a tab and every run of 2 to 80 spaces is one piece, the rest is
sentencepiece with byte fallback. A prompt ends in [gMASK] and <sop>. The class has no base class, so the order of
initialisation that breaks upstream's tokenizer on transformers 4.34 and later cannot occur.
"""

from __future__ import annotations

from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.records import check_regular

SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
PAD_ID = 3
NEWLINE_ID = 4
BLANK_ID = 5  # "▁", what upstream falls back to where its scores are not finite
# Until 6 April 2023 the ids began with this many image tokens.
IMAGE_TOKENS = 20000
_WHITE_SPACE = {"<n>": "\n", "<|tab|>": "\t"} | {f"<|blank_{k}|>": " " * k for k in range(2, 81)}
# Inside the tokenizer each of these pieces is one private character. Were it spelt as upstream spells it ("<n>"), that
# word typed by a user would turn into white space.
_PRIVATE = {piece: chr(0x10F800 + index) for index, piece in enumerate(_WHITE_SPACE)}


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The workbook's tokenizer over the checkpoint's `ice_text.model`, with the ids that its configuration gives."""
    return Tokenizer(checkpoint.directory / "ice_text.model", int(checkpoint.config["gmask_token_id"]))


def complete_model(proto: sentencepiece_model_pb2.ModelProto) -> None:
    """Append, in place, what upstream's tokenizer appends to a bare model: special tokens, white space, bytes."""
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    present = {piece.piece for piece in proto.pieces}
    for pieces, piece_type in (
        (SPECIAL_TOKENS, kind.CONTROL),
        (_WHITE_SPACE, kind.USER_DEFINED),
        ([f"<0x{byte:02X}>" for byte in range(256)], kind.BYTE),
    ):
        for piece in pieces:
            if piece not in present:
                proto.pieces.add(piece=piece, score=0.0, type=piece_type)
    proto.trainer_spec.byte_fallback = True


def _read_model(path: Path) -> sentencepiece_model_pb2.ModelProto:
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        check_regular(path)
        proto.ParseFromString(path.read_bytes())
    except FileNotFoundError:
        raise WorkbookError(
            f"{path} is missing: copy the checkpoint's sentencepiece model there, it comes with the download."
        ) from None
    except DecodeError as error:
        raise WorkbookError(f"{path} is not a sentencepiece model ({error}): download it again.") from None
    if len(proto.pieces) <= NEWLINE_ID or proto.pieces[NEWLINE_ID].piece != "<n>":
        raise WorkbookError(
            f"{path} has no <n> as piece {NEWLINE_ID}, so it is not the tokenizer of ChatGLM-6B: "
            "take ice_text.model from the same checkpoint."
        )
    return proto


class Tokenizer:
    """Encode and decode with one `ice_text.model`."""

    def __init__(self, model_file: str | Path, gmask_id: int | None = None):
        """Read the sentencepiece model; raises WorkbookError if the file is missing, damaged or of another family.

        gmask_id: the configuration's id of [gMASK]. Before 6 April 2023 pieces were numbered from 20000.
        """
        path = Path(model_file)
        proto = _read_model(path)
        complete_model(proto)
        self._ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        kind = sentencepiece_model_pb2.ModelProto.SentencePiece
        for token in SPECIAL_TOKENS:  # control pieces never match text, so "[gMASK]" in a question stays text
            proto.pieces[self._ids[token]].type = kind.CONTROL
        for name, private in _PRIVATE.items():
            proto.pieces[self._ids[name]].piece = private
            proto.pieces[self._ids[name]].type = kind.USER_DEFINED
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

        self._first = 0 if gmask_id is None else gmask_id - self._ids["[gMASK]"]
        if self._first not in (0, IMAGE_TOKENS):
            raise WorkbookError(
                f"{path} makes [gMASK] {self._ids['[gMASK]']}, config.json {gmask_id}: take both from one checkpoint."
            )
        self._ids = {name: index + self._first for name, index in self._ids.items()}
        self.pad_id = self._first + PAD_ID
        self.blank_id = self._first + BLANK_ID
        self.mask_id = self._ids["[MASK]"]
        self.gmask_id = self._ids["[gMASK]"]
        self.sop_id = self._ids["<sop>"]
        self.eop_id = self._ids["<eop>"]
        self.size = len(proto.pieces)
        self._special_ids = {self._ids[token] for token in SPECIAL_TOKENS} | {
            self._first + i for i in (0, 1, 2, PAD_ID)
        }

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text, without [gMASK] and <sop>. Raises WorkbookError for text that has no UTF-8."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise WorkbookError(
                f"the text holds {text[error.start]!r}, half a character or a byte that is not UTF-8: give it in UTF-8."
            ) from None
        for name, white_space in reversed(_WHITE_SPACE.items()):  # the longest run of spaces first
            text = text.replace(white_space, _PRIVATE[name])
        return [self._first + piece for piece in self._sp.encode(text)]

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt: text, [gMASK], <sop>. The real checkpoint makes "你好" 5, 74874, 130001, 130004."""
        return [*self.encode_text(prompt), self.gmask_id, self.sop_id]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens and padding; an unfinished character reads as U+FFFD."""
        known = (int(i) for i in ids if self._first <= int(i) < self._first + self.size)
        text = str(self._sp.decode([i - self._first for i in known if i not in self._special_ids]))
        return text.translate({ord(private): _WHITE_SPACE[name] for name, private in _PRIVATE.items()})

    def piece(self, token_id: int) -> str:
        """The piece of one id as a reader should see it, with white space and special tokens spelt out."""
        names = {index: name for name, index in self._ids.items()}
        return names.get(int(token_id), f"<{int(token_id)}>")
