"""JointADMM against its floor: the bare matrix products and the one eigendecomposition that it cannot do without.

    python benchmarks/joint.py [--rank 16]

Weights are SmolLM2-135M's and one of 2048 x 2048; the Gram matrix is that of random inputs with a decaying spectrum, as
times depend on shapes alone. Floor: an eigendecomposition of (d_in, d_in); a product with a (d_in, d_in) matrix for
every iteration of ADMM and of the polish; the inverse's product for each penalty. Refinement and floor run by turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from _common import projections, report
from mendlm import NM, JointADMM, refine, select_mask

REPEATS = 3


def seconds_of(run) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    rank = parser.parse_args().rank
    weights = projections(range(15, 16))
    layers = {
        name.split(".")[-2]: W
        for name, W in weights.items()
        if name.split(".")[-2] in ("q_proj", "up_proj", "down_proj")
    }
    layers["random"] = torch.randn(2048, 2048)
    rows = []
    for name, W in layers.items():
        d_out, d_in = W.shape
        X = torch.randn(2 * d_in, d_in) * torch.linspace(1, 30, d_in).reciprocal()
        gram = (X.T @ X / len(X)).double()
        mask = select_mask(W, "magnitude", NM(2, 4))
        refiner = JointADMM(rank)

        def work(W=W, mask=mask, gram=gram, refiner=refiner):  # type: ignore[no-untyped-def]
            return refine(W, mask, refiner, gram=gram, pattern=NM(2, 4))

        n_products = len(work().trace)
        H, out = gram.float(), torch.empty_like(W)

        def floor(W=W, H=H, out=out, n=n_products):  # type: ignore[no-untyped-def]
            torch.linalg.eigh(H)
            for _ in range(n):
                torch.mm(W, H, out=out)
            for _ in range(-(-refiner.n_iter // refiner.hold)):  # noqa: B023
                H @ H

        both = [(seconds_of(work), seconds_of(floor)) for _ in range(REPEATS)]
        seconds, least = (statistics.median(column) for column in zip(*both, strict=True))
        ratio = statistics.median(a / b for a, b in both)
        rows.append(
            {
                "layer": f"{name} {d_out} x {d_in}",
                "rank": rank,
                "products": n_products,
                "seconds": seconds,
                "floor_seconds": least,
                "ratio": ratio,
            }
        )
    report("joint", "cpu", rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
