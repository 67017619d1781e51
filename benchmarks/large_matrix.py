"""TLR on a synthetic 4096 x 4096 matrix, k = 128, T = 50: against exact TLR and against its own bare products.

    python benchmarks/large_matrix.py [--device cuda] [--size 4096]

Exact TLR is timed for two of its 50 iterations and scaled. The bare products are the three of each step (M @ V,
M.T @ Q, Q @ Z.T) with the same column counts on the same buffers, and nothing else: 2 d^2 (c + c + r) flops a step, the
floor of the method.
"""

from __future__ import annotations

import argparse

import torch

from _common import median_seconds, report
from mendlm import TLR, AcceleratedTLR, Unstructured, refine, select_mask
from mendlm.linalg import OVERSAMPLING
from mendlm.refiners.tlr import LOOKAHEAD_STEPS


def synthetic(size: int, device: str) -> torch.Tensor:
    """Gaussian noise plus a decaying spectrum plus outlier columns, as large layers have them."""
    g = torch.Generator().manual_seed(0)
    rank = size // 4
    decay = torch.arange(1, rank + 1) ** -0.8
    W = torch.randn(size, size, generator=g)
    W += 3 * (torch.randn(size, rank, generator=g) * decay) @ torch.randn(rank, size, generator=g)
    W[:, torch.randperm(size, generator=g)[: size // 200]] *= 20
    return (0.02 * W).to(device)


def bare_products(W: torch.Tensor, refiner: TLR) -> None:
    lookahead = LOOKAHEAD_STEPS * (refiner.rank - 1) // (refiner.n_iter - 1)
    L = torch.empty_like(W)
    V = torch.randn(W.shape[1], refiner.rank + OVERSAMPLING, device=W.device)
    Q = torch.randn(W.shape[0], refiner.rank + OVERSAMPLING, device=W.device)
    for t in range(refiner.n_iter):
        r = refiner.rank_at(t)
        c = min(r + OVERSAMPLING + lookahead, V.shape[1])
        torch.mm(W, V[:, :c])
        torch.mm(W.T, Q[:, :c])
        torch.mm(Q[:, :r], V[:, :r].T, out=L)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=4096)
    options = parser.parse_args()
    device = options.device
    W = synthetic(options.size, device)
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    mask_seconds = median_seconds(lambda: select_mask(W, "magnitude", Unstructured(0.5)), device=device, repeats=3)
    tlr = TLR(128, solver="subspace")
    seconds = median_seconds(lambda: refine(W, mask, tlr), device=device, repeats=3)
    bare = median_seconds(lambda: bare_products(W, tlr), device=device, repeats=3)
    accelerated = median_seconds(lambda: refine(W, mask, AcceleratedTLR(128, 25, rtol=0)), device=device, repeats=3)
    # An exact run is T + 1 SVDs plus small change; one SVD is timed (twice on a GPU) and scaled.
    svd = median_seconds(lambda: torch.linalg.svd(W, full_matrices=False), device=device, repeats=1)
    flops = sum(
        2.0 * W.numel() * (2 * min(tlr.rank_at(t) + OVERSAMPLING + 20, 128 + OVERSAMPLING) + tlr.rank_at(t))
        for t in range(50)
    )
    report(
        "large-matrix",
        device,
        [
            {
                "size": options.size,
                "svd_seconds": svd,
                "exact_seconds_scaled": 51 * svd,
                "tlr_seconds": seconds,
                "speedup": 51 * svd / seconds,
                "bare_products_seconds": bare,
                "times_bare_products": seconds / bare,
                "bare_gflops_per_second": flops / bare / 1e9,
                "accelerated_25_seconds": accelerated,
                "mask_seconds": mask_seconds,
            }
        ],
        notes="exact_seconds_scaled = 51 SVDs (50 steps and the final truncation), one of them timed.",
    )


if __name__ == "__main__":
    main()
