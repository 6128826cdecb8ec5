"""The tokenizer of the stand-in as transformers would load it, with upstream's order of initialisation.

`super().__init__()` runs before `sp_tokenizer` exists. transformers has asked for the vocabulary inside that call
since 4.34, so there this class ends in the well-known AttributeError (in transformers 5: a TypeError). The workbook's own
tokenizer (`glmtrt_helpers/tokenizer.py`) reads the same `ice_text.model` without it.
"""

import os
import shutil

import sentencepiece as spm
from transformers.tokenization_utils import PreTrainedTokenizer


class SPTokenizer:
    """Text to pieces: line breaks, tabs and runs of spaces become pieces of their own first."""

    def __init__(self, vocab_file, max_blank_length=80):
        self.sp = spm.SentencePieceProcessor(model_file=vocab_file)
        self.max_blank_length = max_blank_length

    @property
    def num_tokens(self):
        return self.sp.get_piece_size()

    def preprocess(self, text):
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for length in range(self.max_blank_length, 1, -1):
            text = text.replace(" " * length, f"<|blank_{length}|>")
        return text

    def postprocess(self, text):
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        for length in range(2, self.max_blank_length + 1):
            text = text.replace(f"<|blank_{length}|>", " " * length)
        return text


class ChatGLMTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "ice_text.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]

    def __init__(
        self, vocab_file, do_lower_case=False, bos_token="<sop>", eos_token="<eop>", pad_token="<pad>",
        unk_token="<unk>", mask_token="[MASK]", gmask_token="[gMASK]", padding_side="left", **kwargs,
    ):  # fmt: skip
        super().__init__(
            bos_token=bos_token, eos_token=eos_token, pad_token=pad_token, unk_token=unk_token,
            mask_token=mask_token, padding_side=padding_side, **kwargs,
        )  # fmt: skip
        self.vocab_file = vocab_file
        self.gmask_token = gmask_token
        self.sp_tokenizer = SPTokenizer(vocab_file)

    @property
    def vocab_size(self):
        return self.sp_tokenizer.num_tokens

    def get_vocab(self):
        vocab = {self._convert_id_to_token(i): i for i in range(self.vocab_size)}
        vocab.update(self.added_tokens_encoder)
        return vocab

    def _tokenize(self, text, **kwargs):
        return self.sp_tokenizer.sp.encode(self.sp_tokenizer.preprocess(text), out_type=str)

    def _convert_token_to_id(self, token):
        return self.sp_tokenizer.sp.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.sp_tokenizer.sp.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        return self.sp_tokenizer.postprocess(self.sp_tokenizer.sp.decode(tokens))

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        ids = token_ids_0 + [self.convert_tokens_to_ids(self.gmask_token), self.bos_token_id]
        return ids if token_ids_1 is None else ids + token_ids_1 + [self.eos_token_id]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        target = os.path.join(save_directory, self.vocab_files_names["vocab_file"])
        shutil.copyfile(self.vocab_file, target)
        return (target,)
