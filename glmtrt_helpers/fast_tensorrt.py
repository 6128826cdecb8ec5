"""The fast engine on the GPU: weights that are held once, a cache that is written in place, steps without the host.

A step is `first`, then attention and `middle` for each layer, then `last`. For a single token attention is a kernel,
`attend.cu`, and the whole step is a CUDA graph, whose last act is to make what it chose the next step's input. The host
reads tokens while later steps run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np

from glmtrt_helpers import cuda, kernels, packages
from glmtrt_helpers.checkpoints import Checkpoint, shares_vocabulary
from glmtrt_helpers.fast_session import PARTS, FastSession, part_path, read_weight, split_mask, weight_names
from glmtrt_helpers.loaded import Engine, check_plan, limits
from glmtrt_helpers.profiles import Memory, find_profile

AHEAD = 4  # steps that may run before the token of the first is read; so many are wasted where an answer ends
VOCABULARY = ("transformer.word_embeddings.weight", "lm_head.weight")


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
        capability = packages.gpus()[0].capability
        self._graphs: dict[tuple[int, int], Any] = {}
        self._seen: set[tuple[int, int]] = set()
        self._last = (1, 1, 0)  # batch, tokens and past of the last step
        self._next = np.zeros((0, 2, 1), np.int64), np.zeros((0, 2), np.int64)  # positions, visible of the one after
        try:
            cuda.free_memory()  # the first call makes the context that the kernels are loaded into
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

    def _hold(self, sizes: Mapping[str, int], what: str) -> tuple[cuda.Memory, dict[str, cuda.Buffer]]:
        """One piece of memory, divided, that is given back when the session is closed."""
        memory = cuda.Memory(sum(map(cuda.aligned, sizes.values())), what)
        self._closers.append(memory.free)
        return memory, memory.divide(sizes)

    def _hold_weights(self) -> None:
        """Copy every weight from its shard to the GPU, a vocabulary matrix that is stored twice once."""
        tensors = [tensor for engine in self._engines.values() for tensor in engine.tensors]
        wanted = [name for layer in range(self.checkpoint.num_layers + 1)
                  for name in weight_names(tensors, layer).values() if name in self.checkpoint.tensors]  # fmt: skip
        wanted = list(dict.fromkeys(wanted))
        if shares_vocabulary(self.checkpoint):
            first, second = (read_weight(self.checkpoint, name, self.dtype) for name in VOCABULARY)
            if np.array_equal(first, second):  # the samples agree, and so does all the rest
                wanted.remove(VOCABULARY[1])
        sizes = {name: math.prod(self.checkpoint.tensors[name].shape) * self.dtype.itemsize for name in wanted}
        self._weights, self._places = self._hold(sizes, "the weights")
        for name, place in self._places.items():
            place.fill(np.ascontiguousarray(read_weight(self.checkpoint, name, self.dtype)), self.stream)
        cuda.synchronize(self.stream)
        self._places.setdefault(VOCABULARY[1], self._places[VOCABULARY[0]])

    def _allocate(self) -> None:
        """The cache, and a place for every other tensor of a step."""
        before = cuda.free_memory()
        config, batch = self.checkpoint, self.limits.batch
        longest = max(box.sequence.max for box in self.info.profiles)
        rows, width = batch * longest, self.dtype.itemsize
        wide = rows * config.hidden_size * width
        sizes = {name: wide for name in ("stream", "next_stream", "seen", "query", "key", "value")}
        sizes |= {name: rows * config.head_size * width for name in ("cos", "sin")}
        sizes |= {"input_ids": rows * 8, "position_ids": rows * 16, "attention_mask": rows * longest}
        sizes["logits"] = batch * config.vocab_size * width
        partial = kernels.partial_bytes(batch, config.num_heads, config.head_size)
        sizes |= {"visible": batch * 16, "partial": partial, "arrived": batch * config.num_heads * 4}
        memory, self._buffers = self._hold(sizes, "the inputs, the logits and what is between")
        memory.clear()
        self._row = config.head_size * width  # bytes of a token in one head
        self._room = self.limits.total  # tokens
        cache = len(self._names) * batch * config.num_heads * self._room * self._row
        self._slots, _ = self._hold({"cache": cache}, "the cache")
        taken = before - cuda.free_memory()
        engines = self._engines.values()
        weights = self._weights.nbytes + sum(engine.weights for engine in engines)
        self.measured = Memory(weights, cache, taken - cache, sum(engine.activations for engine in engines))

    def _begin(self, batch: int) -> None:
        find_profile(self.info.profiles, batch, 1, 0)  # or there is no room for so many rows
        self._past, self._batch = 0, batch

    @property
    def profile(self) -> str:
        """Name of the profile that the last step ran in."""
        return self.info.profiles[find_profile(self.info.profiles, *self._last)].name

    def pretend(self, batch: int, past: int) -> None:
        """Take what lies in the cache for so many tokens of so many rows: for measuring."""
        self._begin(batch)
        self._past = past
        self._fill(position_ids=np.zeros((batch, 2, 1)), visible=np.array([[0, past]] * batch))

    def _place(self, number: int) -> int:
        """Where the keys or values of a layer lie, (batch, heads, room, d)."""
        return self._slots.address + number * self._batch * self.checkpoint.num_heads * self._room * self._row

    def _write(self, rows: list[np.ndarray]) -> None:
        heads = self._batch * self.checkpoint.num_heads
        for number, array in enumerate(rows):
            given = np.ascontiguousarray(array, self.dtype)
            width = given.shape[2] * self._row
            target, pitch = self._place(number), self._room * self._row
            cuda.copy_rows(target, pitch, given.ctypes.data, width, width, heads, self.stream, cuda.TO_DEVICE)
        cuda.synchronize(self.stream)

    def _read(self) -> list[np.ndarray]:
        shape = (self._batch, self.checkpoint.num_heads, self._past, self.checkpoint.head_size)
        arrays = [np.empty(shape, self.dtype) for _ in self._names]
        for number, array in enumerate(arrays):
            heads = array.reshape(shape[0] * shape[1], -1)
            cuda.read_rows(heads, self._place(number), self._room * self._row, self.stream)
        return arrays

    def _execute(self, call: Mapping[str, np.ndarray], length: int) -> np.ndarray:
        self.enqueue(call, length)
        return self._read_output("logits", (self._batch, self.checkpoint.vocab_size))

    def enqueue(self, call: Mapping[str, np.ndarray], length: int) -> None:
        """Send the inputs of a step of `length` tokens and run it, its rows put into the cache; waits for nothing."""
        find_profile(self.info.profiles, self._batch, length, self._past)
        among_new, visible = split_mask(call, self._past)
        positions = call["position_ids"][:, :, -1:] + np.array([[0], [1]])
        self._next = positions, visible + np.array([0, length])
        self._fill(input_ids=call["input_ids"], position_ids=call["position_ids"], visible=visible)
        if length == 1 and self._past:
            self.decode()
            return
        self._fill(attention_mask=among_new)
        self._last = self._batch, length, self._past
        self._select(length)
        self._step(length, self._attend_prompt)
        self._past += length

    def _fill(self, **arrays: np.ndarray) -> None:
        kinds = {"attention_mask": np.bool_}
        for name, array in arrays.items():
            self._buffers[name].fill(np.ascontiguousarray(array, kinds.get(name, np.int64)), self.stream)

    def _select(self, length: int) -> None:
        """The profile of such a step, in every engine that it takes."""
        for part, engine in self._engines.items():
            if part != "attention" or not self._past:
                engine.select(self._batch, length, self._past)

    def _run(self, part: str, layer: int, length: int, **renamed: str) -> None:
        """One engine over the buffers of its tensors' names. layer: which it enters; renamed: another buffer's name."""
        engine = self._engines[part]
        weights = weight_names(engine.tensors, layer)
        sizes = {"batch": self._batch, "sequence": length}
        for name, tensor in engine.tensors.items():
            if name in weights:
                engine.bind(name, self._places[weights[name]].address, tensor.shape)
            else:
                shape = _SHAPES[name](sizes, self.checkpoint) if tensor.mode == "input" else None
                engine.bind(name, self._buffers[renamed.get(name, name)].address, shape)
        engine.enqueue()

    def _step(self, length: int, attend: Callable[[int, int], None]) -> None:
        """All engines of a step, one behind the other."""
        last = self.checkpoint.num_layers
        streams = ("stream", "next_stream")
        self._run("first", 0, length)
        for layer in range(last):
            attend(layer, length)
            if layer + 1 < last:
                now, then = streams[layer % 2], streams[(layer + 1) % 2]
                self._run("middle", layer + 1, length, stream=now, next_stream=then)
        # The ids were read when the step began: their place may take the next ones.
        self._run("last", last, length, stream=streams[(last - 1) % 2], next_token="input_ids")

    def _attend_prompt(self, layer: int, length: int) -> None:
        self._run("attention", 0, length)
        heads, width = self._batch * self.checkpoint.num_heads, length * self._row
        for number, name in enumerate(("key", "value"), 2 * layer):
            pitch = self._room * self._row
            cuda.copy_rows(self._place(number), pitch, self._buffers[name].address, width, width, heads, self.stream)

    def _attend_token(self, layer: int, length: int) -> None:
        address = {name: buffer.address for name, buffer in self._buffers.items()}
        places = [address[name] for name in ("query", "key", "value")]
        places += [self._place(2 * layer), self._place(2 * layer + 1)]
        places += [address[name] for name in ("seen", "visible", "partial", "arrived")]
        self._kernels.attend(places, self._batch, self._room, self._past + 1, self.stream)

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
        self._step(1, self._attend_token)
        positions, visible = (self._buffers[name].address for name in ("position_ids", "visible"))
        self._kernels.advance(positions, visible, self._batch, self.stream)

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
            positions, visible = self._next
            self._fill(position_ids=positions, visible=visible)
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


def _wide(sizes: Mapping[str, int], checkpoint: Checkpoint) -> tuple[int, ...]:
    return sizes["batch"], sizes["sequence"], checkpoint.hidden_size


def _angles(sizes: Mapping[str, int], checkpoint: Checkpoint) -> tuple[int, ...]:
    return sizes["batch"], sizes["sequence"], checkpoint.head_size


def _heads(sizes: Mapping[str, int], checkpoint: Checkpoint) -> tuple[int, ...]:
    return sizes["batch"], checkpoint.num_heads, sizes["sequence"], checkpoint.head_size


_SHAPES: dict[str, Callable[[Mapping[str, int], Checkpoint], tuple[int, ...]]] = {
    "input_ids": lambda sizes, _: (sizes["batch"], sizes["sequence"]),
    "position_ids": lambda sizes, _: (sizes["batch"], 2, sizes["sequence"]),
    "attention_mask": lambda sizes, _: (sizes["batch"], 1, sizes["sequence"], sizes["sequence"]),
    **dict.fromkeys(("stream", "seen"), _wide),
    **dict.fromkeys(("cos", "sin"), _angles),
    **dict.fromkeys(("query", "key", "value"), _heads),
}
