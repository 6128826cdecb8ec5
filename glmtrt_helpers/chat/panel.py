"""Notebook 06: the chat as a panel of widgets, which streams, can be stopped, and shows how full the context is.

Each answer is generated in a thread, so that the stop button works meanwhile; there is one at a time.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import traitlets

from glmtrt_helpers.chat import backends
from glmtrt_helpers.chat.conversation import Chat, Reply
from glmtrt_helpers.chat.questions import known_questions
from glmtrt_helpers.chat.sampling import Sampling
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.text import as_html
from glmtrt_helpers.sessions.base import UNBOUNDED, Session

STYLE = """<style>
.glmtrt-panel .glmtrt-log {max-height: 420px; overflow-y: auto; border: 1px solid #d5d5d5; border-radius: 6px;
  padding: 4px 10px; display: flex; flex-direction: column-reverse;}  /* so it stays at its end while text is added */
.glmtrt-log > * {flex: none; width: 100%;}
.glmtrt-question textarea {width: 100%; box-sizing: border-box; font: inherit; padding: 6px 8px; resize: vertical;
  color: inherit; background: transparent; border: 1px solid #8c8c8c; border-radius: 6px;}
.glmtrt-user, .glmtrt-answer {white-space: pre-wrap; line-height: 1.5; padding: 4px 10px; margin: 6px 0;
  border-radius: 8px; width: fit-content; max-width: 90%; color: #1a1a1a;}
.glmtrt-user {background: #dbe9f6; margin-left: auto;}
.glmtrt-answer {background: #f1efe9; min-height: 1.5em; min-width: 1.5em;}
</style>"""
WHERE = {
    "torch": "PyTorch on the CPU",
    "ort": "ONNX Runtime on the CPU",
    "tensorrt": "TensorRT on the GPU",
    "cuda": "one CUDA kernel a token, on the GPU",
}


class Question(anywidget.AnyWidget):
    """A text area in which Enter sends the message "send" and Shift+Enter breaks the line.

    The text areas of ipywidgets do not tell of keys, and its one-line `Text` has no second line.
    """

    _esm = Path(__file__).with_name("question.js")
    value = traitlets.Unicode().tag(sync=True)
    placeholder = traitlets.Unicode().tag(sync=True)


class ChatPanel:
    """A conversation and its widgets. widget: what a cell displays. missing: why backends are not offered."""

    def __init__(self, checkpoint: Checkpoint, dtype: str = "fp16", backend: str | None = None):
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.missing = backends.unavailable(checkpoint, dtype)
        self._sessions: dict[str, Session] = {}
        self._chat: Chat | None = None
        self._rounds: list[tuple[str, str]] = []
        self._tokens = 0  # of the conversation, its last answer included
        self._worker: threading.Thread | None = None
        self._make_widgets(backend or backends.best_backend(checkpoint, dtype)[0])
        self.widget = self._arrange()
        self._connect()
        self._introduce()

    def _make_widgets(self, backend: str) -> None:
        """The CSS classes are for styles, and for tests in a browser to find the widgets."""
        layout, defaults = widgets.Layout, Sampling()
        self.log = widgets.HTML(layout=layout(width="auto")).add_class("glmtrt-log")
        self.question = Question(placeholder="Ask something · 问点什么").add_class("glmtrt-question")
        known = [(question, question) for question in known_questions(self.checkpoint)]
        self.known = widgets.Dropdown(
            options=[("questions that it knows · 它会回答的问题", ""), *known],
            layout=layout(width="auto", max_width="100%"),
        ).add_class("glmtrt-known")
        if not known:
            self.known.layout.display = "none"
        self.send = widgets.Button(description="send", button_style="primary").add_class("glmtrt-send")
        self.stop = widgets.Button(description="stop", disabled=True).add_class("glmtrt-stop")
        self.new = widgets.Button(description="new conversation", layout=layout(flex="0 0 auto", width="150px"))
        self.new.add_class("glmtrt-new")
        wide = layout(flex="1 1 240px", max_width="420px", min_width="0")
        options = [(WHERE[name], name) for name in backends.BACKENDS if name not in self.missing]
        self.backend = widgets.Dropdown(options=options, value=backend, description="backend", layout=wide).add_class(
            "glmtrt-backend"
        )
        self.greedy = widgets.Checkbox(value=True, description="greedy", indent=False, layout=layout(width="auto"))
        self.greedy.add_class("glmtrt-greedy")
        self.temperature = _slider(widgets.FloatSlider, defaults.temperature, 0.05, 5.0, 0.05, "temperature")
        self.top_p = _slider(widgets.FloatSlider, defaults.top_p, 0.05, 1.0, 0.05, "top-p")
        self.top_k = _slider(widgets.IntSlider, defaults.top_k, 0, 200, 1, "top-k")
        for slider in (self.temperature, self.top_p, self.top_k):
            widgets.dlink((self.greedy, "value"), (slider, "disabled"))  # greedy decoding uses none of them
        self.pace = _slider(widgets.IntSlider, 0, 0, 300, 10, "pace")
        self.pace.tooltip = "milliseconds to wait after each token, to watch them arrive"
        self.context = widgets.IntProgress(min=0, layout=wide)
        self.context_text = widgets.Label().add_class("glmtrt-context")
        self.status = widgets.HTML().add_class("glmtrt-status")

    def _arrange(self) -> Any:
        buttons = [self.send, self.stop, self.new, self.backend, self.greedy]
        sliders = [self.temperature, self.top_p, self.top_k, self.pace]
        rows = [widgets.HTML(STYLE), self.log, self.known, self.question]
        for group in (buttons, sliders, [self.context, self.context_text]):
            rows.append(widgets.HBox(group, layout=widgets.Layout(flex_flow="row wrap")))
        rows.append(self.status)
        return widgets.VBox(rows, layout=widgets.Layout(max_width="860px")).add_class("glmtrt-panel")

    def _connect(self) -> None:
        self.send.on_click(lambda _: self.ask(self.question.value))
        self.question.on_msg(lambda *_: self.ask(self.question.value))
        self.known.observe(lambda _: self._choose(), "value")
        self.stop.on_click(lambda _: self.cancel())
        self.new.on_click(lambda _: self.start_over())
        self.backend.observe(lambda _: self._introduce(), "value")

    def _introduce(self) -> None:
        """Show which backend will answer, and why TensorRT does not."""
        text = f"Answers come from {WHERE[self.backend.value]}."
        if self.checkpoint.is_random:
            text += " Its weights are random, for measuring: its answers mean nothing."
        if "tensorrt" in self.missing:
            text += f" Not from TensorRT: {self.missing['tensorrt']}"
        self._set_status(text)
        self._show()
        self._show_context()

    def _choose(self) -> None:
        """Put the selected question into the box, to be sent or changed; the list can be opened again at once."""
        if self.known.value:
            self.question.value = self.known.value
            self.known.value = ""

    def _set_status(self, text: str) -> None:
        self.status.value = as_html(text)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.greedy.value, self.temperature.value, self.top_k.value, self.top_p.value)

    def session(self, backend: str) -> Session:
        """The session of a backend, opened when it is first used."""
        if backend not in self._sessions:
            self._set_status(f"opening {WHERE[backend]} …")
            self._sessions[backend] = backends.open_session(self.checkpoint, backend, self.dtype)
        return self._sessions[backend]

    def ask(self, question: str) -> None:
        """Answer in a thread; returns at once. An empty question does nothing, nor does one while an answer runs."""
        if not question.strip() or (self._worker and self._worker.is_alive()):
            return
        self.question.value = ""
        self.send.disabled, self.stop.disabled, self.backend.disabled = True, False, True
        self._worker = threading.Thread(target=self._answer, args=(question,), daemon=True)
        self._worker.start()

    def cancel(self) -> None:
        """Stop the running answer after its current token; what there is of it stays in the conversation."""
        if self._chat:
            self._chat.cancel()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the running answer has ended."""
        if self._worker:
            self._worker.join(timeout)

    def _answer(self, question: str) -> None:
        try:
            session = self.session(self.backend.value)
            if self._chat is None or self._chat.session is not session:
                history = self._chat.history if self._chat else []
                self._chat = Chat(self.checkpoint, session, self.sampling, drop_oldest=True)
                self._chat.history = history
            self._chat.set_sampling(self.sampling)
            self._rounds.append((question, ""))
            self._show()
            for reply in self._chat.stream(question):
                self._rounds[-1] = (question, reply.text)
                self._show(reply)
                if self.pace.value and not reply.ended:
                    time.sleep(self.pace.value / 1000)
        except WorkbookError as error:
            self._give_back(question, str(error))
        except Exception as error:  # in a thread it would be printed where nobody looks
            self._give_back(question, f"{type(error).__name__}: {error}")
        finally:
            self.send.disabled, self.stop.disabled, self.backend.disabled = False, True, False

    def _give_back(self, question: str, why: str) -> None:
        """Say why there is no answer. The question leaves the log for the box, unless something was typed there."""
        if self._rounds and self._rounds[-1] == (question, ""):
            del self._rounds[-1]
            self._show()
        self.question.value = self.question.value or question
        self._set_status(why)

    def _show_context(self) -> None:
        """How many tokens the conversation has, and how many the selected backend can take, once it is opened."""
        session = self._sessions.get(self.backend.value)
        self.context.max = min(self.checkpoint.max_length, session.limits.total if session else UNBOUNDED)
        self.context.value = self._tokens
        self.context_text.value = f"context: {self._tokens:,} of {self.context.max:,} tokens"

    def _show(self, reply: Reply | None = None) -> None:
        bubbles = [
            f'<div class="glmtrt-{who}">{as_html(text)}</div>'
            for question, answer in self._rounds
            for who, text in (("user", question), ("answer", _complete(answer)))
        ]
        self.log.value = "".join(bubbles) or "<i>No question yet.</i>"
        if reply is None:
            return
        self._tokens = reply.prompt + len(reply.ids)
        self._show_context()
        parts = [
            WHERE[self.backend.value],
            f"first token after {1000 * reply.to_first:.0f} ms",
            f"{len(reply.ids)} tokens, {reply.tokens_per_second:.0f} tokens/s",
        ]
        if reply.dropped:
            parts.append(f"oldest rounds dropped: {reply.dropped}")
        endings = {"": "…", "eop": "done", "length": "cut at the limit", "stopped": "stopped"}
        self._set_status(" · ".join([*parts, endings[reply.ended]]))

    def start_over(self) -> None:
        """Start a new conversation; a running answer is stopped first."""
        self.cancel()
        self.wait()
        if self._chat:
            self._chat.history = []
        self._rounds, self._tokens = [], 0
        self._introduce()


def _complete(text: str) -> str:
    """The text without a last character that lacks bytes."""
    return text.rstrip("\ufffd")


def _slider(kind: Any, value: float, low: float, high: float, step: float, name: str) -> Any:
    layout, style = widgets.Layout(flex="1 1 300px", max_width="420px", min_width="0"), {"description_width": "90px"}
    numbers = {"value": value, "min": low, "max": high, "step": step}
    slider = kind(**numbers, description=name, continuous_update=False, layout=layout, style=style)
    return slider.add_class(f"glmtrt-{name}")
