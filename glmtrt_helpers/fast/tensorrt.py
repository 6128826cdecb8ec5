"""The fast engine on the GPU: weights that are held once, a cache that is written in place, steps without the host.

A step is `first`, then attention and `middle` for each layer, then `last`. For a single token attention is a kernel,
`attend.cu`, and the whole step is a CUDA graph, whose last act is to make what it chose the next step's input. The host
reads tokens while later steps run. Padding, which comes at the left of a prompt, is moved behind it: rows begin where
their memory does, in the cache, too, and nothing ever reads what is padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.engines import cuda
from glmtrt_helpers.engines.memory_prediction import EngineMemory
from glmtrt_helpers.engines.plan_info import check_plan
from glmtrt_helpers.engines.profiles import find_profile
from glmtrt_helpers.engines.runner import Engine, limits
from glmtrt_helpers.fast import kernels
from glmtrt_helpers.fast import session as fast_session
from glmtrt_helpers.fast.session import BIAS, PARTS, FastSession, part_path

AHEAD = 4  # steps that may run before the token of the first is read; so many are wasted where an answer ends


class FastTensorRTSession(FastSession):
    """The engines of `fast`, the weights, the cache and the CUDA graphs. measured: bytes taken on the GPU."""

    backend = "tensorrt"

    @classmethod
    def open(cls, checkpoint: Checkpoint, dtype: str = "fp16") -> FastTensorRTSession:
        """The fast engine of a working copy, once it is clear that it may be used here."""
        return cls(checkpoint, dtype)

    def __init__(self, checkpoint: Checkpoint, dtype: str):
        self._closers: list[Callable[[], None]] = []
        plans = {part: check_plan(checkpoint, part_path(checkpoint, dtype, part, "plan")) for part in PARTS}
        super().__init__(checkpoint, np.dtype(np.float16 if dtype == "fp16" else np.float32))
        self.info = plans["middle"][1]
        self.arithmetic = "tf32" if dtype == "fp32" and self.info.tf32 else None
        self.limits = limits(self.info)
        capability = tensorrt_package.gpus()[0].capability
        self._graphs: dict[tuple[int, int], Any] = {}
        self._seen: set[tuple[int, int]] = set()
        self._last = (1, 1, 0)  # batch, tokens and past of the last step
        self._next = np.zeros((0, 2, 1), np.int64), np.zeros(0, np.int64)  # positions and places of the one after
        self._context = np.zeros(0, np.int64)  # of the last prompt, as `read_mask` gives it
        try:
            cuda.free_device_memory()  # the first call makes the context that the kernels are loaded into
            self._kernels = kernels.Kernels(capability, checkpoint.num_heads, checkpoint.head_size, self.dtype)
            self._closers.append(self._kernels.unload)
            self._engines: dict[str, Engine] = {}
            for part, found in plans.items():
                shared = self._engines["first"].stream if self._engines else None
                self._engines[part] = Engine(*found, eager=True, stream=shared)
                self._closers.append(self._engines[part].close)
            self.stream = self._engines["first"].stream
            self._hold_weights()
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _hold(self, sizes: Mapping[str, int], what: str) -> tuple[cuda.DeviceMemory, dict[str, cuda.Buffer]]:
        """One piece of memory, divided, that is given back when the session is closed."""
        memory = cuda.DeviceMemory(sum(map(cuda.aligned, sizes.values())), what)
        self._closers.append(memory.free)
        return memory, memory.divide(sizes)

    def _hold_weights(self) -> None:
        """Copy every weight from its shard to the GPU."""
        inputs = [tensor for engine in self._engines.values() for tensor in engine.tensors]
        sources = fast_session.weight_sources(self.checkpoint, inputs, self.dtype)
        width, stored = self.dtype.itemsize, self.checkpoint.tensors
        sizes = {name: math.prod(stored[name].shape) * width for name in sources.values()}
        self._weights, places = self._hold(sizes, "the weights")
        for name, place in places.items():
            place.fill(np.ascontiguousarray(fast_session.read_weight(self.checkpoint, name, self.dtype)), self.stream)
        cuda.synchronize(self.stream)
        self._places = {name: places[source] for name, source in sources.items()}

    def _allocate(self) -> None:
        """The cache, and a place for every other tensor of a step."""
        before = cuda.free_device_memory()
        config, batch = self.checkpoint, self.limits.batch
        # Bytes of a token: of its keys in a layer, as of its stream; and of one head of these.
        self._token, self._head = (n * self.dtype.itemsize for n in (config.hidden_size, config.head_size))
        rows = batch * cuda.aligned_tokens(max(box.sequence.max for box in self.info.profiles), self._head)
        sizes = dict.fromkeys(("stream", "next_stream", "seen"), rows * self._token) | {"mixed": 3 * rows * self._token}
        sizes |= {"cos": rows * self._head, "sin": rows * self._head}
        sizes |= {"input_ids": rows * 8, "position_ids": rows * 16, "places": rows * 8}
        sizes |= dict.fromkeys(("last_stream", "last_seen"), batch * self._token)
        sizes["logits"] = batch * config.vocab_size * self.dtype.itemsize
        sizes["partial"] = kernels.partial_bytes(batch, config.num_heads, config.head_size)
        sizes["arrived"] = batch * config.num_heads * 4
        memory, self._buffers = self._hold(sizes, "the inputs, the logits and what is between")
        memory.clear()
        self._dims = fast_session.input_dims(config.config)
        self._room = cuda.aligned_tokens(self.limits.total, self._token)  # tokens
        cache = len(self._names) * batch * self._room * self._token
        self._slots, _ = self._hold({"cache": cache}, "the cache")
        taken = before - cuda.free_device_memory()
        engines = self._engines.values()
        weights = self._weights.nbytes + sum(engine.weights for engine in engines)
        self.measured = EngineMemory(weights, cache, taken - cache, sum(engine.activations for engine in engines))

    def _begin(self, batch: int, skip: np.ndarray) -> None:
        find_profile(self.info.profiles, batch, 1, 0)  # or there is no room for so many rows
        self._past, self._batch, self._skip = 0, batch, skip

    @property
    def profile(self) -> str:
        """Name of the profile that the last step ran in."""
        return self.info.profiles[find_profile(self.info.profiles, *self._last)].name

    def pretend(self, batch: int, past: int) -> None:
        """Take what lies in the cache for so many tokens of so many rows: for measuring."""
        self._begin(batch, np.zeros(batch, np.int64))
        self._past = past
        self._fill(position_ids=np.zeros((batch, 2, 1)), places=np.full(batch, past))

    def _place(self, number: int, row: int = 0) -> int:
        """Where the keys or values of a layer lie, (batch, room, heads, d), and those of a row."""
        return self._slots.address + (number * self._batch + row) * self._room * self._token

    def _write(self, rows: list[np.ndarray]) -> None:
        for number, array in enumerate(rows):
            for row, skip in enumerate(self._skip):
                given = np.ascontiguousarray(array[row, skip:], self.dtype)
                cuda.Buffer(self._place(number, row), given.nbytes).fill(given, self.stream)
        cuda.synchronize(self.stream)

    def _read(self) -> list[np.ndarray]:
        shape = (self._batch, self._past, self.checkpoint.num_heads, self.checkpoint.head_size)
        arrays = [np.zeros(shape, self.dtype) for _ in self._names]
        for number, array in enumerate(arrays):
            for row, skip in enumerate(self._skip):
                tokens = array[row, skip:].reshape(1, -1)
                cuda.read_rows(tokens, self._place(number, row), tokens.nbytes, self.stream)
        return arrays

    def _execute(self, call: Mapping[str, np.ndarray], length: int) -> np.ndarray:
        self.enqueue(call, length)
        return self._read_output("logits", (self._batch, self.checkpoint.vocab_size))

    def enqueue(self, call: Mapping[str, np.ndarray], length: int) -> None:
        """Send the inputs of a step of `length` tokens and run it, its rows put into the cache; waits for nothing."""
        find_profile(self.info.profiles, len(call["input_ids"]), length, self._past)
        self._context = self._look(call)
        ends = self._past + length - self._skip
        self._next = call["position_ids"][:, :, -1:] + np.array([[0], [1]]), ends
        if length == 1 and self._past:
            self._fill(input_ids=call["input_ids"], position_ids=call["position_ids"], places=ends - 1)
            self.decode()
            return
        # Rows begin with what is no padding, and where an engine can read them.
        shift = np.zeros_like(self._skip) if self._past else self._skip
        size = length if self._batch == 1 else cuda.aligned_tokens(length, self._head)
        places = (self._past + shift - self._skip)[:, None] + np.arange(size)
        self._fill(**fast_session.shift_left(call, shift, size), places=places)
        self._last = self._batch, size, self._past
        self._select(size)
        self._step(size, self._attend_prompt, length - shift)
        self._past += length

    def _fill(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self._buffers[name].fill(np.ascontiguousarray(array, np.int64), self.stream)

    def _select(self, length: int) -> None:
        """The profile of such a step, in every engine that it takes."""
        for part in ("first", "middle", "last"):
            self._engines[part].select(self._batch, 1 if part == "last" else length, self._past)

    def _run(self, part: str, layer: int, batch: int, length: int, **elsewhere: int) -> None:
        """One engine over the buffers of its tensors' names. layer: which it enters. elsewhere: addresses instead."""
        engine = self._engines[part]
        weights = fast_session.weight_names(engine.tensors, layer)
        sizes: dict[int | str, int] = {"batch": batch, "sequence": length}
        for name, tensor in engine.tensors.items():
            if name in weights:
                engine.bind(name, self._places[weights[name]].address, tensor.shape)
            else:
                shape = [int(sizes.get(dim, dim)) for dim in self._dims[name]] if tensor.mode == "input" else None
                engine.bind(name, elsewhere.get(name) or self._buffers[name].address, shape)
        engine.enqueue()

    def _step(self, length: int, attend: Callable[..., None], counts: np.ndarray | None = None) -> None:
        """All engines of a step, one behind the other. counts (batch,): tokens of each row of a prompt."""
        count, batch = self.checkpoint.num_layers, self._batch
        now, then = (self._buffers[name].address for name in ("stream", "next_stream"))
        self._run("first", 0, batch, length)
        for layer in range(count):
            attend(layer, length, counts)
            if layer + 1 < count:
                self._run("middle", layer + 1, batch, length, stream=now, next_stream=then)
                now, then = then, now
        seen = self._buffers["seen"].address
        if counts is not None:
            now, seen = (self._last_of(*each, length, counts) for each in ((now, "last_stream"), (seen, "last_seen")))
        # The ids were read when the step began: their place may take the next ones.
        self._run("last", count, batch, 1, stream=now, seen=seen, next_token=self._buffers["input_ids"].address)

    def _last_of(self, source: int, name: str, length: int, counts: np.ndarray) -> int:
        """Put the last token of each row together, and say where."""
        target, width = self._buffers[name].address, self._token
        for row, count in enumerate(counts):
            at = source + (row * length + int(count) - 1) * width
            cuda.copy_rows(target + row * width, width, at, width, width, 1, self.stream)
        return target

    def _attend_prompt(self, layer: int, length: int, counts: np.ndarray) -> None:
        """Tokens that see one another by the engine, a row at a time; each of the others for itself."""
        for row, count in enumerate(counts):
            context = 0 if self._past else int(self._context[row] - self._skip[row])
            if context:
                cache = {name: self._place(2 * layer + n, row) for n, name in enumerate(("key", "value"))}
                self._engines["attention"].select(1, context, 0)
                self._run("attention", layer, 1, context, **self._at(row * length), **cache)
            for token in range(context, int(count)):
                self._attend(layer, row * length + token, 1, row)

    def _at(self, token: int) -> dict[str, int]:
        """Where what belongs to a token begins, in the buffers that attention reads and writes."""
        sizes = {"mixed": 3 * self._token, "seen": self._token, "cos": self._head, "sin": self._head}
        return {name: self._buffers[name].address + token * size for name, size in sizes.items()}

    def _attend(self, layer: int, token: int, batch: int, row: int = 0) -> None:
        """The kernel, for so many rows from one on, whose new tokens begin at `token` of the buffers."""
        at, address = self._at(token), {name: buffer.address for name, buffer in self._buffers.items()}
        addresses = [at["mixed"], self._places[BIAS.format(layer)].address, at["cos"], at["sin"]]
        addresses += [self._place(2 * layer, row), self._place(2 * layer + 1, row), at["seen"]]
        addresses += [address["places"] + 8 * token, address["partial"], address["arrived"]]
        tokens = self._last[2] + self._last[1]
        self._kernels.attend(addresses, batch, self._room, tokens, self.stream)

    def decode(self) -> None:
        """One step of one token, whose inputs lie in their place. The first with these shapes runs as it is, for what
        TensorRT prepares then is not to be captured; the second is captured, and from then on its graph runs.
        """
        key = self._batch, math.prod(kernels.blocks_of(self._past + 1, self._batch * self.checkpoint.num_heads))
        self._last = self._batch, 1, self._past
        if key not in self._graphs:
            self._select(1)
            if key in self._seen:
                self._graphs[key] = cuda.capture(self._step_of_one, self.stream)
        if key in self._graphs:
            cuda.launch(self._graphs[key], self.stream)
        else:
            self._seen.add(key)
            self._step_of_one()
        self._past += 1

    def _step_of_one(self) -> None:
        self._step(1, lambda layer, *_: self._attend(layer, 0, self._batch))
        positions, places = (self._buffers[name].address for name in ("position_ids", "places"))
        self._kernels.advance(positions, places, self._batch, self.stream)

    def _read_output(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        array = np.empty(shape, self._engines["last"].tensors[name].dtype)
        cuda.read_rows(array.reshape(1, -1), self._buffers[name].address, array.nbytes, self.stream)
        return array

    def follow(self) -> Generator[np.ndarray]:
        """The best token of the last call, (batch,), then that of the step it is fed to, and so on, as they come.

        Nothing passes through the host: up to AHEAD steps run while the token of the first is read. Ends where the
        cache is full. Steps that nobody waited for stay in the cache; reset before another prompt.
        """
        tokens = cuda.Pinned((AHEAD + 1, self._batch), "int64")
        events = [cuda.new_event() for _ in range(AHEAD + 1)]
        asked = given = 0
        try:
            positions, places = self._next
            self._fill(position_ids=positions, places=places)
            while True:
                while asked <= given + AHEAD and (asked == 0 or self._past < self.limits.total):
                    if asked:
                        self.decode()
                    tokens.receive(asked % (AHEAD + 1), self._buffers["input_ids"], self.stream)
                    cuda.mark(events[asked % (AHEAD + 1)], self.stream)
                    asked += 1
                if given == asked:
                    return
                cuda.wait(events[given % (AHEAD + 1)])
                token = tokens.array[given % (AHEAD + 1)].copy()
                given += 1
                yield token
        finally:
            cuda.synchronize(self.stream)
            for event in events:
                cuda.destroy_event(event)
            tokens.free()

    def close(self) -> None:
        """Free everything on the GPU."""
        for graph in self._graphs.values():
            cuda.destroy_graph(graph)
        self._graphs.clear()
        while self._closers:
            self._closers.pop()()
