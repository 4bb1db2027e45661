"""Network calls for many requests at once, bit-equal to the same requests made alone.

On a CPU, the last bits of a matrix product depend on how many rows share it, so a request would see other
logits in another batch, and now and then another docid. Every call therefore has one of a few fixed numbers
of rows (``TILES``), short ones padded by repetition, and which number a row gets depends on its own request
alone. Equal shapes give equal bits wherever in the tile a row stands (measured for 1 to 256 rows, 1 and 2
threads; the test of batch independence guards it). Padding costs a lone request little, as small calls are
mostly overhead: on one CPU core (2 layers, d=128, L=8, K=32) a call takes 0.7 ms with 1 row, 1.2 with 4, 3.3
with 16 and 5.6 with 32. Tiles of 4 thus serve batches 2.3 times as fast as calls of one row would.

The query's tensors must be padded to one fixed length for the same reason.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from mobula.cancellation import raise_if_cancelled
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.network import DocidModel, Memory
from mobula.retrieval.search import BadSearch

T = TypeVar("T")
TILES = {"cpu": (4, 16), "cuda": (32, 128)}

# A decoder is a generator: it yields partial codes i64[R, L] (-1 is [MASK]), gets log-probabilities
# f64[R, L, K] for them and returns its result. What it never sees is which other requests share its calls.
Decoding = Generator[np.ndarray, np.ndarray, T]


@dataclass
class Call(Generic[T]):
    """One request under way: its decoding, what it waits for, what it has cost and, at the end, its result.

    ``query`` is the request's row in the batch, ``guidance`` the weight w of classifier-free guidance. A guided
    call counts once in ``nfe`` and doubles ``rows``. Padding is not counted.
    """

    query: int
    decoding: Decoding[T]
    guidance: float = 0.0
    pending: np.ndarray | None = None
    nfe: int = 0
    rows: int = 0
    _results: list[T] = field(default_factory=list)

    def advance(self, answer: np.ndarray | None) -> None:
        """Hand over the answer and run to the next question or to the end."""
        try:
            self.pending = self.decoding.send(answer)  # type: ignore[arg-type]
        except StopIteration as stop:
            self.pending = None
            self._results.append(stop.value)

    @property
    def result(self) -> T:
        """What the decoding returned; there is none before its end."""
        return self._results[0]


def together(decodings: Sequence[Decoding[T]]) -> Decoding[list[T]]:
    """Several decodings of one request as one: their questions of a round share a call."""
    calls = [Call(0, decoding) for decoding in decodings]
    for call in calls:
        call.advance(None)
    while waiting := [(call, z) for call in calls if (z := call.pending) is not None]:
        pending = [z for _, z in waiting]
        answer = yield np.concatenate(pending)
        ends = np.cumsum([len(z) for z in pending])[:-1]
        for (call, _), part in zip(waiting, np.split(answer, ends), strict=True):
            call.advance(part)
    return [call.result for call in calls]


@dataclass
class Network:
    """A model and the encoded queries of one batch."""

    model: DocidModel
    memory: Memory
    _unconditional: Memory | None = field(default=None, init=False)

    @classmethod
    def encode(cls, model: DocidModel, query: dict[str, Tensor]) -> Network:
        """Encode the queries, in tiles, on the model's device."""
        return cls(model, encode(model, query))

    def round(self, calls: Sequence[Call[Any]]) -> None:
        """Answer the questions of every call, all in as few network calls as the tiles allow, and advance them."""
        raise_if_cancelled()
        pending = [(call, z) for call in calls if (z := call.pending) is not None]
        answers = self._log_probs(pending)
        for (call, z), answer in zip(pending, answers, strict=True):
            call.nfe += 1
            call.rows += len(z) * (2 if call.guidance else 1)
            call.advance(answer)

    def _log_probs(self, pending: list[tuple[Call[Any], np.ndarray]]) -> list[np.ndarray]:
        """Log-probabilities f64[R, L, K] for the question of each call."""
        z = np.concatenate([rows for _, rows in pending])
        index = np.repeat([call.query for call, _ in pending], [len(rows) for _, rows in pending])
        guidance = np.repeat([call.guidance for call, _ in pending], [len(rows) for _, rows in pending])
        narrow, wide = tiles(device_of(self.model))
        is_wide = np.concatenate([np.arange(len(rows)) < len(rows) // wide * wide for _, rows in pending])
        out = np.empty((len(z), z.shape[1], self.model.width))
        for tile, of_tile in ((narrow, ~is_wide), (wide, is_wide)):
            for guided in (False, True):
                rows = np.flatnonzero(of_tile & ((guidance != 0) == guided))
                for start in range(0, len(rows), tile):
                    part = rows[start : start + tile]
                    # Repeating the last row fills the tile.
                    full = part[np.minimum(np.arange(tile), len(part) - 1)]
                    weight = guidance[full] if guided else None
                    out[part] = self._tile(index[full], z[full], weight)[: len(part)]
        return np.split(out, np.cumsum([len(rows) for _, rows in pending])[:-1])

    @torch.inference_mode()
    def _tile(self, index: np.ndarray, z: np.ndarray, guidance: np.ndarray | None) -> np.ndarray:
        device = device_of(self.model)
        chosen, codes = torch.from_numpy(index).to(device), torch.from_numpy(z).to(device)
        logits = self.model.logits(self.memory.rows(chosen), codes).float()
        if guidance is not None:
            if self._unconditional is None:
                self._unconditional = self.model.unconditional(self.memory)
            free = self.model.logits(self._unconditional.rows(chosen), codes).float()
            weight = torch.from_numpy(guidance).to(device, torch.float32)[:, None, None]
            guided = free + (weight + 1) * (logits - free)
            logits = torch.where(torch.isneginf(logits), logits, guided)
        return torch.log_softmax(logits, -1).cpu().numpy()


def tiles(device: torch.device) -> tuple[int, int]:
    """(narrow, wide) numbers of rows of a network call."""
    return TILES["cpu" if device.type == "cpu" else "cuda"]


def require_fit(model: DocidModel, table: DocidTable, paradigm: str) -> None:
    """Refuse a model of the other paradigm or of other code sizes than the table's.

    Raises:
        BadSearch: saying which.
    """
    if model.paradigm != paradigm:
        raise BadSearch(f"the model is {model.paradigm}; this decoder wants a model that is {paradigm}")
    sizes = model.get_buffer("sizes").tolist()
    if sizes != table.sizes.tolist():
        raise BadSearch(f"the model's codes have sizes {sizes}, the table's {table.sizes.tolist()}")


def device_of(model: DocidModel) -> torch.device:
    """Where the model's weights are."""
    return model.get_buffer("sizes").device


@torch.inference_mode()
def encode(model: DocidModel, query: dict[str, Tensor]) -> Memory:
    """The memory of B queries, encoded a narrow tile at a time.

    Raises:
        BadSearch: if the model is in training mode, where dropout would make results random.
    """
    if model.training:
        raise BadSearch("the model is in training mode; call model.eval() before decoding")
    device = device_of(model)
    size = len(next(iter(query.values())))
    tile = tiles(device)[0]
    parts = []
    for start in range(0, size, tile):
        index = torch.arange(start, start + tile).clamp(max=size - 1)
        parts.append(model.memory({name: values[index.to(values.device)].to(device) for name, values in query.items()}))
    return Memory.concat(parts).rows(torch.arange(size, device=device))
