"""Synthetic worlds: generated data of which it is known what can be learned."""
