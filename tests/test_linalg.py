"""What `mendlm.linalg` does on a CUDA device and not on the CPU, tried on the CPU; the rest is tested by its users."""

from __future__ import annotations

import pytest
import torch

from mendlm import linalg
from test_refiners import planted

EPS32 = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (33, 33)])
@pytest.mark.parametrize("rank", [1, 7, 33])
def test_the_way_by_the_gram_matrix_is_the_svd(shape: tuple[int, int], rank: int) -> None:
    M = planted(*shape, dtype=torch.float32)
    found = linalg._triplets_by_gram(M, rank)
    assert found is not None
    U, sigma, Vh = found
    assert (U.shape, sigma.shape, Vh.shape) == ((shape[0], rank), (rank,), (rank, shape[1]))
    assert U.dtype == sigma.dtype == Vh.dtype == torch.float32
    exact = torch.linalg.svd(M.double(), full_matrices=False)
    size = float(exact.S[0])
    assert torch.allclose(sigma.double(), exact.S[:rank], rtol=0, atol=2 * EPS32 * size)
    identity = torch.eye(rank, dtype=torch.float64)
    for basis in (U.double().T @ U.double(), Vh.double() @ Vh.double().T):
        assert float((basis - identity).abs().max()) <= 40 * EPS32
    best = exact.U[:, :rank] * exact.S[:rank] @ exact.Vh[:rank]
    gap = float(exact.S[rank - 1] - exact.S[rank]) / size if rank < min(shape) else 1.0
    L = (U * sigma).double() @ Vh.double()
    assert float(torch.linalg.matrix_norm(L - best)) <= 40 * EPS32 * size / gap


def test_singular_values_that_squares_do_not_hold_are_left_to_the_svd() -> None:
    M = torch.diag(torch.tensor([1.0, 1e-3, 1e-7, 0.0]))
    assert linalg._triplets_by_gram(M, 2) is not None
    assert linalg._triplets_by_gram(M, 3) is None
    assert linalg._triplets_by_gram(torch.zeros(3, 4), 1) is None


def test_small_eigenproblems() -> None:
    H = planted(30, 30, dtype=torch.float32)
    H = H + H.T
    energies, vectors = linalg.eigh(H)
    assert bool((energies.diff() >= 0).all())
    rest = H @ vectors - vectors * energies
    assert float(rest.abs().max()) <= 30 * EPS32 * float(torch.linalg.matrix_norm(H))
