"""Text in, ranked documents out: the docid models as :class:`Retriever`, and the dual-encoder baseline."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mobula.data.pseudo_queries import body
from mobula.data.records import Document
from mobula.models.encoders import TextEncoder
from mobula.retrieval.arms import parse
from mobula.retrieval.build import over
from mobula.retrieval.decoding import ArDecoder, Decoder
from mobula.retrieval.dense import FlatRetriever
from mobula.retrieval.docids.table import DocidTable, InsertReport
from mobula.retrieval.inputs import QueryInputs
from mobula.retrieval.network import DocidModel
from mobula.retrieval.search import SearchOptions, SearchResult, StepEvent
from mobula.retrieval.tasks import DualEncoder


class DocidRetriever:
    """A docid model behind text queries; ``name`` is its arm. A search sees one version of the documents."""

    def __init__(
        self,
        name: str,
        model: DocidModel,
        table: DocidTable,
        inputs: QueryInputs,
        encoder: TextEncoder,
    ) -> None:
        self.name = name
        self.learner = parse(name).learner
        self.decoders: tuple[str, ...] = self.learner.decoders
        self.model = model.eval()
        self.inputs = inputs
        self.encoder = encoder
        self.last_insert: InsertReport | None = None
        self._writing = threading.Lock()
        self._decoder = self._make(table)

    @property
    def table(self) -> DocidTable:
        """The present docid table."""
        return self._decoder.corpus.table

    @property
    def levels(self) -> int:
        """Code length L."""
        return self.table.levels

    @property
    def decoder(self) -> Decoder | ArDecoder:
        """The decoder over the present table; it stays valid for its own version of the table."""
        return self._decoder

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
        """As :class:`Retriever`."""
        return self._decoder.search(self.features(queries), list(options))

    def features(self, queries: Sequence[str]) -> dict[str, torch.Tensor]:
        """The network's input for texts, on the model's device."""
        device = next(self.model.parameters()).device
        return {name: values.to(device) for name, values in self.inputs.features(queries).items()}

    def trace(self, query: str, options: SearchOptions) -> Iterator[StepEvent | SearchResult]:
        """Decoding steps as they happen, then the result."""
        return self._decoder.trace(self.features([query]), options)

    def insert(self, documents: Sequence[Document]) -> int:
        """Give documents their codes and make them searchable; no weight changes.

        Raises:
            DataError: for an id that is in the corpus already, or given twice.
            Unsupported: if the docid family cannot take documents without training.
        """
        vectors = self.encoder.embed([body(d) for d in documents])
        with self._writing:
            table, self.last_insert = self.table.insert(documents, vectors)
            self._decoder = self._make(table)
        return table.rows_version

    def remove(self, doc_ids: Sequence[str]) -> int:
        """Leave documents out of every search; no other document's code changes.

        Raises:
            DataError: for an id that is not in the corpus, or given twice.
        """
        with self._writing:
            table = self.table.delete(doc_ids)
            self._decoder = self._make(table)
        return table.rows_version

    def restricted(self, doc_ids: Sequence[str]) -> DocidRetriever:
        """The same model over some of the documents, for diagnosis: other documents' codes cannot be decoded."""
        kept = set(doc_ids)
        table = self.table.delete([doc_id for doc_id in self.table.rows if doc_id not in kept])
        return DocidRetriever(self.name, self.model, table, self.inputs, self.encoder)

    def _make(self, table: DocidTable) -> Decoder | ArDecoder:
        return self.learner.decoder(over(self.model, table), table)


class DualRetriever(FlatRetriever):
    """The trained dual encoder."""

    name = "dual"

    def __init__(
        self, model: DualEncoder, encoder: TextEncoder, doc_ids: Sequence[str], embeddings: np.ndarray
    ) -> None:
        self.model = model.eval()
        super().__init__(encoder, doc_ids, embeddings)

    @torch.inference_mode()
    def _of_queries(self, embeddings: np.ndarray) -> np.ndarray:
        return self.model.embed_queries(torch.from_numpy(embeddings)).numpy()

    @torch.inference_mode()
    def _of_documents(self, embeddings: np.ndarray) -> np.ndarray:
        return self.model.embed_documents(torch.from_numpy(np.ascontiguousarray(embeddings))).numpy()
