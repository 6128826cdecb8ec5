"""Nothing reaches out: connections and look-ups are watched, native ones too, while commands and a notebook run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from support.checkpoints import ROOT, make_random

from glmtrt_helpers.checkpoints import code_hash
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.processes import GLMTRT
from glmtrt_helpers.patches import patching
from glmtrt_helpers.workbook import run_notebooks

# Where there is no compiler: what Python itself asks for.
AUDIT = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        where = arguments[0] if event in ("socket.getaddrinfo", "socket.gethostbyname") else arguments[1]
        where = where[0] if isinstance(where, tuple) else where
        if isinstance(where, str) and not where.startswith(("127.", "::1", "localhost", "/")):
            with open(os.environ["WATCH_LOG"], "a") as log:
                log.write(f"{event} {where}\\n")
sys.addaudithook(watch)
"""
# As somebody's own Jupyter would: the libraries are loaded before the workbook.
NOTEBOOK = """
import transformers
from transformers import AutoTokenizer
from pathlib import Path
directory = Path({directory!r})
from glmtrt_helpers import checkpoints, sessions
from glmtrt_helpers.core import WorkbookError
from glmtrt_helpers.sessions.onnxruntime import OrtSession
session = OrtSession(directory / "model.fp16.onnx")
try:
    AutoTokenizer.from_pretrained("no-such-owner/no-such-model", trust_remote_code=True)
except OSError:
    pass
checkpoints.check_auto_map(directory)
try:
    AutoTokenizer.from_pretrained(str(directory), trust_remote_code=True)
except (AttributeError, TypeError):
    pass
import time
time.sleep(15)  # telemetry that is on makes its first look-up nine seconds after the import
"""

Watched = Callable[[], list[str]]


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Watch the processes that are started from here on; returns what they asked for."""
    log, compiler = tmp_path / "network.log", shutil.which("cc")
    if compiler:
        library = tmp_path / "network.so"
        source = ROOT / "tests" / "support" / "network.c"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        monkeypatch.setenv("LD_PRELOAD", str(library))
    else:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(AUDIT)
        path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("WATCH_LOG", str(log))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "ORT_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    return lambda: log.read_text().splitlines() if log.exists() else []


def test_what_reaches_out_is_seen(watched: Watched) -> None:
    program = """
import socket
for connect in (lambda: socket.getaddrinfo("glmtrt.invalid", 80), lambda: datagram.connect(("192.0.2.1", 9))):
    datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        connect()
    except OSError:
        pass
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    seen = " ".join(watched())
    assert "glmtrt.invalid" in seen and "192.0.2.1" in seen


@pytest.mark.slow
def test_commands_and_a_notebook_reach_nothing(watched: Watched, tmp_path: Path) -> None:
    directory = make_random(tmp_path / "chatglm_random", num_layers=1)
    patching.patch_checkpoint(directory)
    for command, *options in (
        ("doctor",),
        ("inputs", directory, "--max-new", "2"),
        ("export", directory),
        ("verify", directory, "--case", "decode"),
        ("chat", directory, "--backend", "ort", "--prompt", "the", "--max-length", "8"),
    ):
        done = subprocess.run([*GLMTRT, command, *map(str, options)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert watched() == [], command
    notebook = tmp_path / "tiny.ipynb"
    cell = nbformat.v4.new_code_cell(NOTEBOOK.format(directory=str(directory)))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), notebook)
    run_notebooks.execute(notebook, tmp_path / "executed.ipynb")
    assert watched() == []


def test_libraries_that_were_loaded_first_are_told_too(watched: Watched) -> None:
    program = """
import huggingface_hub.constants, onnxruntime
calls = []
onnxruntime.disable_telemetry_events = lambda: calls.append(1)
assert not huggingface_hub.constants.is_offline_mode()
import glmtrt_helpers
assert huggingface_hub.constants.is_offline_mode() and calls == [1]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json", "processor_config.json"])
@pytest.mark.parametrize(
    "auto_map",
    [
        {"AutoTokenizer": ["owner/name--tokenization_chatglm.ChatGLMTokenizer", None]},
        {"AutoTokenizer": [None, "owner/name--tokenization_chatglm.ChatGLMTokenizer"]},
        {"AutoModel": "owner/name--modeling_chatglm.ChatGLMModel"},
        {"AutoConfig": "../other/configuration.Config"},
        "owner/name--m.C",
        ["owner/name--m.C"],
    ],
)
def test_an_auto_map_that_leaves_the_checkpoint_is_refused(tiny_random: Path, file: str, auto_map: object) -> None:
    code_hash.check_auto_map(tiny_random)
    path = tiny_random / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | {"auto_map": auto_map}))
    with pytest.raises(WorkbookError, match=rf"{file}: auto_map names .*nothing was loaded"):
        code_hash.check_auto_map(tiny_random)
