"""Leading singular triplets of a slowly changing matrix; nothing here knows about pruning.

Shapes: a matrix M (d_out, d_in) is approximated by ``left @ right``, left (d_out, r), right (r, d_in). The two
solvers share one interface, `LeadingTriplets`, so that an algorithm is written once and runs with either. The subspace
iteration also takes a stack of matrices (n, d_out, d_in), and everything that it gives has a leading dimension then.

Both also solve the weighted problem, the best approximation in the norm ``||M C||_F`` of a Gram matrix G = C @ C.T.
With the leading left singular vectors Q of M C it is ``Q @ (Q.T @ M)``, so that C itself is never undone; and Q spans
the leading eigenvectors of ``M G M.T``, for which M and the product M G, kept by the caller, are enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Solver = Literal["auto", "subspace", "exact"]
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # to read and to store
SOLVERS: tuple[Solver, ...] = ("auto", "subspace", "exact")

# Columns carried beyond the wanted rank. Measured on layers of SmolLM2-135M (rank 16 and 128, 50 iterations): with 8
# the final TLR objective is up to 4 % above that of a full SVD at rank 128, with 16 plus the look-ahead of
# refiners/tlr.py 1 % as a rule; more columns cost time and gain little.
OVERSAMPLING = 16

# With this share every eigenvalue of a damped Gram matrix is at least the mean of its diagonal, so that only a matrix
# that is no Gram matrix can still fail to factor.
DAMPING_LIMIT = 1.0

# Of `eigh`: how many rows are few for a CUDA device; and so few that it does a whole stack at once.
SMALL, BATCHED = 384, 32

# Of `truncate_svd` on CUDA. The error of an eigenvector is eps of float64 over the square of this ratio: here 2e-6,
# which is about what sums of 4096 products in float32 leave.
GRAM_FLOOR = 1e-5

T = TypeVar("T")
Generators = torch.Generator | Sequence[torch.Generator]  # of a matrix, or one for each of a stack


class Triplets(NamedTuple):
    """The leading r singular triplets of M: ``M ≈ left @ right``.

    Attributes
    ----------
    left : (d_out, r), orthonormal columns.
    right : (r, d_in), ``left.T @ M``. Its rows are orthogonal (with a Gram matrix: in its inner product); the norm of
        row i is the i-th singular value.
    energy_frac : 0-dim tensor, ``||left @ right||^2 / ||M||^2`` in the norm of the problem; 1 for M = 0.
    weighted : (r, d_in), ``left.T @ MG = right @ G``; `right` itself without a Gram matrix.
    """

    left: Tensor
    right: Tensor
    energy_frac: Tensor
    weighted: Tensor


class LeadingTriplets(Protocol):
    """A way to get leading triplets of a sequence of matrices of one shape.

    `MG` is ``M @ G`` for the norm of a Gram matrix G, None for the Frobenius norm; `norm` is ``||M||_F``, which saves a
    pass over M if the caller knows it.
    """

    def leading(self, M: Tensor, rank: int, MG: Tensor | None = None, norm: Tensor | None = None) -> Triplets:
        """Leading `rank` triplets of `M` as one cheap step of a sequence may give them."""
        ...

    def final(self, M: Tensor, rank: int, MG: Tensor | None = None) -> Triplets:
        """Leading `rank` triplets of `M`, taken with the care that a stored result deserves."""
        ...


def compute_dtype(dtype: torch.dtype, requested: torch.dtype | None = None) -> torch.dtype:
    """Dtype to compute in: `requested` if given, else float64 for float64 and float32 for everything smaller."""
    if requested is not None:
        return requested
    return torch.float64 if dtype == torch.float64 else torch.float32


def all_finite(x: Tensor) -> bool:
    """Whether `x` holds no NaN and no infinity."""
    # A sum is 50 times faster than isfinite().all() and NaN and infinity always show in it; only a sum that overflows
    # by itself needs the second look. In pieces, as torch converts all that it sums before it does.
    dtype = compute_dtype(x.dtype)
    pieces = torch.split(x.reshape(-1), 2**20) if dtype != x.dtype and x.device.type == "cpu" else (x,)
    return bool(torch.isfinite(torch.stack([piece.sum(dtype=dtype) for piece in pieces]).sum())) or bool(
        torch.isfinite(x).all()
    )


def frobenius(x: Tensor, found: float | None = None) -> float:
    """``||x||_F``; in float64 where the squares of `x` may have left the range of its own dtype.

    Parameters
    ----------
    x : of any shape.
    found : the norm as that dtype gives it, if the caller has it.
    """
    norm = float(torch.linalg.vector_norm(x)) if found is None else found
    finfo = torch.finfo(x.dtype)
    if math.sqrt(x.numel() * finfo.tiny / finfo.eps) < norm < math.inf:
        return norm  # what underflowed would have been less than eps of it
    return math.hypot(*(float(torch.linalg.vector_norm(piece.double())) for piece in torch.split(x.reshape(-1), 2**20)))


def with_damping(attempt: Callable[[float], T | None], damping: float, smallest: float) -> tuple[T | None, float]:
    """Try to factor a Gram matrix with more and more damping.

    Parameters
    ----------
    attempt : a share of the mean of the diagonal -> the factor with that share added to the diagonal, None if there is
        none.
    damping : the first share; then tenfold, from at least `smallest`, up to `DAMPING_LIMIT`.

    Returns
    -------
    The factor, or None if even the limit did not help, and the last share tried.
    """
    while True:
        found = attempt(damping)
        if found is not None or damping >= DAMPING_LIMIT:
            return found, damping
        damping = min(max(10 * damping, smallest), DAMPING_LIMIT)


def truncate_svd(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-`rank` approximation of `M` in Frobenius norm, by a full SVD.

    Parameters
    ----------
    M : (d_out, d_in), float32 or float64. Not modified.
    rank : int, 0 <= rank <= min(d_out, d_in).

    Returns
    -------
    U, sigma, Vh : (d_out, rank), (rank,), (rank, d_in); sigma non-increasing. Signs are LAPACK's.

    Notes
    -----
    Cost O(d_out * d_in * min(d_out, d_in)) flops with a large constant (LAPACK gesdd). On CUDA a float32 matrix goes by
    the eigenvectors of its smaller Gram matrix in float64, which holds the squares of float32 numbers: 8 times faster
    than cuSOLVER's SVD (H100, 4096 x 4096: 0.13 against 1.1 s). Directions below `GRAM_FLOOR` of the largest singular
    value are too small for that; where one is asked for, cuSOLVER's SVD takes over.
    """
    if M.is_cuda and M.dtype == torch.float32 and rank > 0 and M.numel():
        found = _triplets_by_gram(M, rank)
        if found is not None:
            return found
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank], sigma[:rank], Vh[:rank]


def _triplets_by_gram(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """`truncate_svd` by an eigendecomposition in float64; None if a wanted singular value is too small for it."""
    wide = M.double()
    tall = M.shape[0] >= M.shape[1]
    gram = wide.T @ wide if tall else wide @ wide.T
    energies, vectors = torch.linalg.eigh(gram)
    sigma = energies[-rank:].flip(0).clamp_min(0).sqrt()
    if not bool(sigma[-1] > GRAM_FLOOR * sigma[0]):
        return None
    near = vectors[:, -rank:].flip(1)
    far = (wide @ near if tall else wide.T @ near) / sigma
    U, V = (far, near) if tall else (near, far)
    return U.to(M.dtype), sigma.to(M.dtype), V.T.to(M.dtype).contiguous()


def eigh(H: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric `H` (d, d), or of a stack of them, on its device.

    Notes
    -----
    Up to `SMALL` rows the CPU is faster than cuSOLVER, the way there and back included: 1.0 against 2.5 ms for 144, 3.5
    against 5.9 for 272 (one thread, H100). Of stacks too, up to `BATCHED` rows excepted: 16 matrices of 32 rows take
    1.0 and 0.24 ms, of 48 rows 2.0 and 11.5, of 144 rows 19 and 40.
    """
    n_rows = H.shape[-1]
    if H.is_cuda and n_rows <= SMALL and (H.ndim == 2 or n_rows > BATCHED):
        energies, vectors = torch.linalg.eigh(H.cpu())
        return energies.to(H.device), vectors.to(H.device)
    energies, vectors = torch.linalg.eigh(H)
    return energies, vectors


def inverse_factor(H: Tensor) -> Tensor | None:
    """U upper triangular with ``inv(H) = U.T @ U``, for a symmetric `H` (d, d); None if it is not positive definite.

    Notes
    -----
    Reversed in both directions, a lower Cholesky factor becomes an upper one, as does its inverse: one factorization
    and one triangular inverse, 2/3 d^3 multiply-adds.
    """
    lower, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    if bool(info):
        return None
    identity = torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
    U: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return U


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the singular values split evenly, so that both factors fit a small storage dtype."""
    root = torch.linalg.vector_norm(right, dim=-1).sqrt()
    return left * root.unsqueeze(-2), right / root.clamp_min(torch.finfo(right.dtype).tiny).unsqueeze(-1)


def orthonormalize(Y: Tensor) -> Tensor:
    """Orthonormal basis of the columns of `Y` (…, m, c), c <= m; columns of zeros give columns of zeros.

    Notes
    -----
    Cholesky QR on columns scaled to norm 1, with a shift of 4 c eps on the diagonal of their Gram matrix so that
    dependent columns do not break the factorization (shifted CholeskyQR: Fukaya et al. 2020, arXiv:1809.11085,
    Section 2). 2 m c^2 flops, all in matrix products; Householder QR takes over if the factorization still fails.
    Orthogonality is good to about eps times the squared condition number of the scaled columns, enough for a block
    that is only multiplied by a slowly changing matrix again.
    """
    finfo = torch.finfo(Y.dtype)
    Y = Y / torch.linalg.vector_norm(Y, dim=-2, keepdim=True).clamp_min(finfo.tiny)
    gram = Y.mT @ Y
    gram.diagonal(dim1=-2, dim2=-1).add_(4 * finfo.eps * Y.shape[-1])
    factor, info = torch.linalg.cholesky_ex(gram)
    failed = info != 0
    some = bool(failed.any())
    if some and Y.ndim == 2:
        return householder(Y)
    basis: Tensor = torch.linalg.solve_triangular(factor, Y.mT, upper=False).mT
    if some:
        basis[failed] = householder(Y[failed])
    return basis


def householder(Y: Tensor) -> Tensor:
    """Orthonormal basis of the columns of `Y` (…, m, c) by Householder QR: orthogonal to eps, 4 m c^2 slower flops."""
    basis: Tensor = torch.linalg.qr(Y).Q
    return basis


class FullSVD:
    """The reference: a full SVD per call.

    Parameters
    ----------
    root : (d_in, d_in), C of the Gram matrix ``G = C @ C.T``; None for the Frobenius norm.
    """

    def __init__(self, root: Tensor | None = None) -> None:
        self._root = root

    def leading(self, M: Tensor, rank: int, MG: Tensor | None = None, norm: Tensor | None = None) -> Triplets:
        """Exact leading `rank` triplets of `M` (d_out, d_in)."""
        whitened = M if self._root is None else M @ self._root
        U, sigma, Vh = truncate_svd(whitened, rank)
        total = torch.linalg.vector_norm(whitened).square()
        energy = torch.where(total > 0, sigma.square().sum() / total, torch.ones_like(total))
        if MG is None:
            right = sigma[:, None] * Vh
            return Triplets(U, right, energy, right)
        return Triplets(U, U.T @ M, energy, U.T @ MG)

    final = leading


class SubspaceIteration:
    """Warm-started block subspace iteration: one power step per call on a block kept from the call before.

    Right when M changes little from call to call, which is what alternating projections do. Each step costs two
    products of M with a block of ``c = rank + oversampling`` columns (4 d_out d_in c flops), an orthonormalization and
    a c x c symmetric eigenproblem (Rayleigh-Ritz), where a full SVD costs some 20 d_out d_in min(d_out, d_in). With a
    Gram matrix it is three products, and a power step with ``M G M.T``. In the columns that are new to the block,
    directions whose singular value is below about sqrt(eps) of the first are lost.

    Parameters
    ----------
    d_in : columns of every M.
    max_columns : largest number of block columns, <= min(d_out, d_in).
    lookahead : columns to carry beyond ``rank + OVERSAMPLING``, so that they are warm when a growing rank needs them.
    like : tensor that gives dtype and device.
    generator : source of the start block, on that device; for a stack one for each of its matrices.

    References
    ----------
    .. [1] Halko, Martinsson, Tropp (2011), SIAM Review 53(2), Algorithm 4.4 (one power step, here spread over calls)
       and Section 4.2 (oversampling).
    .. [2] Saad (2011), Numerical Methods for Large Eigenvalue Problems, Section 5.2 (subspace iteration with
       projection).
    """

    def __init__(self, d_in: int, max_columns: int, *, lookahead: int = 0, like: Tensor, generator: Generators) -> None:
        def noise(source: torch.Generator) -> Tensor:
            return torch.randn(d_in, max_columns, generator=source, dtype=like.dtype, device=like.device)

        if isinstance(generator, torch.Generator):
            fresh = noise(generator)
        else:
            fresh = torch.stack([noise(source) for source in generator])
        self._fresh = fresh / torch.linalg.vector_norm(fresh, dim=-2, keepdim=True)
        self._block = self._fresh[..., :0]
        self._lookahead = lookahead

    def leading(self, M: Tensor, rank: int, MG: Tensor | None = None, norm: Tensor | None = None) -> Triplets:
        """Approximate leading `rank` triplets of `M` (…, d_out, d_in), from the block of the call before."""
        if not self._block.shape[-1]:
            return self._iterate(M, rank, MG, 3, norm)  # the block starts from noise
        # Where the block spans over half of the matrix, the singular values it leaves out are close to those it holds
        # and one step lags: at rank 128 of 192 the final TLR objective was up to 4.4 % above exact, with two steps 3 %.
        spans_half = 2 * self._fresh.shape[-1] > min(M.shape[-2:])
        return self._iterate(M, rank, MG, 2 if spans_half else 1, norm)

    def final(self, M: Tensor, rank: int, MG: Tensor | None = None) -> Triplets:
        """Three more steps, the last of them with Householder QR."""
        return self._iterate(M, rank, MG, 3, careful=True)

    def _iterate(
        self,
        M: Tensor,
        rank: int,
        MG: Tensor | None,
        n_steps: int,
        norm: Tensor | None = None,
        careful: bool = False,
    ) -> Triplets:
        n_columns = min(rank + OVERSAMPLING + self._lookahead, self._fresh.shape[-1])
        V = self._block
        if V.shape[-1] < n_columns:
            V = torch.cat([V, self._fresh[..., V.shape[-1] : n_columns]], dim=-1)
        for step in range(n_steps):
            Y = M @ V
            Q = householder(Y) if careful and step == n_steps - 1 else orthonormalize(Y)
            H = (M if MG is None else MG).mT @ Q
            if step < n_steps - 1:
                V = self._normalized(H)
        Z = H if MG is None else M.mT @ Q
        # Rayleigh-Ritz: rotate the block so that its columns are the singular directions, largest first.
        energies, E = eigh(Z.mT @ H)
        E = E.flip(-1)
        Z = Z @ E
        H = Z if MG is None else H @ E
        self._block = self._normalized(H)
        if MG is not None:
            total = torch.dot(M.reshape(-1), MG.reshape(-1))
        else:
            total = (torch.linalg.vector_norm(M, dim=(-2, -1)) if norm is None else norm).square()
        energy = torch.where(total > 0, energies.flip(-1)[..., :rank].sum(dim=-1) / total, torch.ones_like(total))
        return Triplets(Q @ E[..., :rank], Z[..., :rank].mT, energy, H[..., :rank].mT)

    def _normalized(self, Z: Tensor) -> Tensor:
        """Columns of norm 1; a column that vanished (M of low rank) is replaced by a fresh random one."""
        norms = torch.linalg.vector_norm(Z, dim=-2, keepdim=True)
        usable = norms > torch.finfo(Z.dtype).tiny
        return torch.where(usable, Z / torch.where(usable, norms, 1), self._fresh[..., : Z.shape[-1]])


def make_solver(
    solver: Solver,
    shape: torch.Size,
    rank: int,
    *,
    lookahead: int = 0,
    root: Tensor | None = None,
    like: Tensor,
    generator: Generators,
) -> LeadingTriplets:
    """The solver for matrices or stacks of `shape` and ranks up to `rank`; `root` is that of `FullSVD`.

    "auto" takes the subspace iteration unless its block would span the whole matrix, where a full SVD is as cheap; with
    a Gram matrix half of it. There little error is left, so that what the iteration lags behind shows: 192 x 576 at
    rank 128 ends at twice the objective of exact, in half its time.
    """
    if not takes_subspace(solver, shape, rank, weighted=root is not None):
        return FullSVD(root)
    columns = min(rank + OVERSAMPLING, *shape[-2:])
    return SubspaceIteration(shape[-1], columns, lookahead=lookahead, like=like, generator=generator)


def takes_subspace(solver: Solver, shape: torch.Size, rank: int, *, weighted: bool = False) -> bool:
    """Whether `make_solver` takes the subspace iteration; `weighted` by a Gram matrix."""
    smallest = min(shape[-2:])
    columns = min(rank + OVERSAMPLING, smallest)
    spans = 2 * columns > smallest if weighted else columns >= smallest
    return solver != "exact" and not (solver == "auto" and spans)
