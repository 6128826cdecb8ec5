"""JSON from files: what is not a bounded regular file of it in UTF-8 is refused in a sentence."""

import os
from pathlib import Path

import msgspec
import pytest

from glmtrt_helpers.core import records
from glmtrt_helpers.core.errors import WorkbookError


class Model(msgspec.Struct):
    name: str
    sizes: list[int] = []


def refused(path: Path) -> str:
    with pytest.raises(WorkbookError) as caught:
        records.read(path, Model, "make it again")
    said = str(caught.value)
    assert str(path) in said and "\n" not in said and len(said) < 400, said
    return said


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_utf_8_is_read_with_and_without_a_byte_order_mark(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(mark + '{"name": "你好", "sizes": [1], "more": null}'.encode())
    assert records.read(path, Model, "") == Model("你好", [1])


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ('{"name": "你好"}'.encode("utf-16"), "UTF-16"),
        ('{"name": "你好"}'.encode("utf-16-be"), "UTF-16"),
        (b'{\0"\0n\0a\0m\0e\0"\0', "UTF-16"),
        ('{"name": "你好"}'.encode("gbk"), "GBK"),
        (b"\xff" * 1_000_000, "ff ff"),
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"name": 3}', "$.name"),
        (b'{"sizes": []}', "`name`"),
        (b'{"name": "a", "sizes": [1, true]}', "$.sizes[1]"),
        (b'{"name": "a", "sizes": [1.0e400]}', "$.sizes[0]"),
        (b'{"name": "a", "sizes": [NaN]}', "is not JSON"),
        (b"null", "expected"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
    ],
)
def test_everything_else_is_refused(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    assert says in refused(path)


def test_a_pipe_a_device_a_folder_and_a_file_without_end_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, says in (("pipe", "a pipe"), ("zero", "a device"), ("folder", "a folder")):
        assert says in refused(tmp_path / name)
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(10**12)
    assert "1,000,000,000,000 bytes" in refused(tmp_path / "large")


def test_depth_is_bounded() -> None:
    for raw in (b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000):
        with pytest.raises(ValueError, match=r"nested too deeply|is not JSON"):
            records.decode(raw, object)
