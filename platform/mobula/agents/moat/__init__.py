"""MOAT: a planner and a grounder aligned jointly (Zhu et al. 2025, arXiv 2509.09629)."""
