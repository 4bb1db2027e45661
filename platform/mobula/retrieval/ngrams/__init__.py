"""Generative retrieval whose docids are the n-grams of the documents: index, language model, keys and their scores."""
