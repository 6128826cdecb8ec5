"""The notebooks in a real browser: a private JupyterLab, and what a reader does in it.

The server gets a private copy of the notebooks and private settings: nothing that is committed is saved over, and
nothing of the reader's own JupyterLab is read or changed. The browser is the system's Chromium; Playwright drives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

ROOT = Path(__file__).resolve().parent.parent.parent
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL_HINT = "apt-get install -y --no-install-recommends chromium fonts-noto-cjk"
# Everything in the page rather than only what is in view; no dialog or notification in the way of a click.
SETTINGS: dict[str, dict[str, Any]] = {
    "notebook-extension/tracker": {"windowingMode": "none", "recordTiming": False},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "docmanager-extension/plugin": {"autosave": False},
}
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
START_SECONDS, READY_SECONDS, RUN_SECONDS = 60, 90, 600


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome."""
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


def missing() -> str:
    """Why the browser cannot be used, as a sentence; empty if it can."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install -c constraints.txt -e '.[dev]'"
    if find_chromium() is None:
        return f"no Chromium is installed: {INSTALL_HINT}"
    return ""


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab. folder: what it serves."""

    folder: Path
    port: int
    token: str

    def url(self, path: str) -> str:
        """reset: not the workspace of the notebook that was opened before."""
        return f"http://127.0.0.1:{self.port}/{path}?token={self.token}&reset"


@contextlib.contextmanager
def jupyterlab(notebooks: Sequence[Path], private: Path) -> Iterator[Lab]:
    """Serve copies of `notebooks`, without their outputs, from the empty folder `private`; ends with all its kernels.

    Without outputs, a number in front of a cell means that it was run here, and `jupyter trust` is not needed.
    """
    folder = private / "notebooks"
    folder.mkdir(parents=True)
    for path in notebooks:
        content = nbformat.read(path, as_version=4)
        for cell in content.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(content, folder / path.name)
    shutil.copytree(ROOT / "notebooks" / "pictures", folder / "pictures")
    for name, values in SETTINGS.items():
        file = private / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    page_config = private / "config" / "labconfig" / "page_config.json"
    page_config.parent.mkdir(parents=True)
    page_config.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))

    lab = Lab(folder, _free_port(), secrets.token_hex(16))
    log_path = private / "jupyterlab.log"
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                *("-m", "jupyterlab", "--no-browser", "--allow-root"),
                *(f"--port={lab.port}", "--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1"),
                *(f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={lab.token}"),
                "--LabApp.expose_app_in_browser=True",  # as window.jupyterapp
                # If the caller is killed, it shuts itself down.
                *("--MappingKernelManager.cull_idle_timeout=900", "--ServerApp.shutdown_no_activity_timeout=900"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # kernels are its children: one signal to the group ends them all
            env={
                **os.environ,
                "JUPYTER_CONFIG_DIR": str(private / "config"),
                "JUPYTER_DATA_DIR": str(private / "data"),
                "JUPYTERLAB_SETTINGS_DIR": str(private / "settings"),
                "JUPYTERLAB_WORKSPACES_DIR": str(private / "workspaces"),
                "PYTHONHASHSEED": "0",
            },
        )
        try:
            _wait_for_answer(lab, server, log_path)
            yield lab
        finally:
            _end(server)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_answer(lab: Lab, server: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(lab.url("api/status"), timeout=5):
            return  # an answer that is an error is raised, as an OSError too
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log_path.read_text(errors='replace')[-3000:]}")


def _end(server: subprocess.Popen[bytes]) -> None:
    # First only the server: it ends its kernels, which have process groups of their own.
    server.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium; `missing()` must be empty."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(),
            # Most containers have neither a sandbox nor a large /dev/shm.
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--force-color-profile=srgb"],
        )
        try:
            yield browser
        finally:
            browser.close()


def open_notebook(page: Page, lab: Lab, name: str) -> None:
    """Open NAME.ipynb and wait until its kernel is idle."""
    page.goto(lab.url(f"lab/tree/{name}.ipynb"), wait_until="domcontentloaded", timeout=READY_SECONDS * 1000)
    page.locator(".jp-NotebookPanel .jp-Notebook .jp-Cell").first.wait_for(timeout=READY_SECONDS * 1000)
    _wait_for_idle(page, READY_SECONDS)


def _wait_for_idle(page: Page, seconds: float) -> None:
    # The notebook's own indicator says idle even before there is a kernel; the status line does not.
    page.wait_for_function(
        """() => document.querySelector('#jp-main-statusbar').innerText.includes('| Idle')
          && document.querySelector('.jp-NotebookPanel .jp-Notebook-ExecutionIndicator').dataset.status === 'idle'""",
        timeout=seconds * 1000,
    )


# The state of a run, from the notebook's model: on the page an error looks like any text on standard error. Empty cells
# are never run.
_PROGRESS = """() => {
  const cells = [...window.jupyterapp.shell.currentWidget.content.model.cells].filter(cell => cell.type === 'code');
  const source = cell => cell.sharedModel.getSource().trim();
  const errors = cells.flatMap(cell => cell.outputs.toJSON()).filter(output => output.output_type === 'error');
  const waiting = cells.filter(
    cell => source(cell) && (cell.executionCount === null || cell.executionState === 'running'));
  return {
    cells: cells.length,
    errors: errors.map(error => [`${error.ename}: ${error.evalue}`, ...error.traceback].join('\\n')),
    waiting: waiting.map(source),
  };
}"""


def run_all_cells(page: Page, seconds: float = RUN_SECONDS) -> int:
    """Menu Run, Run All Cells; waits until all have run and returns how many there are.

    Raises AssertionError with the text of the error if one fails, and when it takes longer than `seconds`.
    """
    page.locator("#jp-MainMenu .lm-MenuBar-item", has_text="Run").click()
    page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
    deadline = time.monotonic() + seconds
    while True:
        progress = page.evaluate(_PROGRESS)
        if progress["errors"]:
            errors = _COLOUR.sub("", "\n".join(progress["errors"]))
            raise AssertionError(f"a cell failed in the browser:\n{errors}")
        if progress["cells"] and not progress["waiting"]:
            break
        if time.monotonic() > deadline:
            raise AssertionError(f"not run after {seconds:.0f} s: {[*progress['waiting'], 'no code cell'][0]}")
        page.wait_for_timeout(250)
    _wait_for_idle(page, READY_SECONDS)
    return int(progress["cells"])


def wait_until(page: Page, condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` becomes true in time; the page keeps running meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        page.wait_for_timeout(50)
    return True


def type_number(page: Page, readout: Locator, number: int) -> None:
    """Set a slider by typing into the number next to it."""
    readout.click()
    readout.press("ControlOrMeta+a")
    page.keyboard.type(str(number))
    readout.press("Enter")
    assert wait_until(page, lambda: readout.inner_text().strip() == str(number), 5), (
        f"the slider says {readout.inner_text()!r}, {number} was typed"
    )


def breakpoint_at(page: Page, line: str) -> Locator:
    """Where a click sets or removes a breakpoint: left of the number of the first line that holds this text."""
    cell = page.locator(".jp-CodeCell", has_text=line).first
    lines = cell.locator(".cm-line").all_inner_texts()
    number = next(number for number, text in enumerate(lines, 1) if line in text)
    # The gutter's first element is hidden; it keeps the room.
    return cell.locator(".cm-gutters > .cm-breakpoint-gutter > .cm-gutterElement").nth(number)


def debug(page: Page, line: str) -> None:
    """Turn the debugger on, set a breakpoint at the line, run its cell, and wait until it stops there."""
    page.locator(".jp-DebuggerBugButton").click()
    page.locator(".jp-DebuggerSidebar").wait_for(timeout=READY_SECONDS * 1000)
    page.wait_for_timeout(2000)  # the kernel's debugger starts
    breakpoint_at(page, line).click()
    page.locator(".jp-DebuggerBreakpoint").first.wait_for(timeout=10_000)
    page.locator(".jp-CodeCell", has_text=line).first.locator(".cm-line").first.click()
    page.keyboard.press("Control+Enter")
    assert wait_until(page, lambda: bool(callstack(page).strip()), 20), "it did not stop"


def callstack(page: Page) -> str:
    return "\n".join(page.locator(".jp-DebuggerCallstack-body").all_inner_texts())


def press(page: Page, button: str) -> None:
    """One of the debugger's buttons, by how its tooltip begins."""
    page.locator(f".jp-DebuggerSidebar [title^='{button}']").first.click()


# Records every text that the last answer has. The browser calls the observer at each change; polling would miss some.
_RECORD = """() => {
  window.glmtrtRecorded = [];
  window.glmtrtObserver?.disconnect();
  const panel = document.querySelector('.glmtrt-panel');
  const before = panel.querySelectorAll('.glmtrt-answer').length;
  const record = () => {
    const answers = panel.querySelectorAll('.glmtrt-answer');
    if (answers.length <= before) return;
    const text = answers[answers.length - 1].textContent;
    if (text !== window.glmtrtRecorded.at(-1)) window.glmtrtRecorded.push(text);
  };
  window.glmtrtObserver = new MutationObserver(record);
  window.glmtrtObserver.observe(panel, {childList: true, subtree: true, characterData: true});
}"""


class ChatPanel:
    """The chat widget of notebook 06, used as a reader would: by typing and clicking."""

    def __init__(self, page: Page):
        self.page = page
        self.root = page.locator(".glmtrt-panel")
        self.root.wait_for(timeout=READY_SECONDS * 1000)
        self.root.scroll_into_view_if_needed()

    def set_greedy(self, greedy: bool) -> None:
        self.root.locator(".glmtrt-greedy input").set_checked(greedy)

    def set_pace(self, milliseconds: int) -> None:
        """Type a delay between tokens into the slider's number."""
        type_number(self.page, self.root.locator(".glmtrt-pace .widget-readout"), milliseconds)

    def new_conversation(self) -> None:
        """The stand-in knows most of its questions only without a history."""
        self.root.locator("button.glmtrt-new").click()
        assert wait_until(self.page, lambda: self.answers().count() == 0, 10), "the old rounds are still shown"

    def answers(self) -> Locator:
        return self.root.locator(".glmtrt-log .glmtrt-answer")

    def box(self) -> Locator:
        return self.root.locator(".glmtrt-question textarea")

    def record(self) -> None:
        """Record the texts of the next answer."""
        self.page.evaluate(_RECORD)

    def send(self, question: str) -> None:
        """Type and send, recording the texts of the answer from here on."""
        self.record()
        self.box().fill(question)
        self.root.locator("button.glmtrt-send").click()

    def is_ready(self) -> bool:
        """Whether no answer is running."""
        return self.root.locator("button.glmtrt-send").is_enabled()

    def stop(self) -> None:
        self.root.locator("button.glmtrt-stop").click()

    def texts(self) -> list[str]:
        """The texts that the answer to the last question had, in order, without empty ones."""
        return [text for text in self.page.evaluate("() => window.glmtrtRecorded") if text.strip()]

    def text(self) -> str:
        """The last answer as it is now."""
        return (self.texts() or [""])[-1].strip()

    def status(self) -> str:
        return self.root.locator(".glmtrt-status").inner_text().strip()

    def wait_for_answer(self, answer: str, seconds: float = 120) -> None:
        """Wait until the panel shows exactly this answer and its speed."""

        def arrived() -> bool:
            return self.text() == answer and "tokens/s" in self.status()

        assert wait_until(self.page, arrived, seconds), (
            f"the answer is {self.text()!r}, status {self.status()!r}; expected was {answer!r}"
        )
