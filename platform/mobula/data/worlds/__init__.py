"""Synthetic worlds: generated facts, passages and questions."""
