"""Pictures of the notebooks as JupyterLab shows them, with their widgets alive: `make screenshots`.

    PYTHONPATH=tests python -m support.screenshots [output folder, default build/screenshots] [numbers of notebooks]

Each notebook is run in a browser and saved from top to bottom as NAME_0.png, NAME_1.png and so on. The pictures that
notebooks 01 and 06 show, in notebooks/pictures, are made anew beside them.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from support.browser import (
    ROOT,
    ChatPanel,
    chromium,
    debug,
    jupyterlab,
    missing,
    open_notebook,
    press,
    run_all_cells,
    wait_until,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTH, SLICE = 1280, 1800
NUMBERS = ("01", "04", "05", "06")
QUESTION = "为什么要用 flatten？"
_SCROLLER = """() => document.querySelector('.jp-NotebookPanel .jp-WindowedPanel-outer')
  || document.querySelector('.jp-NotebookPanel .jp-Notebook')"""
# To the end of the last cell; JupyterLab leaves empty room below it.
_HEIGHT = """element => [...element.querySelectorAll('.jp-Cell')].at(-1).getBoundingClientRect().bottom
  - element.getBoundingClientRect().top + element.scrollTop"""


def main(output: Path, numbers: list[str]) -> int:
    """Write the pictures of the notebooks `numbers` and print their names; returns how many notebooks failed."""
    if absent := missing():
        sys.exit(absent)
    output.mkdir(parents=True, exist_ok=True)
    paths = [path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if path.stem[:2] in numbers]
    failed = 0
    with (
        tempfile.TemporaryDirectory() as private,
        jupyterlab(paths, Path(private)) as lab,
        chromium() as browser,
    ):
        for path in paths:
            page = browser.new_page(viewport={"width": WIDTH, "height": SLICE})
            open_notebook(page, lab, path.stem)
            hide_sidebars(page)
            try:
                run_all_cells(page)
                if path.stem.startswith("06"):
                    chat(page).root.screenshot(path=output / "06_chat_panel.png")
            except AssertionError as error:  # a picture of it helps to see why
                failed += 1
                print(f"{path.name}: {error}", file=sys.stderr)
            for picture in take(page, output, path.stem):
                print(picture, flush=True)
            if path.stem.startswith("01"):
                debugger(page, output / "01_debugger.png")
            page.close()
    return failed


def debugger(page: Page, picture: Path) -> None:
    """Save a picture of JupyterLab's debugger, stopped in the model's source; without the paths of this machine."""
    page.set_viewport_size({"width": 1280, "height": 720})
    debug(page, "return attention(")
    press(page, "Step In")
    page.wait_for_timeout(3000)
    page.evaluate(
        """() => document.querySelectorAll('.jp-DebuggerCallstackFrame-location').forEach(
          place => { place.textContent = place.textContent.split('/').at(-1); })"""
    )
    page.screenshot(path=picture)
    press(page, "Terminate")


def chat(page: Page) -> ChatPanel:
    """Ask a question in the chat panel and wait for the whole answer."""
    panel = ChatPanel(page)
    panel.set_greedy(True)
    panel.send(QUESTION)
    if not wait_until(page, lambda: panel.status().endswith("done"), 120):
        raise AssertionError(f"no answer in two minutes, status {panel.status()!r}")
    return panel


def hide_sidebars(page: Page) -> None:
    """Give the notebook the whole width."""
    if page.locator("#jp-left-stack").is_visible():
        page.locator("#jp-MainMenu .lm-MenuBar-item", has_text="View").click()
        page.locator('.lm-Menu-item[data-type="submenu"]', has_text="Appearance").hover()
        page.locator('.lm-Menu-item[data-command="application:toggle-left-area"]').click()


def take(page: Page, output: Path, name: str) -> list[Path]:
    """Scroll through the notebook and save each view; the last picture is only as high as the rest."""
    for old in output.glob(f"{name}_*.png"):
        old.unlink()
    scroller = page.evaluate_handle(_SCROLLER).as_element()
    assert scroller is not None
    page.wait_for_timeout(1500)  # pictures in outputs have no height before they are loaded
    box = scroller.bounding_box()
    assert box is not None
    height, seen = int(scroller.evaluate(_HEIGHT)), int(box["height"])
    written: list[Path] = []
    for top in range(0, height, seen):
        scroller.evaluate("(element, top) => { element.scrollTop = top; }", top)
        page.wait_for_timeout(300)
        repeated = top - scroller.evaluate("element => element.scrollTop")  # scrolling stops at the end
        shown = min(seen - repeated, height - top)
        clip = {"x": box["x"], "y": box["y"] + repeated, "width": box["width"], "height": shown}
        written.append(output / f"{name}_{len(written)}.png")
        page.screenshot(path=written[-1], clip=clip)
    return written


if __name__ == "__main__":
    # The shipped model, as in the tests, unless another one is selected.
    os.environ.setdefault("GLMTRT_MODEL", "models/chatglm_tiny")
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/screenshots")
    sys.exit(1 if main(folder, sys.argv[2:] or list(NUMBERS)) else 0)
