"""Sweeps with Ray Tune: spaces, searchers, schedulers, Pareto fronts. The only package that uses ``ray.tune``.

Call :func:`mobula.tuning.sweep.sweep`. Nothing is imported here: every trial's process imports this package.
"""
