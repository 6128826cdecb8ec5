"""Notebooks 01 and 06 in JupyterLab in a real browser: sliders redraw; the chat streams, stops, and draws Chinese.

Skipped where Chromium or Playwright is missing, except under CI=true: there they fail.
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.browser import (
    ChatPanel,
    breakpoint_at,
    callstack,
    chromium,
    debug,
    jupyterlab,
    missing,
    open_notebook,
    press,
    run_all_cells,
    type_number,
    wait_until,
)
from support.checkpoints import ROOT
from support.working_copy import prepare_working_copy

from glmtrt_helpers.workbook import run_notebooks, setup

pytestmark = pytest.mark.browser
CHAT, SLIDERS = "06_chat_inference", "01_debug_forward_inputs"
CHINESE, ENGLISH = "为什么要用 flatten？", "What is a profile?"
# Its answer is long enough to press stop.
LONG = "Tell me the whole story from checkpoint to chat."
PACE = 100  # milliseconds between tokens


def trained_answers() -> dict[str, str]:
    """First questions of the stand-in's training text, with their answers."""
    corpus = ROOT / "glmtrt_helpers" / "standin" / "corpus.jsonl"
    lines = corpus.read_text(encoding="utf-8").splitlines()
    return dict(json.loads(line)["rounds"][0] for line in lines)


ANSWERS = trained_answers()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """A function that opens a notebook in JupyterLab, runs all of its cells and returns the browser's page."""
    if absent := missing():
        if os.environ.get("CI", "").lower() in ("", "0", "false", "no"):
            pytest.skip(absent)
        pytest.fail(absent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(setup.MODEL_VARIABLE, setup.DEFAULT_MODEL)
        prepare_working_copy(CHAT)
        notebooks = [path for path in run_notebooks.notebooks() if path.stem in (CHAT, SLIDERS)]
        with jupyterlab(notebooks, tmp_path_factory.mktemp("lab")) as lab, chromium() as browser:

            def run(name: str) -> Any:
                page = browser.new_page(viewport={"width": 1400, "height": 1000})
                open_notebook(page, lab, name)
                assert run_all_cells(page) > 0
                return page

            yield run


@pytest.fixture(scope="module")
def chat_page(opened: Callable[[str], Any]) -> Any:
    return opened(CHAT)


@pytest.fixture
def panel(chat_page: Any) -> ChatPanel:
    """The chat panel with an empty conversation, greedy, without delay."""
    panel = ChatPanel(chat_page)
    panel.new_conversation()
    panel.set_greedy(True)
    panel.set_pace(0)
    return panel


@pytest.mark.parametrize("question", [CHINESE, ENGLISH], ids=["chinese", "english"])
def test_an_answer_streams_and_is_the_trained_one(panel: ChatPanel, question: str) -> None:
    panel.set_pace(20)
    panel.send(question)
    panel.wait_for_answer(ANSWERS[question])
    *partial, final = panel.texts()
    assert final.strip() == ANSWERS[question]
    grown = {text.strip() for text in partial} - {final.strip()}
    assert len(grown) >= 3, f"the answer came in {len(grown) + 1} steps: {sorted(grown, key=len)}"
    assert panel.root.locator(".glmtrt-user").last.inner_text().strip().endswith(question)
    assert panel.root.locator(".glmtrt-context").count() == 1
    shown = panel.answers().last.inner_text()
    assert ANSWERS[question] in shown and "\ufffd" not in "".join((*partial, shown))


def test_stop_ends_an_answer_and_the_next_one_is_whole(panel: ChatPanel) -> None:
    whole = ANSWERS[LONG]
    panel.set_pace(PACE)
    panel.send(LONG)
    assert wait_until(panel.page, lambda: len(panel.texts()) >= 3, 60), f"the answer is {panel.text()!r}"
    panel.stop()
    assert wait_until(panel.page, lambda: panel.status().endswith("stopped"), 15), panel.status()
    stopped = panel.text()
    assert 0 < len(stopped) < len(whole) and whole.startswith(stopped[:20])
    panel.page.wait_for_timeout(10 * PACE)
    assert panel.text() == stopped and panel.status().endswith("stopped")

    panel.new_conversation()
    panel.set_pace(0)
    panel.send(CHINESE)
    panel.wait_for_answer(ANSWERS[CHINESE])


def test_enter_sends_and_shift_enter_breaks_the_line(panel: ChatPanel) -> None:
    box = panel.box()
    box.fill("")
    box.press("Shift+Enter")
    box.type("and more")
    assert box.input_value() == "\nand more" and panel.answers().count() == 0
    # While an input method is composing, Enter takes what it suggests.
    composing = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true})"
    assert box.evaluate(f"box => box.dispatchEvent({composing})"), "the input method did not get the key"
    panel.page.wait_for_timeout(500)
    assert box.input_value() == "\nand more" and panel.answers().count() == 0
    panel.record()
    box.fill(ENGLISH)
    box.press("Enter")
    panel.wait_for_answer(ANSWERS[ENGLISH])
    assert box.input_value() == ""


def test_the_log_shows_the_newest_text(panel: ChatPanel) -> None:
    log = panel.root.locator(".glmtrt-log")
    for question in 5 * (CHINESE, ENGLISH):
        count = panel.answers().count()
        panel.box().fill(question)
        panel.box().press("Enter")
        assert wait_until(panel.page, lambda count=count: panel.answers().count() > count and panel.is_ready(), 60)
    assert log.evaluate("log => log.scrollHeight > log.clientHeight + 50"), "the log has nothing to scroll"
    below = "log => [...log.querySelectorAll('.glmtrt-answer')].at(-1).getBoundingClientRect().bottom"
    assert log.evaluate(f"log => ({below})(log) <= log.getBoundingClientRect().bottom + 1")


@pytest.mark.parametrize("width", [1280, 900, 640])
def test_the_panel_fits_the_page(panel: ChatPanel, width: int) -> None:
    size = panel.page.viewport_size
    panel.page.set_viewport_size({"width": width, "height": 1000})
    panel.page.wait_for_timeout(500)
    try:
        outside = panel.root.evaluate(
            """panel => {
              const cell = panel.closest('.jp-OutputArea-output').getBoundingClientRect();
              return [...panel.querySelectorAll('*')].filter(element => {
                const box = element.getBoundingClientRect();
                return box.width && (box.right > cell.right + 1 || box.left < cell.left - 1);
              }).map(element => element.className);
            }"""
        )
    finally:
        panel.page.set_viewport_size(size)
    assert outside == []


def test_no_broken_character_in_the_panel(panel: ChatPanel) -> None:
    panel.send(CHINESE)
    panel.wait_for_answer(ANSWERS[CHINESE])
    text = panel.root.inner_text()  # elsewhere the notebook shows one deliberately
    assert CHINESE in text and ANSWERS[CHINESE] in text
    broken = text.find("\ufffd")
    assert broken < 0, text[max(broken - 100, 0) : broken + 100]


def test_chinese_is_drawn_with_a_font_that_has_it(panel: ChatPanel) -> None:
    """A font draws the same box for every character that it lacks, and for a code point that no font has."""
    panel.send(CHINESE)
    panel.wait_for_answer(ANSWERS[CHINESE])
    drawn = panel.page.evaluate(
        """characters => {
          const font = getComputedStyle(document.querySelector('.glmtrt-panel .glmtrt-answer')).fontFamily;
          return characters.map(character => {
            const canvas = Object.assign(document.createElement('canvas'), {width: 64, height: 64});
            const context = canvas.getContext('2d');
            context.font = `40px ${font}`;
            context.fillText(character, 8, 48);
            return [...context.getImageData(0, 0, 64, 64).data].join();
          });
        }""",
        ["你", "好", "\uf8ff", " "],
    )
    different = len(set(drawn))  # counted first, because a failure would print all pixels
    assert different == 4, "Chinese characters are drawn as boxes: install fonts-noto-cjk"


def test_the_debugger_stops_inside_the_model(opened: Callable[[str], Any]) -> None:
    """As notebook 01 says; and pdb works afterwards."""
    page = opened(SLIDERS)
    debug(page, "return attention(")
    press(page, "Step In")
    assert wait_until(page, lambda: "attention_fn" in callstack(page), 20), callstack(page)
    variables = page.locator(".jp-DebuggerVariables").first
    assert wait_until(page, lambda: "query_layer" in variables.inner_text(), 20), variables.inner_text()
    tabs = page.locator("#jp-main-dock-panel .lm-TabBar-tabLabel")
    assert any(name.startswith("modeling_chatglm.py") for name in tabs.all_inner_texts())
    tabs.filter(has_text=SLIDERS).click()
    breakpoint_at(page, "return attention(").click()
    press(page, "Continue")
    assert wait_until(page, lambda: not callstack(page).strip(), 20), callstack(page)
    page.locator(".jp-DebuggerBugButton").click()
    assert run_all_cells(page) > 0
    printed = page.locator(".jp-Cell", has_text="def stop_once").locator(".jp-OutputArea").inner_text()
    assert "(4, 2, 4, 32)" in printed and "(5, 2, 4, 32)" in printed


def test_a_slider_redraws_its_picture(opened: Callable[[str], Any]) -> None:
    page = opened(SLIDERS)
    widget = page.locator(".jp-NotebookPanel .widget-interact").first
    picture = widget.locator("img, svg")
    assert wait_until(page, lambda: picture.count() == 1, 30), "there are sliders and no picture below them"
    before = picture.get_attribute("src")
    type_number(page, widget.locator(".widget-readout").first, 3)
    assert wait_until(page, lambda: picture.count() == 1 and picture.get_attribute("src") != before, 30)
