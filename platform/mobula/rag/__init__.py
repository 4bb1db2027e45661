"""Retrieval-augmented generation learned by expectation maximisation over latent searches and selections."""
