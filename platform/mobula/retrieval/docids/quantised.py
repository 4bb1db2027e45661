"""Residual and product quantisation (docid families ``rq``, ``pq``, ``opq``).

Shapes: points N x D, levels L, codebook size K. A final code is always the nearest codebook entry; only the fit
of an ``rq`` codebook balances. Encoding works in double precision (see ``Fitted.centred``).
"""

from __future__ import annotations

from collections.abc import Iterator

import faiss
import numpy as np

from mobula.errors import ConfigError, TrainingError
from mobula.retrieval.docids.settings import CodeConfig

SINKHORN_SWEEPS = 20  # the marginals are then met to about a percent, which hard assignment cannot tell from exact
GUARDED_DOCUMENTS_PER_CODE = 8  # below this a level's entropy says little about its codebook
CHUNK = 16_384  # points per distance matrix


class CodebookCollapsed(TrainingError):
    """A level uses so few of its codes that it tells documents apart poorly."""


def sizes(config: CodeConfig, points: np.ndarray) -> np.ndarray:
    """Sizes i32[L] of a space fitted on points f64[N, D].

    Raises:
        ConfigError: if there are fewer points than codes.
    """
    if len(points) < config.codes:
        raise ConfigError([f"codes={config.codes} but only {len(points)} vectors to fit on; use fewer codes"], "docid")
    return np.full(config.levels, config.codes, np.int32)


def fit_rq(config: CodeConfig, points: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Codebooks of residual quantisation, level by level."""
    residual = np.array(points, np.float64)
    shape = (config.levels, config.codes, points.shape[1])
    arrays = {"codebook": np.zeros(shape, np.float32)}
    if config.rq.assign == "normalised":
        arrays["direction"] = np.zeros(shape, np.float32)
    for level in range(config.levels):
        _fit_level(config, arrays, level, residual, seed + level)
        _subtract(residual, arrays["codebook"][level], _assign(arrays, level, residual))
    return arrays


def fit_pq(config: CodeConfig, points: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Codebooks of product quantisation behind a random rotation.

    Raises:
        ConfigError: if D is not a multiple of L.
    """
    _require_slices(config, points)
    return _fit_slices(config, points, _random_rotation(points.shape[1], seed), seed)


def fit_opq(config: CodeConfig, points: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Codebooks of product quantisation behind the rotation that suits the points.

    Raises:
        ConfigError: if D is not a multiple of L.
    """
    _require_slices(config, points)
    return _fit_slices(config, points, _opq_rotation(config, points, seed), seed)


def encode(arrays: dict[str, np.ndarray], points: np.ndarray, prefix: np.ndarray | None = None) -> np.ndarray:
    """Codes i32[N, L] of centred points f64[N, D]; with ``prefix`` i32[N, l], the first l codes are those given."""
    if "rotation" in arrays:
        codes = _encode_pq(arrays, points)
        if prefix is not None:
            codes[:, : prefix.shape[1]] = prefix
        return codes
    residual = np.array(points, np.float64)
    levels = len(arrays["codebook"])
    given = 0 if prefix is None else prefix.shape[1]
    codes = np.empty((len(points), levels), np.int32)
    for level in range(levels):
        codes[:, level] = prefix[:, level] if level < given else _assign(arrays, level, residual)  # type: ignore[index]
        _subtract(residual, arrays["codebook"][level], codes[:, level])
    return codes


def reconstruct(arrays: dict[str, np.ndarray], codes: np.ndarray) -> np.ndarray:
    """Centred vectors f32[N, D] of codes i32[N, L]: the sum of residual entries, or the rotated slices."""
    codebook = arrays["codebook"]
    picked = [codebook[level][codes[:, level]] for level in range(len(codebook))]
    if "rotation" in arrays:
        return (np.concatenate(picked, axis=1) @ arrays["rotation"]).astype(np.float32)
    return np.add.reduce(picked).astype(np.float32)


def codewords(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Vectors f32[L, K, D] such that a code reconstructs to the sum of one vector per level."""
    codebook = arrays["codebook"]
    if "rotation" not in arrays:
        return codebook.astype(np.float32)
    slices = arrays["rotation"].reshape(len(codebook), -1, arrays["rotation"].shape[1])
    return np.einsum("lks,lsd->lkd", codebook, slices).astype(np.float32)


def entropies(codes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Entropy in bits of each level of codes i32[N, L], f64[L]."""
    bits = np.zeros(len(sizes))
    for level, size in enumerate(sizes):
        share = np.bincount(codes[:, level], minlength=size) / max(1, len(codes))
        share = share[share > 0]
        bits[level] = -(share * np.log2(share)).sum()
    return bits


def check_entropy(codes: np.ndarray, sizes: np.ndarray, least: float) -> None:
    """Refuse a collapsed level.

    Raises:
        CodebookCollapsed: naming the level, its entropy and what would be enough.
    """
    for level, (bits, size) in enumerate(zip(entropies(codes, sizes), sizes, strict=True)):
        wanted = least * np.log2(size)
        if len(codes) >= GUARDED_DOCUMENTS_PER_CODE * size and bits < wanted:
            raise CodebookCollapsed(
                f"docid level {level} has {bits:.2f} bits, expected at least {wanted:.2f} of {np.log2(size):.2f}; "
                "use docid.rq.assign=balanced, fewer levels, or lower docid.min_entropy"
            )


def kmeans(points: np.ndarray, k: int, iterations: int, seed: int) -> np.ndarray:
    """Centroids f32[k, D] by faiss."""
    clustering = faiss.Kmeans(points.shape[1], k, niter=iterations, seed=seed, min_points_per_centroid=1)
    clustering.train(np.ascontiguousarray(points, np.float32))
    return np.array(clustering.centroids)


def nearest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Index i64[N] of the nearest centroid (the lowest of several)."""
    chunks = [distances(points[i : i + CHUNK], centroids).argmin(1) for i in range(0, len(points), CHUNK)]
    return np.concatenate(chunks) if chunks else np.empty(0, np.int64)


def distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distances f64[N, K] up to a constant per point."""
    wide = centroids.astype(np.float64)
    return (wide**2).sum(1) - 2.0 * (points @ wide.T)


def sinkhorn(cost: np.ndarray, temperature: float) -> np.ndarray:
    """The transport plan [N, K] of least cost with entropic regularisation, points and codes both used evenly.

    (Cuturi, "Sinkhorn Distances", 2013.) ``cost`` f64[N, K]; rows of the result sum to 1, columns to N/K.
    """
    kernel = np.array(cost, np.float64)
    rows, columns = _scalings(kernel, temperature)
    return rows[:, None] * kernel * columns


def _scalings(cost: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Factors f64[N] and f64[K] of rows and columns of the kernel, which is left in place of ``cost`` f64[N, K]."""
    for part in _chunks(cost):
        part -= part.min(1, keepdims=True)
        part /= -temperature
        np.exp(part, out=part)
    kernel = cost
    share = len(kernel) / kernel.shape[1]
    tiny = np.finfo(np.float64).tiny
    rows = np.ones(len(kernel))
    for _ in range(SINKHORN_SWEEPS):
        columns = share / np.maximum(rows @ kernel, tiny)
        rows = 1.0 / np.maximum(kernel @ columns, tiny)
    return rows, columns


def _fit_level(config: CodeConfig, arrays: dict[str, np.ndarray], level: int, residual: np.ndarray, seed: int) -> None:
    if config.rq.assign == "normalised":
        # Lengths differ by orders of magnitude deep in the code; directions alone keep every code in use.
        arrays["direction"][level] = kmeans(_directions(residual), config.codes, config.iterations, seed)
        chosen = _assign(arrays, level, residual)
        arrays["codebook"][level] = _means(residual, chosen, np.zeros_like(arrays["codebook"][level]))
        return
    centroids = kmeans(residual, config.codes, config.iterations, seed)
    if config.rq.assign == "balanced":
        centroids = _balance(residual, centroids, config.rq.rounds, config.rq.temperature)
    arrays["codebook"][level] = centroids


def _balance(points: np.ndarray, centroids: np.ndarray, rounds: int, temperature: float) -> np.ndarray:
    """Re-estimate centroids from balanced assignments, so that no few of them draw most points.

    One f64[N, K] is all that is kept of distances, kernel and plan: computing the kernel anew for each sweep would
    take many times as long.
    """
    kernel = np.empty((len(points), len(centroids)))
    for _ in range(rounds):
        for part, rows in zip(_chunks(kernel), _chunks(points), strict=True):
            part[:] = distances(rows, centroids)
            part += (rows**2).sum(1, keepdims=True)
            np.maximum(part, 0.0, out=part)
        scale = kernel.mean()
        if scale == 0:
            return centroids
        by_row, by_column = _scalings(kernel, temperature * scale)
        plan = zip(_chunks(kernel), _chunks(by_row), strict=True)
        chosen = np.concatenate([(rows[:, None] * part * by_column).argmax(1) for part, rows in plan])
        centroids = _means(points, chosen, centroids)
    return centroids


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Views of at most CHUNK rows."""
    return (array[i : i + CHUNK] for i in range(0, len(array), CHUNK))


def _subtract(points: np.ndarray, codebook: np.ndarray, chosen: np.ndarray) -> None:
    """Take from each point its codebook entry, in place."""
    for part, codes in zip(_chunks(points), _chunks(chosen), strict=True):
        part -= codebook[codes]


def _means(points: np.ndarray, chosen: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Mean f32[K, D] of the points of each code; ``fallback`` for a code without points."""
    counts = np.bincount(chosen, minlength=len(fallback))
    sums = np.zeros(fallback.shape, np.float64)
    np.add.at(sums, chosen, points)
    used = counts > 0
    means = fallback.astype(np.float32)
    means[used] = sums[used] / counts[used, None]
    return means


def _assign(arrays: dict[str, np.ndarray], level: int, residual: np.ndarray) -> np.ndarray:
    if "direction" in arrays:
        return nearest(_directions(residual), arrays["direction"][level])
    return nearest(residual, arrays["codebook"][level])


def _directions(residual: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(residual, axis=1, keepdims=True)
    return np.divide(residual, norms, out=np.zeros_like(residual), where=norms > 0)


def _require_slices(config: CodeConfig, points: np.ndarray) -> None:
    if points.shape[1] % config.levels:
        raise ConfigError([f"levels={config.levels} does not divide the embedding size {points.shape[1]}"], "docid")


def _fit_slices(config: CodeConfig, points: np.ndarray, rotation: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    rotated = (points @ rotation.T.astype(np.float64)).reshape(len(points), config.levels, -1)
    tables = [kmeans(rotated[:, i], config.codes, config.iterations, seed + i) for i in range(config.levels)]
    return {"rotation": rotation, "codebook": np.stack(tables)}


def _encode_pq(arrays: dict[str, np.ndarray], points: np.ndarray) -> np.ndarray:
    codebook = arrays["codebook"]
    rotated = (points @ arrays["rotation"].T.astype(np.float64)).reshape(len(points), len(codebook), -1)
    codes = [nearest(rotated[:, level], codebook[level]) for level in range(len(codebook))]
    return np.stack(codes, axis=1).astype(np.int32)


def _random_rotation(dim: int, seed: int) -> np.ndarray:
    """A Haar-distributed orthogonal matrix f32[D, D]."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


def _opq_rotation(config: CodeConfig, points: np.ndarray, seed: int) -> np.ndarray:
    """The OPQ rotation f32[D, D] (Ge et al., 2013), learned by faiss for the last power of two within K codes."""
    dim = points.shape[1]
    quantiser = faiss.ProductQuantizer(dim, config.levels, config.codes.bit_length() - 1)
    quantiser.cp.seed = seed
    quantiser.cp.min_points_per_centroid = 1  # or faiss warns of every clustering of every round
    matrix = faiss.OPQMatrix(dim, config.levels)
    matrix.pq = quantiser
    matrix.niter = config.iterations
    # faiss 1.15 writes beyond its buffers with fewer points than dimensions; repeating all changes no optimum.
    repeats = -(-dim // len(points))
    matrix.train(np.ascontiguousarray(np.tile(points, (repeats, 1)), np.float32))
    return faiss.vector_to_array(matrix.A).reshape(dim, dim).copy()
