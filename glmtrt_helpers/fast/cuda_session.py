"""The one-kernel engine as a session: a checkpoint's shards on the GPU, no export, no engine file.

Up to 8 new tokens, of one chat or several, are one launch of `decoder.cu`. More of them, prompts above all, are matrix
products of cuBLASLt with the kernels of `prompt.cu` between; decode steps of more than 8 rows are a CUDA graph.
Padding, which comes at the left of a prompt, is left out: every row of the cache begins with what is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import cuda
from glmtrt_helpers.fast import memory_prediction, programs
from glmtrt_helpers.fast.masks import read_mask
from glmtrt_helpers.fast.memory_prediction import ROWS
from glmtrt_helpers.fast.products import Kind, Products, load_library
from glmtrt_helpers.fast.weights import EMBEDDING, HEAD, Weights, layer_weights, rotary_tables, weight_sizes
from glmtrt_helpers.sessions.base import Limits, Session

AHEAD = 4  # steps that may run before the token of the first is read; that number is wasted where an answer ends
ALPHA = math.sqrt(2 * 28)  # of the residual: upstream's own default, which does not follow the number of layers
FINAL = "transformer.final_layernorm"


class CudaSession(Session):
    """The weights, the cache and the programs on the GPU, in fp16 with sums in fp32.

    The cache has room for all positions of the checkpoint, in as many rows as a call had at most. Logits come out for
    the last position alone.
    bulk, shared: as for `programs.Card`.
    """

    backend = "cuda"
    last_only = True

    @classmethod
    def open(cls, checkpoint: Checkpoint, dtype: str = "fp16") -> CudaSession:
        """The session of a checkpoint. Raises WorkbookError where it cannot run, before anything is allocated."""
        cls.check(checkpoint, dtype)
        return cls(checkpoint)

    @staticmethod
    def check(checkpoint: Checkpoint, dtype: str = "fp16") -> programs.Sizes:
        """What the programs are compiled for. Raises WorkbookError where this checkpoint cannot run here in dtype.

        Nothing is allocated: a default backend is chosen by this.
        """
        if dtype != "fp16":
            raise WorkbookError(
                f"the one-kernel engine computes in fp16: leave --dtype {dtype} out, or take torch or ort."
            )
        if not tensorrt_package.gpus():
            raise WorkbookError("the one-kernel engine needs an NVIDIA GPU and its driver: take another backend.")
        sizes, gpu = programs.sizes_of(checkpoint), tensorrt_package.gpus()[0]
        if gpu.capability < programs.OLDEST:
            raise WorkbookError(
                f"the one-kernel engine needs a GPU of compute capability 8.0 or later, and the {gpu.name} has "
                f"{tensorrt_package.capability_text(gpu)}: take another backend."
            )
        if not checkpoint.is_safetensors:
            raise WorkbookError(
                f"the one-kernel engine reads safetensors, and {checkpoint.directory} has .bin files: make a working "
                "copy with `glmtrt copy`, and let `glmtrt export` convert it."
            )
        if checkpoint.packed:
            raise WorkbookError(
                f"the one-kernel engine reads weights of 16 bits, and those of {checkpoint.directory} are quantised: "
                "take another backend."
            )
        needed = memory_prediction.predict_memory(checkpoint).total
        if gpu.memory < needed:
            raise WorkbookError(
                f"the one-kernel engine takes {needed / 1e9:.1f} GB for one chat, and the {gpu.name} has "
                f"{gpu.memory / 1e9:.1f}: take another backend."
            )
        load_library()
        return sizes

    def __init__(self, checkpoint: Checkpoint, bulk: bool | None = None, shared: int | None = None):
        sizes = self.check(checkpoint)
        self.checkpoint, self.dtype = checkpoint, np.dtype(np.float16)
        self._names = [f"{layer}.{part}" for layer in range(checkpoint.num_layers) for part in ("key", "value")]
        self._past, self._batch, self._skip = 0, 0, np.zeros(0, np.int64)
        self.sizes, self._room, self._epoch = sizes, checkpoint.max_length, 0
        self.limits = Limits(total=self._room)
        self._blank = load_tokenizer(checkpoint).blank_id
        self._capacity, self._slots, self._next = (0, 0), 0, np.zeros(0, programs.ROW)
        self._graphs: dict[int, Any] = {}
        self._closers: list[Callable[[], None]] = []
        self._cache: Any = None
        self._large: Any = None
        self._products: Products | None = None
        try:
            free = cuda.free_device_memory()  # the first call makes the context that the kernels are loaded into
            sizes_of_weights = weight_sizes(checkpoint)
            needed = sum(map(cuda.aligned, sizes_of_weights.values())) + memory_prediction.cache_bytes(checkpoint, 1)
            if free < needed:
                raise WorkbookError(
                    f"the weights and the cache of one row take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the "
                    "GPU are free: close other programs on it."
                )
            self.card = programs.Card(sizes, bulk, shared)
            self._closers.append(self.card.unload)
            self.stream = cuda.new_stream()
            self._closers.append(lambda: cuda.destroy_stream(self.stream))
            self._weights = Weights(checkpoint, sizes_of_weights)
            self._closers.append(self._weights.free)
            self._hold_small()
        except BaseException:
            self.close()
            raise

    def _hold(self, sizes: Mapping[str, int], what: str) -> tuple[cuda.DeviceMemory, dict[str, cuda.Buffer]]:
        memory = cuda.DeviceMemory(sum(map(cuda.aligned, sizes.values())), what)
        memory.clear()
        return memory, memory.divide(sizes)

    def _hold_small(self) -> None:
        """The tables, and what a step of decoder.cu reads and writes."""
        place, layers, rows = self._weights.places, self.checkpoint.num_layers, ROWS
        table = np.array([[place[layer_weights(n)[name]] for name in programs.LAYER] for n in range(layers)], np.uint64)
        cos, sin = rotary_tables(self.checkpoint.max_length, self.sizes.head)
        hidden, pieces = 4 * self.sizes.hidden, self.sizes.heads * programs.PIECES * (self.sizes.head + 4)
        sizes = {"layers": table.nbytes, "cos": cos.nbytes, "sin": sin.nbytes, "rows": rows * programs.ROW.itemsize}
        sizes |= {"tokens": 4 * rows, **dict.fromkeys(("hidden", "middle", "query"), rows * hidden)}
        sizes |= {
            "pieces": 4 * rows * pieces,
            "inner": 2 * rows * self.sizes.inner,
            "best": 12 * rows * self.card.blocks,
        }
        sizes |= {"logits": 4 * rows * self.checkpoint.vocab_size, "arrived": 4}
        memory, self._small = self._hold(sizes, "what a step reads and writes")
        self._closers.append(memory.free)
        for name, array in (("layers", table), ("cos", cos), ("sin", sin)):
            self._small[name].fill(array, self.stream)

    def _hold_large(self, tokens: int, rows: int) -> dict[str, cuda.Buffer]:
        """What a prompt reads and writes. tokens: of all its rows together."""
        if self._products is None:
            self._products = Products()
            self._closers.append(self._products.close)
        if self._large is None or tokens > self._capacity[0] or rows > self._capacity[1]:
            self._forget_large()
            tokens, rows = max(tokens, self._capacity[0]), max(rows, self._capacity[1])
            width = 2 * self.sizes.hidden
            sizes = {
                "hidden": tokens * 2 * width,
                "x": tokens * width,
                "query": tokens * width,
                "qkv": tokens * 3 * width,
            }
            sizes |= {"inner": tokens * 2 * self.sizes.inner, "rows": tokens * programs.ROW.itemsize}
            sizes |= {"tiles": 8 * (tokens // programs.TILE + rows), "last": 4 * rows, "tokens": 4 * rows}
            sizes |= {"next": rows * programs.ROW.itemsize, "logits": 4 * rows * self.checkpoint.vocab_size}
            memory, buffers = self._hold(sizes, f"what a prompt of {tokens} tokens reads and writes")
            self._large, self._capacity = (memory, buffers), (tokens, rows)
        return self._large[1]

    def _forget_large(self) -> None:
        cuda.synchronize(self.stream)
        while self._graphs:
            cuda.destroy_graph(self._graphs.popitem()[1])
        if self._large:
            self._large[0].free()
            self._large = None

    # -- As a session

    @property
    def past(self) -> int:
        """Tokens in the cache."""
        return self._past

    def reset(self) -> None:
        self._past = 0

    def empty_past(self, batch: int) -> dict[str, np.ndarray]:
        shape = (0, batch, self.checkpoint.num_heads, self.checkpoint.head_size)
        return {f"past_key_values.{name}": np.zeros(shape, self.dtype) for name in self._names}

    def step(self, call: Mapping[str, np.ndarray]) -> np.ndarray:
        batch, length = call["input_ids"].shape
        if self._past and batch != self._batch:
            raise WorkbookError(f"the cache holds {self._batch} rows, the call has {batch}: reset the session first.")
        if self._past + length > self.limits.total:
            raise WorkbookError(
                f"{self._past} tokens in the cache and {length} new ones are more than the {self.limits.total} that "
                "this session holds: drop old rounds, or open a session that holds more."
            )
        places = self.enqueue(call, length)
        scores = np.empty((self._batch, self.checkpoint.vocab_size), np.float32)
        for row, address in enumerate(places):
            cuda.read_rows(scores[row : row + 1], address, scores[row].nbytes, self.stream)
        return scores

    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """One call of forward with its past from the host; logits (batch, 1, vocabulary) of the last position."""
        call = {name: np.asarray(value) for name, value in flat.items()}
        past = [call[f"past_key_values.{name}"].swapaxes(0, 1) for name in self._names]
        self.reset()
        batch, length = past[0].shape[:2]
        if length:
            self._begin(batch, read_mask(call, length)[0])
            self._write(past)
            self._past = length
        logits = self.step(call)
        presents = {
            f"present.{name}": array.swapaxes(0, 1) for name, array in zip(self._names, self._read(), strict=True)
        }
        self.reset()
        return {"logits": logits[:, None], **presents}

    def _look(self, call: Mapping[str, np.ndarray]) -> np.ndarray:
        """Read the mask of a call; without a past begin with an empty cache. Returns context of `read_mask`."""
        skip, context = read_mask(call, self._past)
        if not self._past:
            self._begin(len(skip), skip)
        elif (skip != self._skip).any():
            raise WorkbookError("the cache holds other padding than the call's mask hides: reset the session first.")
        return context

    # -- The cache

    def _begin(self, batch: int, skip: np.ndarray) -> None:
        if batch > self._slots:
            self._forget_large()  # whose graphs know where the cache was
            if self._cache:
                self._cache.free()
                self._cache, self._slots = None, 0
            nbytes = memory_prediction.cache_bytes(self.checkpoint, batch)
            self._cache, self._slots = cuda.DeviceMemory(nbytes, f"the cache of {batch} rows"), batch
        self._past, self._batch, self._skip = 0, batch, skip

    def _place(self, number: int, row: int = 0) -> int:
        """Where the keys or values of a layer lie, (slots, room, heads, d), and those of a row."""
        return int(self._cache.address) + (number * self._slots + row) * self._room * self.sizes.hidden * 2

    def _write(self, rows: list[np.ndarray]) -> None:
        for number, array in enumerate(rows):
            for row, skip in enumerate(self._skip):
                given = np.ascontiguousarray(array[row, skip:], self.dtype)
                cuda.Buffer(self._place(number, row), given.nbytes).fill(given, self.stream)

    def _read(self) -> list[np.ndarray]:
        shape = (self._batch, self._past, self.checkpoint.num_heads, self.checkpoint.head_size)
        arrays = [np.zeros(shape, self.dtype) for _ in self._names]
        for number, array in enumerate(arrays):
            for row, skip in enumerate(self._skip):
                tokens = array[row, skip:].reshape(1, -1)
                cuda.read_rows(tokens, self._place(number, row), tokens.nbytes, self.stream)
        return arrays

    # -- Steps

    def enqueue(self, call: Mapping[str, np.ndarray], length: int) -> list[int]:
        """Send the inputs of a step of `length` tokens and run it, its rows put into the cache; waits for nothing.

        Returns the address of the logits of each row, (vocabulary) fp32. Raises WorkbookError for ids and positions
        that the checkpoint does not have, which would be read from memory that is something else's.
        """
        for name, most in (("input_ids", self.checkpoint.vocab_size), ("position_ids", self.checkpoint.max_length)):
            if call[name].min() < 0 or call[name].max() >= most:
                raise WorkbookError(
                    f"{name} goes from {call[name].min()} to {call[name].max()}; this checkpoint has 0 to {most - 1}."
                )
        rows, last = self._rows_of(call, self._look(call))
        self._past += length
        self._next = rows[last]
        self._next["block_position"] += 1
        self._next["place"] += 1
        self._next["end"] = self._next["place"] + 1
        if len(rows) <= ROWS:
            self._small["rows"].fill(rows, self.stream)
            self._one_kernel(len(rows))
            buffers, at = self._small, last
        else:
            self._prompt(rows, last)
            buffers, at = self._large[1], np.arange(len(last))
        self._tokens = [buffers["tokens"].address + 4 * int(row) for row in at]
        return [buffers["logits"].address + 4 * self.checkpoint.vocab_size * int(row) for row in at]

    def _rows_of(self, call: Mapping[str, np.ndarray], context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A `Row` for each new token that is no padding, and which of them are the last of their chats."""
        length, made = call["input_ids"].shape[1], []
        for row, skip in enumerate(self._skip):
            first = max(int(skip) - self._past, 0)
            tokens = np.arange(first, length)
            mine = np.zeros(len(tokens), programs.ROW)
            mine["id"] = call["input_ids"][row, first:]
            mine["position"], mine["block_position"] = call["position_ids"][row][:, first:]
            mine["slot"], mine["place"] = row, self._past + tokens - skip
            mine["end"] = np.maximum(self._past + tokens + 1, context[row] if not self._past else 0) - skip
            made.append(mine)
        return np.concatenate(made), np.cumsum([len(mine) for mine in made]) - 1

    def _one_kernel(self, count: int) -> None:
        place, small = self._weights.places, {name: buffer.address for name, buffer in self._small.items()}
        step = programs.Step(
            embedding=place[EMBEDDING], head=place[HEAD],
            norm=place[f"{FINAL}.weight"], norm_bias=place[f"{FINAL}.bias"],
            cache=self._cache.address, epoch=self._epoch, layer_count=self.checkpoint.num_layers, row_count=count,
            slots=self._slots, room=self._room, vocabulary=self.checkpoint.vocab_size, blank=self._blank,
            epsilon=self.checkpoint.config.get("layernorm_epsilon", 1e-5), alpha=ALPHA, **small,
        )  # fmt: skip
        self.card.step(step, self.stream)
        self._epoch = (self._epoch + self.card.barriers(self.checkpoint.num_layers)) % 2**32

    def _prompt(self, rows: np.ndarray, last: np.ndarray) -> None:
        """Rows of prompts, those of a slot in order."""
        large = self._hold_large(len(rows), len(last))
        starts = np.concatenate([[0], last + 1])
        tiles = np.array(
            [
                (first, min(programs.TILE, int(stop) - first))
                for start, stop in pairwise(starts)
                for first in range(int(start), int(stop), programs.TILE)
            ],
            np.int32,
        )
        large["rows"].fill(rows, self.stream)
        large["tiles"].fill(tiles, self.stream)
        large["last"].fill(last.astype(np.int32), self.stream)
        self._layers(len(rows), len(last), len(tiles))

    def _layers(self, tokens: int, rows: int, tiles: int | None) -> None:
        """Enqueue a whole step of prompt.cu.

        tiles: of attention; None: each token is a row of its own, and goes on from its place when it is done.
        """
        assert self._products is not None
        at = {name: buffer.address for name, buffer in self._large[1].items()}
        weights, size, stream = self._weights.places, self.sizes, self.stream
        multiply = self._products.multiply
        epsilon = self.checkpoint.config.get("layernorm_epsilon", 1e-5)
        cos, sin = self._small["cos"].address, self._small["sin"].address

        def normalize(name: str, next_bias: int, count: int = tokens, which: int = 0) -> None:
            arguments = at["hidden"], at["x"], weights[f"{name}.weight"], weights[f"{name}.bias"], next_bias
            self.card.launch("normalize", (count, 1), 256, 64, (*arguments, epsilon, ALPHA, which), stream)

        self.card.launch("embed", (tokens, 1), 256, 0, (weights[EMBEDDING], at["rows"], at["hidden"]), stream)
        for layer in range(self.checkpoint.num_layers):
            own = {name: weights[stored] for name, stored in layer_weights(layer).items()}
            prefix = f"transformer.layers.{layer}."
            keys, values = self._place(2 * layer), self._place(2 * layer + 1)
            normalize(prefix + "input_layernorm", own["dense_bias"])
            multiply(
                Kind(3 * size.hidden, size.hidden, "bias"),
                tokens,
                at["x"],
                own["qkv"],
                at["qkv"],
                own["qkv_bias"],
                stream,
            )
            turned = at["qkv"], cos, sin, at["rows"], at["query"], keys, values, self._room
            self.card.launch("rotate", (tokens, 1), 256, 0, turned, stream)
            read = at["query"], keys, values, at["rows"]
            if tiles is None:
                shared = 16 * (size.head + 2)
                self.card.launch("attend_rows", (size.heads, tokens), 128, shared, (*read, at["x"], self._room), stream)
            else:
                tiled = *read, at["tiles"], at["x"], self._room
                self.card.launch("attend_tiles", (tiles, size.heads), 128, self.card.tile_bytes, tiled, stream)
            multiply(Kind(size.hidden, size.hidden, sums=True), tokens, at["x"], own["dense"], at["hidden"], 0, stream)
            normalize(prefix + "post_attention_layernorm", own["down_bias"])
            multiply(
                Kind(size.inner, size.hidden, "gelu"), tokens, at["x"], own["up"], at["inner"], own["up_bias"], stream
            )
            multiply(
                Kind(size.hidden, size.inner, sums=True), tokens, at["inner"], own["down"], at["hidden"], 0, stream
            )
        which = 0 if tiles is None else at["last"]
        normalize(FINAL, 0, rows, which)
        head = Kind(self.checkpoint.vocab_size, size.hidden, fresh=True)
        multiply(head, rows, at["x"], weights[HEAD], at["logits"], 0, stream)
        following = at["rows"] if tiles is None else at["next"]
        chosen = at["logits"], self.checkpoint.vocab_size, self._blank, which, at["rows"], following, at["tokens"]
        self.card.launch("choose", (rows, 1), 256, 128, chosen, stream)

    # -- The loop without the host

    def pretend(self, batch: int, past: int) -> None:
        """Take what lies in the cache for `past` tokens of each of `batch` rows: for measuring."""
        self._begin(batch, np.zeros(batch, np.int64))
        self._past, self._next = past, np.zeros(batch, programs.ROW)
        self._next["slot"], self._next["place"], self._next["end"] = np.arange(batch), past, past + 1
        self._next["position"] = max(past - 2, 0)
        self._next["id"], self._next["block_position"] = 6, 2
        self._start()

    def _start(self) -> None:
        """The rows of the next decode step, from `_next`."""
        if self._batch > ROWS:
            self._hold_large(self._batch, self._batch)
        (self._small if self._batch <= ROWS else self._large[1])["rows"].fill(self._next, self.stream)

    def decode(self) -> None:
        """One step of one token a row, which goes on from the last."""
        if self._batch <= ROWS:
            self._one_kernel(self._batch)
        else:
            if self._batch not in self._graphs:
                self._layers(self._batch, self._batch, None)  # whatever cuBLASLt prepares is not to be captured
                cuda.synchronize(self.stream)
                self._start()
                self._graphs[self._batch] = cuda.capture(
                    lambda: self._layers(self._batch, self._batch, None), self.stream
                )
            cuda.launch(self._graphs[self._batch], self.stream)
        self._past += 1

    def follow(self) -> Generator[np.ndarray]:
        """The best token of the last call, (batch,), then that of the step it is fed to, and so on, as they come.

        Nothing passes through the host: up to AHEAD steps run while the token of the first is read. Ends where the
        cache is full. Steps that nobody waited for stay in the cache; reset before another prompt.
        """
        first = np.empty(self._batch, np.int32)
        for row, address in enumerate(self._tokens):
            cuda.read_rows(first[row : row + 1].reshape(1, 1), address, 4, self.stream)
        yield first.astype(np.int64)
        self._next["id"] = first
        self._start()
        buffer = (self._small if self._batch <= ROWS else self._large[1])["tokens"]
        source = cuda.Buffer(buffer.address, 4 * self._batch)
        tokens = cuda.Pinned((AHEAD, self._batch), "int32")
        events = [cuda.new_event() for _ in range(AHEAD)]
        asked = given = 0
        try:
            while True:
                while asked < given + AHEAD and self._past < self._room:
                    self.decode()
                    tokens.receive(asked % AHEAD, source, self.stream)
                    cuda.mark(events[asked % AHEAD], self.stream)
                    asked += 1
                if given == asked:
                    return
                cuda.wait(events[given % AHEAD])
                token = tokens.array[given % AHEAD].astype(np.int64)
                given += 1
                yield token
        finally:
            cuda.synchronize(self.stream)
            for event in events:
                cuda.destroy_event(event)
            tokens.free()

    def close(self) -> None:
        """Free everything on the GPU."""
        if self._large or self._graphs:
            self._forget_large()
        if self._cache:
            self._cache.free()
            self._cache = None
        while self._closers:
            self._closers.pop()()
