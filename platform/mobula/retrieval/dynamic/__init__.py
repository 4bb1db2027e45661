"""Generative retrieval over corpora that grow: sessions, the multi-docid design, the evaluation of every session."""
