"""The singular values of one weight and of the parts it is stored as."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mendlm.budgets import sparsity_of
from mendlm.checkpoints.folder import Packed, Part, open_folder
from mendlm.checkpoints.header import FLOATING, torch_name
from mendlm.errors import MendError, NonFiniteError, UsageError, located
from mendlm.linalg import compute_dtype
from mendlm.packing import unpack
from mendlm.paths import local_path


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one weight.

    Attributes
    ----------
    name, shape, dtype : of the weight.
    layout : how it is stored. A packed W is what stands in for the weight: W = S + B @ A.
    n_kept, sparsity : entries stored in S; for a dense weight its entries that are not zero.
    rank : of B @ A; None for a dense weight.
    sigma : (min(d_out, d_in),) singular values of W, float32 (float64 for float64 weights), non-increasing.
    sigma_sparse : those of S; None for a dense weight.
    sigma_low_rank : (rank,) those of B @ A; None for a dense weight.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: Literal["dense", "packed"]
    n_kept: int
    sparsity: float
    rank: int | None
    sigma: Tensor
    sigma_sparse: Tensor | None
    sigma_low_rank: Tensor | None

    def parts(self) -> dict[str, Tensor]:
        """The spectra there are, under their names: sigma, sigma_sparse, sigma_low_rank."""
        named = {"sigma": self.sigma, "sigma_sparse": self.sigma_sparse, "sigma_low_rank": self.sigma_low_rank}
        return {name: values for name, values in named.items() if values is not None}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields: every singular value, and the energy share of the leading r of them for every r."""
        facts = {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "layout": self.layout,
            "n_kept": self.n_kept,
            "sparsity": self.sparsity,
            "rank": self.rank,
        }
        for name, values in self.parts().items():
            facts[name] = values.tolist()
            facts[name.replace("sigma", "energy_frac")] = energy_frac(values).tolist()
        return facts


def energy_frac(sigma: Tensor) -> Tensor:
    """Share of the squared Frobenius norm in the leading 1, 2, … singular values; 1 everywhere for a zero matrix.

    Parameters
    ----------
    sigma : (r,) non-increasing singular values of the whole matrix.

    Returns
    -------
    (r,) float64, non-decreasing; the last entry is 1.
    """
    energy = sigma.double().square().cumsum(0)
    if not energy.numel() or float(energy[-1]) == 0.0:
        return torch.ones_like(energy)
    return energy / energy[-1]


def tensor_spectrum(path: str | Path, name: str) -> Spectrum:
    """Singular values of one weight matrix, and of its parts S and B @ A if it is compressed.

    Parameters
    ----------
    path : a folder as `inspect` takes it.
    name : of the weight; ``.weight`` at its end may be left out.

    Raises
    ------
    UsageError : unknown name, or a tensor that is no floating matrix.
    CheckpointError, NonFiniteError : damaged, or not finite.

    Notes
    -----
    One or two SVDs (values only) of a (d_out, d_in) matrix: O(d_out * d_in * min(d_out, d_in)) flops, about three dense
    copies of the weight in float32. The spectrum of B @ A costs O((d_out + d_in) * rank^2).
    """
    folder = open_folder(local_path(path))
    names = [*folder.packed, *folder.copied]
    full = name if name in names else f"{name}.weight"
    if full not in names:
        near = get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown tensor {name!r}.{hint} 'mendlm inspect {path}' lists them all.")
    if full in folder.packed:
        return packed_spectrum(full, folder.packed[full])
    return _dense_spectrum(full, folder.copied[full])


def _dense_spectrum(name: str, part: Part) -> Spectrum:
    info = part.info
    if len(info.shape) != 2:
        raise UsageError(f"{name!r} has shape {info.shape}, and only a matrix has singular values.")
    W = _read_floating(name, part)
    n_kept = int(torch.count_nonzero(W))
    return Spectrum(
        name=name,
        shape=info.shape,
        dtype=torch_name(info.dtype),
        layout="dense",
        n_kept=n_kept,
        sparsity=sparsity_of(n_kept, *W.shape),
        rank=None,
        sigma=singular_values(name, W),
        sigma_sparse=None,
        sigma_low_rank=None,
    )


def packed_spectrum(name: str, packed: Packed) -> Spectrum:
    """The spectrum of one weight of an open folder; cost and errors as `tensor_spectrum`."""
    values, A, B = (_read_floating(name, part) for part in (packed.values, packed.A, packed.B))
    try:
        S = unpack(values, packed.bitmask.read(), packed.shape[1])
    except MendError as err:
        raise located(err, f"{name} in {packed.values.shard.name}") from err
    S, A, B = (part.to(compute_dtype(part.dtype)) for part in (S, A, B))
    return Spectrum(
        name=name,
        shape=packed.shape,
        dtype=torch_name(packed.values.info.dtype),
        layout="packed",
        n_kept=packed.n_kept,
        sparsity=sparsity_of(packed.n_kept, *packed.shape),
        rank=packed.rank,
        sigma=singular_values(name, S + B @ A),
        sigma_sparse=singular_values(name, S),
        sigma_low_rank=singular_values(name, _core(B, A)),
    )


def _core(B: Tensor, A: Tensor) -> Tensor:
    """A (rank, rank) matrix with the singular values of ``B @ A``."""
    if A.shape[0] > min(B.shape[0], A.shape[1]):
        return B @ A
    small: Tensor = torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT
    return small


def singular_values(name: str, M: Tensor) -> Tensor:
    """Singular values of `M` in its compute dtype; those of an empty matrix are none.

    Raises
    ------
    NonFiniteError : `M`, which is of the weight `name`, is not finite.
    """
    M = M.to(compute_dtype(M.dtype))
    if not M.numel():
        return M.new_zeros(0)
    if not bool(torch.isfinite(M).all()):
        raise NonFiniteError(f"{name!r} holds NaN or infinity, so it has no singular values.")
    sigma: Tensor = torch.linalg.svdvals(M)
    return sigma


def _read_floating(name: str, part: Part) -> Tensor:
    if part.info.dtype not in FLOATING:
        raise UsageError(f"{name!r} has dtype {part.info.dtype}: a spectrum needs F64, F32, F16 or BF16.")
    return part.read()
