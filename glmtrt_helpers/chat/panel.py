"""The chat of notebook 06 as a panel of widgets: it streams, can be stopped, and shows how full the cache is.

An answer is made in a thread of its own, so that the stop button works while it grows; nothing else runs meanwhile.
"""

from __future__ import annotations

import html
import threading
import time
from typing import Any

import ipywidgets as widgets

from glmtrt_helpers.chat import backends
from glmtrt_helpers.chat.conversation import Chat, Reply
from glmtrt_helpers.chat.sampling import Sampling
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.sessions.base import Session

STYLE = """<style>
.glmtrt-log {max-height: 420px; overflow-y: auto; border: 1px solid #d5d5d5; border-radius: 6px; padding: 4px 10px;}
.glmtrt-user, .glmtrt-answer {white-space: pre-wrap; line-height: 1.5; padding: 4px 10px; margin: 6px 0;
  border-radius: 8px; width: fit-content; max-width: 90%; color: #1a1a1a;}
.glmtrt-user {background: #dbe9f6; margin-left: auto;}
.glmtrt-answer {background: #f1efe9; min-height: 1.5em; min-width: 1.5em;}
</style>"""
WHERE = {"torch": "PyTorch on the CPU", "ort": "ONNX Runtime on the CPU", "tensorrt": "TensorRT on the GPU"}


class ChatPanel:
    """The widgets and the conversation behind them. `widget` is what a cell displays."""

    def __init__(self, checkpoint: Checkpoint, dtype: str = "fp16", backend: str | None = None):
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.missing = backends.unavailable(checkpoint, dtype)
        self._sessions: dict[str, Session] = {}
        self._talk: Chat | None = None
        self._rounds: list[tuple[str, str]] = []
        self._worker: threading.Thread | None = None
        self._make_widgets(backend or backends.best_backend(checkpoint, dtype)[0])
        self._greet()

    def _make_widgets(self, backend: str) -> None:
        wide = widgets.Layout(width="auto")
        self.log = _classed(widgets.HTML(layout=wide), "glmtrt-log")
        self.question = _classed(
            widgets.Textarea(placeholder="Ask something · 问点什么", rows=2, layout=wide), "glmtrt-question"
        )
        self.send = _classed(widgets.Button(description="send", button_style="primary"), "glmtrt-send")
        self.stop = _classed(widgets.Button(description="stop", disabled=True), "glmtrt-stop")
        self.anew = _classed(
            widgets.Button(description="new conversation", layout=widgets.Layout(flex="0 0 auto", width="150px")),
            "glmtrt-new",
        )
        choices = [(WHERE[name], name) for name in backends.BACKENDS if name not in self.missing]
        self.backend = widgets.Dropdown(
            options=choices, value=backend, description="backend", layout=widgets.Layout(width="300px")
        )
        _classed(self.backend, "glmtrt-backend")
        self.greedy = _classed(
            widgets.Checkbox(value=True, description="greedy", indent=False, layout=widgets.Layout(width="auto")),
            "glmtrt-greedy",
        )
        defaults = Sampling()
        self.temperature = _slider(widgets.FloatSlider, defaults.temperature, 0.05, 5.0, 0.05, "temperature")
        self.top_p = _slider(widgets.FloatSlider, defaults.top_p, 0.05, 1.0, 0.05, "top-p")
        self.top_k = _slider(widgets.IntSlider, defaults.top_k, 0, 200, 1, "top-k")
        self.pace = _slider(widgets.IntSlider, 0, 0, 300, 10, "pace")
        self.pace.tooltip = "milliseconds to wait between tokens, to watch them come"
        self.cache = widgets.IntProgress(min=0, max=self.checkpoint.max_length, layout=widgets.Layout(width="240px"))
        self.cache_text = _classed(widgets.Label(), "glmtrt-cache")
        self.status = _classed(widgets.HTML(), "glmtrt-status")
        self.send.on_click(lambda _: self.ask(self.question.value))
        self.stop.on_click(lambda _: self.cancel())
        self.anew.on_click(lambda _: self.forget())
        self.backend.observe(lambda _: self._greet(), "value")
        rows = [
            widgets.HTML(STYLE),
            self.log,
            self.question,
            widgets.HBox(
                [self.send, self.stop, self.anew, self.backend, self.greedy],
                layout=widgets.Layout(flex_flow="row wrap"),
            ),
            widgets.HBox([self.temperature, self.top_p]),
            widgets.HBox([self.top_k, self.pace]),
            widgets.HBox([self.cache, self.cache_text]),
            self.status,
        ]
        self.widget = _classed(widgets.VBox(rows, layout=widgets.Layout(max_width="860px")), "glmtrt-panel")

    def _greet(self) -> None:
        """Say on what it will answer, and why on nothing faster."""
        text = f"Answers come from {WHERE[self.backend.value]}."
        if self.checkpoint.is_random:
            text += " Its weights are random, for measuring: what it says means nothing."
        if "tensorrt" in self.missing:
            text += f" Not from TensorRT: {self.missing['tensorrt']}"
        self._say(text)
        self._show()

    def _say(self, text: str) -> None:
        self.status.value = html.escape(text)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.greedy.value, self.temperature.value, self.top_k.value, self.top_p.value)

    def session(self, backend: str) -> Session:
        """The session of a backend, opened at its first use."""
        if backend not in self._sessions:
            self._say(f"opening {WHERE[backend]} …")
            self._sessions[backend] = backends.open_session(self.checkpoint, backend, self.dtype)
        return self._sessions[backend]

    def ask(self, question: str) -> None:
        """Answer in a thread; returns at once. A question while an answer runs, and an empty one, do nothing."""
        if not question.strip() or (self._worker and self._worker.is_alive()):
            return
        self.question.value = ""
        self.send.disabled, self.stop.disabled, self.backend.disabled = True, False, True
        self._worker = threading.Thread(target=self._answer, args=(question,), daemon=True)
        self._worker.start()

    def cancel(self) -> None:
        """Stop the running answer after its current token; what has come stays in the conversation."""
        if self._talk:
            self._talk.cancel()

    def wait(self, timeout: float | None = None) -> None:
        """Until the running answer has ended."""
        if self._worker:
            self._worker.join(timeout)

    def _answer(self, question: str) -> None:
        try:
            session = self.session(self.backend.value)
            if self._talk is None or self._talk.session is not session:
                history = self._talk.history if self._talk else []
                self._talk = Chat(self.checkpoint, session, self.sampling, drop_oldest=True)
                self._talk.history = history
            self._talk.set_sampling(self.sampling)
            self.cache.max = self._talk.limit
            self._rounds.append((question, ""))
            for reply in self._talk.stream(question):
                self._rounds[-1] = (question, reply.text)
                self._show(reply)
                if self.pace.value and not reply.ended:
                    time.sleep(self.pace.value / 1000)
        except WorkbookError as error:
            self._say(str(error))
        except Exception as error:  # a thread's error would be printed where nobody looks
            self._say(f"{type(error).__name__}: {error}")
        finally:
            self.send.disabled, self.stop.disabled, self.backend.disabled = False, True, False

    def _show(self, reply: Reply | None = None) -> None:
        rounds = "".join(
            f'<div class="glmtrt-user">{html.escape(q)}</div><div class="glmtrt-answer">{html.escape(_whole(a))}</div>'
            for q, a in self._rounds
        )
        self.log.value = rounds or "<i>No question yet.</i>"
        if reply is None:
            self.cache.value, self.cache_text.value = 0, f"cache: 0 of {self.cache.max} tokens"
            return
        self.cache.value = reply.prompt + len(reply.ids)
        self.cache_text.value = f"cache: {self.cache.value} of {self.cache.max} tokens"
        parts = [
            WHERE[self.backend.value],
            f"first token after {1000 * reply.to_first:.0f} ms",
            f"{len(reply.ids)} tokens, {reply.tokens_per_second:.0f} tokens/s",
        ]
        if reply.dropped:
            parts.append(f"{reply.dropped} oldest rounds dropped")
        endings = {"": "…", "eop": "done", "length": "cut at the limit", "stopped": "stopped"}
        self._say(" · ".join([*parts, endings[reply.ended]]))

    def forget(self) -> None:
        """Begin a new conversation; a running answer is stopped first."""
        self.cancel()
        self.wait()
        if self._talk:
            self._talk.history = []
        self._rounds = []
        self._greet()


def _whole(text: str) -> str:
    """Without the marks of a character whose last bytes have not come yet."""
    return text.rstrip("\ufffd")


def _classed(widget: Any, name: str) -> Any:
    widget.add_class(name)
    return widget


def _slider(kind: Any, value: float, low: float, high: float, step: float, name: str) -> Any:
    slider = kind(
        value=value, min=low, max=high, step=step, description=name, continuous_update=False,
        style={"description_width": "90px"}, layout=widgets.Layout(width="400px"),
    )  # fmt: skip
    return _classed(slider, f"glmtrt-{name}")
