"""Subspace against exact TLR, and accelerated TLR, on real layers of SmolLM2-135M: objective and time in one run.

    python benchmarks/solvers.py [--device cuda]

Floor of a subspace step: 6 d_out d_in r flops. 1536 x 576 at rank 32 (16 + oversampling): 0.17 Gflop, 0.8 ms at the
210 Gflop/s that a product of this shape reaches on two AVX2 cores; 50 steps: 40 ms.
"""

from __future__ import annotations

import argparse

import torch

from _common import median_seconds, projections, report
from mendlm import TLR, AcceleratedTLR, Unstructured, refine, select_mask

LAYERS = {
    "576 x 576": "model.layers.15.self_attn.q_proj.weight",
    "1536 x 576": "model.layers.15.mlp.up_proj.weight",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    weights = projections(range(15, 16))
    rows = []
    for shape, name in LAYERS.items():
        W = weights[name].to(device)
        mask = select_mask(W, "magnitude", Unstructured(0.5))
        for k in (16, 128):
            exact = refine(W, mask, TLR(k, solver="exact"))
            exact_seconds = median_seconds(lambda: refine(W, mask, TLR(k, solver="exact")), device=device, repeats=3)  # noqa: B023
            for refiner in (TLR(k, solver="subspace"), AcceleratedTLR(k, n_iter=25, rtol=0), AcceleratedTLR(k)):
                out = refine(W, mask, refiner)
                seconds = median_seconds(lambda: refine(W, mask, refiner), device=device, repeats=9)  # noqa: B023
                rows.append(
                    {
                        "layer": shape,
                        "k": k,
                        "refiner": f"{refiner.name}, {len(out.trace)} steps",
                        "exact_seconds": exact_seconds,
                        "seconds": seconds,
                        "speedup": exact_seconds / seconds,
                        "exact_objective": exact.objective,
                        "objective": out.objective,
                        "objective_excess_percent": 100 * (out.objective / exact.objective - 1),
                    }
                )
    report("solvers", device, rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
