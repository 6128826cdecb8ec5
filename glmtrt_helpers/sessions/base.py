"""`Session`, the interface of every backend that runs `forward`: PyTorch, ONNX Runtime, TensorRT.

`run` is one call of forward: flat named inputs (`names.input_names`) in, flat named outputs out, everything as NumPy
arrays on the host; comparisons use it. `step` is what a chat uses: the session keeps the cache, each call adds to it,
and only the scores of the next token come back.

A session belongs to one thread at a time, and its cache to one conversation at a time: every public method, of the
subclasses too, refuses to run beside another one or after `close`.
"""

from __future__ import annotations

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.names import past_from

UNBOUNDED = 2**31


@dataclass(frozen=True)
class Limits:
    """The largest shapes that a session takes: rows, tokens of a prompt, prompt and answer together."""

    batch: int = UNBOUNDED
    prompt: int = UNBOUNDED
    total: int = UNBOUNDED


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a session that runs within `Session.alone`."""
    name = method.__name__

    @functools.wraps(method)
    def guarded(self: Session, *args: Any, **kwargs: Any) -> Any:
        if name == "close" and self._closed:
            return None
        with self.alone():
            self.changes += name in ("step", "reset")
            result = method(self, *args, **kwargs)
            self._closed = name == "close"
            return result

    return guarded


class Session(ABC):
    """A backend that runs forward. dtype: that of the past, the presents and the logits.

    arithmetic: "tf32" where fp32 matmuls round their inputs, None where dtype says all. last_only: `run` returns the
    logits of the last position only. changes: grows when the cache changes.
    """

    backend: str
    dtype: np.dtype
    arithmetic: str | None = None
    last_only = False
    limits = Limits()
    changes: int
    _cache: dict[str, np.ndarray] | None = None
    _lock: threading.RLock
    _closed: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Session:
        session = super().__new__(cls)
        session.changes, session._lock, session._closed = 0, threading.RLock(), False
        return session

    def __init_subclass__(cls) -> None:
        for name, member in list(vars(cls).items()):
            if isinstance(member, FunctionType) and not name.startswith("_"):
                setattr(cls, name, _alone(member))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other threads out. Raises WorkbookError where one is using the session, and after `close`."""
        if not self._lock.acquire(blocking=False):
            raise WorkbookError("another thread is using this session: wait for it, or open a session for each thread.")
        try:
            if self._closed:
                raise WorkbookError("this session was closed: open another one.")
            yield
        finally:
            self._lock.release()

    @abstractmethod
    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """One call of forward, past and presents included. flat: anything that NumPy reads as arrays."""

    @abstractmethod
    def empty_past(self, batch: int) -> dict[str, np.ndarray]:
        """The cache before the first token: 2 * num_layers arrays (0, batch, heads, d)."""

    @_alone
    def reset(self) -> None:
        """Forget the cache: the next `step` is a prefill."""
        self._cache = None

    @_alone
    def step(self, call: Mapping[str, np.ndarray]) -> np.ndarray:
        """Scores of the next token, (batch, vocabulary) float32; the presents become the past of the next step.

        call: input_ids, position_ids and attention_mask, as `positions_and_mask.prefill` and `decode` make them.
        """
        past = self.empty_past(len(call["input_ids"])) if self._cache is None else self._cache
        outputs = self.run({**call, **past})
        self._cache = past_from(outputs)
        return outputs["logits"][:, -1].astype(np.float32)

    @_alone
    def follow(self) -> Generator[np.ndarray] | None:
        """A device-side decode loop: the likeliest tokens (batch,), one step after another; None where there is none.

        The first tokens are those of the last `step`. Close it before the session is used otherwise.
        """
        return None

    @_alone
    def close(self) -> None:
        """Free what the session holds; it cannot be used afterwards, only closed again."""
        self.reset()
