"""Notebook 00: what a checkpoint holds, and how its model and its tokenizer are loaded."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoint": ["Checkpoint", "open_checkpoint", "shares_vocabulary"],
        "code_hash": ["announce", "check_auto_map", "code_sha256"],
        "config": ["expected_shapes", "read_config"],
        "identity": ["open_export"],
        "loading": ["load_bounded", "load_model", "load_streamed", "read_tensors"],
        "remote_code": ["build_model", "import_remote_code"],
        "shards": ["locate_tensors", "to_safetensors"],
        "tokenizer": ["Tokenizer", "load_tokenizer"],
        "working_copy": ["hard_links_note", "make_working_copy"],
    },
)
