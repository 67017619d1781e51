"""Slow, obvious float64 NumPy versions written from the paper; nothing here is imported from mendlm."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def truncate(M: Array, rank: int) -> Array:
    """Best rank-`rank` approximation (Eckart-Young)."""
    U, sigma, Vh = np.linalg.svd(M, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vh[:rank]


def tlr(W: Array, mask: Mask, k: int, T: int) -> tuple[Array, Array, list[float]]:
    """Algorithm 1 line by line, with the tail of the SVD as the paper has it.

    Returns S^T, L = W - S^T, and after every iteration ||(1 - P) * (W - L_r)||_F.
    """
    S = W * mask
    objectives = []
    for t in range(T):
        L = W - S
        U, sigma, Vh = np.linalg.svd(L, full_matrices=False)
        r = 1 if T == 1 else 1 + int(np.floor((k - 1) * t / (T - 1)))
        tail = (U[:, r:] * sigma[r:]) @ Vh[r:]
        head = (U[:, :r] * sigma[:r]) @ Vh[:r]
        S = S + mask * tail
        objectives.append(float(np.linalg.norm((W - head)[~mask])))
    return S, W - S, objectives


def mask_by_sorting(scores: Array, n_keep: int) -> Mask:
    """Keep the `n_keep` largest of a flat array; ties: earlier first. Python's own stable sort."""
    order = sorted(range(scores.size), key=lambda i: -scores.flat[i])
    mask = np.zeros(scores.size, dtype=bool)
    mask[order[:n_keep]] = True
    return mask.reshape(scores.shape)


def joint_admm(
    W: Array, H: Array, group: int, n_keep: int, rank: int, penalties: list[float]
) -> tuple[Mask, Array, Array]:
    """Three-block ADMM for ||(W - S - L) C||, H = C C^T, S = D: mask, D and L after one iteration per penalty.

    The multiplier is V, the penalty's share not taken out of it; every step is written out with a dense solve.
    """
    values, vectors = np.linalg.eigh(H)
    root = (vectors * np.sqrt(values)) @ vectors.T
    D, L, V = W.copy(), np.zeros_like(W), np.zeros_like(W)
    for rho in penalties:
        S = np.linalg.solve(H + rho * np.eye(H.shape[0]), ((W - L) @ H - V + rho * D).T).T
        L = truncate((W - S) @ root, rank) @ np.linalg.inv(root)
        target = S + V / rho
        scores = np.square(target).reshape(-1, group)
        mask = np.stack([mask_by_sorting(row, n_keep) for row in scores]).reshape(W.shape)
        D = target * mask
        V = V + rho * (S - D)
    return mask, D, L


def damped(gram: Array, damping: float) -> Array:
    """The Gram matrix with a share of the mean of its diagonal added to the diagonal."""
    return gram + damping * np.diag(gram).mean() * np.eye(len(gram))


def gram_norm(E: Array, gram: Array) -> float:
    """The root of trace(E G E^T)."""
    return float(np.sqrt(np.einsum("ij,jk,ik->", E, gram, E)))


def eora(E: Array, gram: Array, rank: int) -> Array:
    """EoRA, arXiv:2410.21271, Algorithm 1: truncate in the eigenspace of the inputs, project back."""
    values, Q = np.linalg.eigh(gram)
    project = Q @ np.diag(np.sqrt(values))
    return truncate(E @ project, rank) @ np.linalg.inv(project)


def slim_lora(E: Array, mean_abs: Array, rank: int) -> Array:
    """SLiM-LoRA, arXiv:2410.09615: F(M) = M diag(x), x shifted by its smallest positive entry; L = F^-1(SVD(F(E)))."""
    x = mean_abs + mean_abs[mean_abs > 0].min()
    return truncate(E @ np.diag(x), rank) @ np.diag(1 / x)


def dsnot_row(
    w: Array,
    kept: Mask,
    mean: Array,
    variance: Array,
    cost: Array,
    initial: Array,
    *,
    m: int | None,
    cycles: int,
    threshold: float,
    power: float,
    same_sign: bool,
) -> Mask:
    """DSnoT, arXiv:2310.08915, Algorithm 1, for one row; `m` is the group of n:m, None for unstructured.

    Under n:m a swap that does not lower the error, or turns its sign, is left out and the next is tried.
    """
    kept = kept.copy()
    tried: set[int] = set()
    moved: set[int] = set()
    error = sum(w[j] * mean[j] for j in range(len(w)) if not kept[j])
    first_sign = np.sign(error)
    for _ in range(cycles):
        if abs(error) <= threshold:
            break
        sign = 1 if error > 0 else -1
        grow = [j for j in range(len(w)) if not kept[j] and j not in tried | moved and sign * w[j] * mean[j] > 0]
        if not grow:
            break
        j = max(grow, key=lambda j: (sign * w[j] * mean[j] / variance[j] ** power, -j))
        if m is None:
            prune = [i for i in range(len(w)) if kept[i] and i not in moved and sign * w[i] * mean[i] < 0]
            rank_by = cost
        else:
            group = range(j - j % m, j - j % m + m)
            prune = [i for i in group if kept[i] and i not in moved]
            rank_by = initial
        tried.add(j)
        if m is None and not prune:
            break
        if not prune:
            continue
        i = min(prune, key=lambda i: (rank_by[i], i))
        after = error + w[i] * mean[i] - w[j] * mean[j]
        if m is None and same_sign and np.sign(after) != first_sign:
            break
        if m is not None and (np.sign(after) != first_sign or abs(after) >= abs(error)):
            continue
        kept[j], kept[i] = True, False
        moved |= {i, j}
        error = after
    return kept
