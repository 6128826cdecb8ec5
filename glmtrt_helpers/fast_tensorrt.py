"""The fast engine on the GPU: a cache that stays where it is, and steps that follow each other without the host.

All keys and values lie in one piece of memory, tensor behind tensor, and so do the new rows that a step hands out: one
strided copy puts the rows of all layers into their chunk. A decode step is a CUDA graph, one for each number of chunks:
the engine, and the copies that make its choices the next step's inputs. The host reads tokens while later steps run.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glmtrt_helpers import cuda, packages
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.fast_session import STEP_INPUTS, FastSession, chunks_of, pieces, split_mask
from glmtrt_helpers.loaded import Engine, check_plan, limits
from glmtrt_helpers.plans import PlanInfo
from glmtrt_helpers.profiles import CHUNK, Memory, find_profile

# What comes out of a step and goes into the next one.
FED = {"next_token": "input_ids", "next_position_ids": "position_ids", "next_visible": "visible"}
SLACK = 2**20  # some kernels read beyond the end of what they were given
AHEAD = 4  # steps that may run before the token of the first is read; so many are wasted where an answer ends


class FastTensorRTSession(FastSession):
    """An engine of `fast`, its cache and its CUDA graphs. measured: bytes taken on the GPU."""

    backend = "tensorrt"

    @classmethod
    def open(cls, checkpoint: Checkpoint, dtype: str = "fp16") -> FastTensorRTSession:
        """The fast engine of a working copy, once it is clear that it may be used here."""
        return cls(checkpoint, *check_plan(checkpoint, checkpoint.directory / f"model.{dtype}.fast.plan"))

    def __init__(self, checkpoint: Checkpoint, plan: Path, info: PlanInfo, package: packages.Package):
        self._engine = Engine(plan, info, package, eager=True)
        self.stream = self._engine.stream
        super().__init__(checkpoint, np.dtype(self._engine.tensors["logits"].dtype))
        self.info = info
        self.arithmetic = "tf32" if info.dtype == "fp32" and info.tf32 else None
        self.limits = limits(info)
        self._row = checkpoint.head_size * self.dtype.itemsize  # bytes of a token in one head
        self._graphs: dict[tuple[int, int], Any] = {}
        self._seen: set[tuple[int, int]] = set()
        self._last = (1, 1, 0)  # batch, tokens and past of the last step
        ready = cuda.free_memory()
        cache = self._allocate()
        self.measured = Memory(
            self._engine.weights, cache, ready - cuda.free_memory() - cache, self._engine.activations
        )

    def _allocate(self) -> int:
        """The cache, the new rows, and a place for every other tensor of a step; returns the bytes of the cache."""
        tensors, info = self._engine.tensors, self.info
        batch = self.limits.batch
        sizes = {}
        for name in STEP_INPUTS:
            largest = max(math.prod(shapes[-1]) for shapes in tensors[name].profiles)
            sizes[name] = int(largest) * self._engine.width(name)
        for name in ("candidate_ids", "candidate_scores", "logits", *FED):
            sizes[name] = batch * math.prod(size for size in tensors[name].shape if size > 0) * self._engine.width(name)
        longest = max(box.sequence.max for box in info.profiles)
        step = cuda.ALIGNMENT // math.gcd(self._row, cuda.ALIGNMENT)  # at most so many rows to an aligned address
        rows = -(-batch * self.checkpoint.num_heads // step) * step
        sizes["new"] = len(self._names) * rows * longest * self._row
        self._memory = cuda.Memory(sum(map(cuda.aligned, sizes.values())), "the new rows, the inputs and the logits")
        self._buffers = self._memory.divide(sizes)
        chunks = chunks_of(max(box.past.max for box in info.profiles) + 1)
        self._tensor_rows = chunks * batch * self.checkpoint.num_heads  # of CHUNK tokens each
        self._tensor_bytes = self._tensor_rows * CHUNK * self._row
        self._slots = cuda.Memory(len(self._names) * self._tensor_bytes + SLACK, "the cache")
        self._slots.clear()  # a hidden row is multiplied by zero, so it must be finite
        return self._slots.nbytes

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

    def _source(self, length: int) -> cuda.Block:
        """New rows of `length` tokens, of the first tensor; the next tensor follows where its address is aligned."""
        pitch = length * self._row
        step = cuda.ALIGNMENT // math.gcd(pitch, cuda.ALIGNMENT)
        rows = -(-self._batch * self.checkpoint.num_heads // step) * step
        return cuda.Block(self._buffers["new"].address, pitch, rows)

    def _new_address(self, number: int, length: int) -> int:
        source = self._source(length)
        return source.address + number * source.rows * source.pitch

    def _put(self, length: int) -> None:
        """Copy the new rows of all tensors behind those in the cache: one copy for each chunk that they touch."""
        heads, source = self._batch * self.checkpoint.num_heads, self._source(length)
        for chunk, there, here in pieces(self._past, length):
            first = self._slots.address + (chunk * heads * CHUNK + there.start) * self._row
            cuda.copy_block(
                cuda.Block(first, CHUNK * self._row, self._tensor_rows),
                cuda.Block(source.address + here.start * self._row, source.pitch, source.rows),
                (here.stop - here.start) * self._row,
                heads,
                len(self._names),
                self.stream,
            )
        self._past += length

    def _place(self, rows: Mapping[str, np.ndarray], length: int) -> None:
        """Rows from the host, in pieces that the place of the new ones holds."""
        longest = max(box.sequence.max for box in self.info.profiles)
        for start in range(0, length, longest):
            count = min(longest, length - start)
            for number, name in enumerate(self._names):
                piece = np.ascontiguousarray(rows[name][:, :, start : start + count])
                cuda.Buffer(self._new_address(number, count), piece.nbytes).fill(piece, self.stream)
            self._put(count)

    def _bind(self, length: int) -> None:
        """Shapes and addresses of a step of `length` tokens on the cache as it is."""
        batch, chunks = self._batch, chunks_of(self._past)
        shapes = {"input_ids": (batch, length), "position_ids": (batch, 2, length),
                  "attention_mask": (batch, 1, length, length), "visible": (batch, 2)}  # fmt: skip
        self._engine.select(batch, length, self._past)
        for name, shape in shapes.items():
            self._engine.bind(name, self._buffers[name].address, shape)
        for name in ("candidate_ids", "candidate_scores", "logits", *FED):
            self._engine.bind(name, self._buffers[name].address)
        shape = (chunks, batch, self.checkpoint.num_heads, CHUNK, self.checkpoint.head_size)
        for number, name in enumerate(self._names):
            self._engine.bind(f"cache.{name}", self._slots.address + number * self._tensor_bytes, shape)
            self._engine.bind(f"new.{name}", self._new_address(number, length))

    def _execute(self, call: Mapping[str, np.ndarray], length: int) -> np.ndarray:
        self.enqueue(call, length)
        return self._read("logits", (self._batch, self.checkpoint.vocab_size))

    def enqueue(self, call: Mapping[str, np.ndarray], length: int) -> None:
        """Send the inputs of a step of `length` tokens, run it, put its rows into the cache; waits for nothing."""
        among_new, visible = split_mask(call, self._past)
        self._bind(length)
        for name, array in {**call, "attention_mask": among_new, "visible": visible}.items():
            if name in STEP_INPUTS:
                dtype = self._engine.tensors[name].dtype
                self._buffers[name].fill(np.ascontiguousarray(array, dtype), self.stream)
        self._last = self._batch, length, self._past
        self._engine.enqueue()
        self._put(length)

    def _read(self, name: str, shape: tuple[int, ...], address: int | None = None) -> np.ndarray:
        array = np.empty(shape, self.dtype if name == "new" else self._engine.tensors[name].dtype)
        cuda.read_rows(array.reshape(1, -1), address or self._buffers[name].address, array.nbytes, self.stream)
        return array

    def _new_rows(self, length: int) -> dict[str, np.ndarray]:
        shape = (self._batch, self.checkpoint.num_heads, length, self.checkpoint.head_size)
        return {name: self._read("new", shape, self._new_address(n, length)) for n, name in enumerate(self._names)}

    def follow(self) -> Generator[np.ndarray]:
        """The best token of the last call, (batch,), then that of the step it is fed to, and so on, as they come.

        Nothing passes through the host: up to AHEAD steps run while the token of the first is read. Ends where the
        cache is full. Steps that nobody waited for stay in the cache; reset before another prompt.
        """
        tokens = cuda.Pinned((AHEAD + 1, self._batch), "int64")
        events = [cuda.new_event() for _ in range(AHEAD + 1)]
        asked = given = 0
        try:
            self._feed()
            self._clear_mask()
            while True:
                while asked <= given + AHEAD and (asked == 0 or self._past < self.limits.total):
                    if asked:
                        self.decode()
                    tokens.receive(asked % (AHEAD + 1), self._buffers["next_token"], self.stream)
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

    def _feed(self) -> None:
        """Make what came out of a step the inputs of the next one."""
        for source, target in FED.items():
            nbytes = {"next_token": 8, "next_position_ids": 16, "next_visible": 16}[source] * self._batch
            cuda.copy(self._buffers[target], self._buffers[source], nbytes, self.stream)

    def _clear_mask(self) -> None:
        """A single new token sees itself."""
        self._buffers["attention_mask"].fill(np.zeros(self._batch, np.bool_), self.stream)

    def decode(self) -> None:
        """One step of one token, whose inputs lie in their place. The first with these shapes runs as it is, for what
        TensorRT prepares then is not to be captured; the second is captured, and from then on its graph runs.
        """
        key = self._batch, chunks_of(self._past)
        self._last = self._batch, 1, self._past
        if key in self._graphs:
            cuda.launch(self._graphs[key], self.stream)
        elif key in self._seen:
            self._bind(1)
            self._graphs[key] = cuda.capture(self._step_of_one, self.stream)
            cuda.launch(self._graphs[key], self.stream)
        else:
            self._seen.add(key)
            self._bind(1)
            self._step_of_one()
        self._put(1)

    def _step_of_one(self) -> None:
        self._engine.enqueue()
        self._feed()

    def close(self) -> None:
        """Free everything on the GPU."""
        for graph in self._graphs.values():
            cuda.destroy_graph(graph)
        self._graphs.clear()
        self._buffers.clear()
        self._memory.free()
        self._slots.free()
        self._engine.close()
