"""Corpora and queries, whatever their source, as the same records."""

from mobula.data.config import DataConfig
from mobula.data.files import export
from mobula.data.records import Document, Query, RetrievalData
from mobula.data.retrieval import SETS, load_retrieval

__all__ = ["SETS", "DataConfig", "Document", "Query", "RetrievalData", "export", "load_retrieval"]
