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
