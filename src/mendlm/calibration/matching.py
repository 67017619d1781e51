"""Block matching: what a compressed block stores is tuned until the block gives the outputs of the dense one.

With the masks fixed, the kept values of every S, every A and B, and the norms and biases of the block are one set of
parameters; the squared error of the block's outputs on calibration windows is their loss. Windows held out decide which
step is kept, and whether any is. The tuning of layers or blocks on their own outputs is that of BRECQ (Li et al. 2021,
arXiv:2102.05426, Section 3.2), there for quantization.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mendlm.calibration.activations import Activations
from mendlm.calibration.outputs import Forward, output_error, run_with, token_errors
from mendlm.errors import UsageError
from mendlm.execution.tensor import dense_weight
from mendlm.linalg import all_finite
from mendlm.packing import unpack, unpack_mask

if TYPE_CHECKING:
    from mendlm.config import Matching

EVALUATE_EVERY = 25  # steps; an evaluation costs a forward pass of the windows held out
PATIENCE = 4  # evaluations without a lower loss after which the windows held out have nothing more to say
WARMUP_FRAC = 0.1  # of the steps: Adam's first ones know nothing about the size of the gradients
_BETAS = (0.9, 0.98)  # a second moment that a hundred steps are enough to estimate
_EPS = 1e-20  # gradients of a mean over many outputs are tiny, and entries off the mask have none at all
# float16 has nothing between 0 and 6e-8, and gradients of a mean over many tokens lie there. They are multiplied by the
# largest of these powers, from the first down to 1, with which none overflows; a power of 2 rounds nothing.
_LARGEST_SCALE, _SCALE_STEP = 2.0**48, 2.0**4

_RUN = 16  # tokens: too many to stand in two places of a text by chance
_FACTOR = np.uint64(6364136223846793005)  # odd and large: Knuth's, of MMIX


@dataclass(frozen=True)
class PackedWeight:
    """A compressed weight of the block.

    Attributes
    ----------
    parts : values, bitmask, A and B, storage dtype, CPU.
    d_in : columns.
    transposed : whether the module wants it as (d_in, d_out).
    """

    parts: tuple[Tensor, Tensor, Tensor, Tensor]
    d_in: int
    transposed: bool = False

    def dense(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weight as the module has it, merged as the merged runtime does."""
        W = dense_weight([part.to(device) for part in self.parts], self.d_in, dtype)
        return W.T if self.transposed else W


@dataclass(frozen=True)
class State:
    """What is stored of a block: in storage dtypes, on the CPU.

    Attributes
    ----------
    weights : path of the module in the block -> its compressed weight.
    vectors : name of the parameter in the block -> norm or bias.
    """

    weights: Mapping[str, PackedWeight]
    vectors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Match:
    """What came out.

    Attributes
    ----------
    state : to store; the very one given if no step had a lower loss.
    loss_before, loss_after : mean over the tokens of the windows held out of ``||out - target||^2 / ||target||^2``, of
        what is stored.
    n_steps : steps taken; fewer than asked for if the windows held out stopped them.
    best_step : the one that `state` is of; 0 is the state given.
    """

    state: State
    loss_before: float
    loss_after: float
    n_steps: int
    best_step: int


def split_windows(n_sequences: int, held_out: float) -> int:
    """How many windows to tune on; the others, the last ones and at least one, are held out.

    Raises
    ------
    UsageError : there is only one window.
    """
    if n_sequences < 2:
        raise UsageError(
            f"block matching tunes on some windows and holds out others, got {n_sequences} in all. "
            "Raise --n-sequences to 2 at least."
        )
    return n_sequences - min(n_sequences - 1, max(1, round(held_out * n_sequences)))


def shared_frac(ids: Tensor, n_train: int) -> float:
    """Share of what is held out of the windows `ids` (n_sequences, seqlen) that stands in the first `n_train`, too.

    Of their runs of `_RUN` tokens, compared by a hash: random windows of one text overlap.
    """
    windows = ids.numpy().astype(np.uint64)
    n_runs = max(windows.shape[1] - _RUN + 1, 1)
    runs = np.zeros((len(windows), n_runs), np.uint64)
    for place in range(windows.shape[1] - n_runs + 1):
        runs = runs * _FACTOR + windows[:, place : place + n_runs]  # modulo 2 ** 64
    return float(np.isin(runs[n_train:], runs[:n_train]).mean())


def batch_sizes(n_sequences: int, matching: Matching) -> set[int]:
    """The numbers of windows that run together while a block is matched."""
    n_train = split_windows(n_sequences, matching.held_out)
    size = min(matching.batch_size, n_train)
    return {size, min(size, n_sequences - n_train), (n_sequences - n_train) % size or size}


def match_block(
    block: nn.Module,
    forward: Forward,
    state: State,
    inputs: Activations,
    targets: Activations,
    matching: Matching,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Match:
    """Tune what a block stores so that its outputs for `inputs` come close to `targets`.

    Parameters
    ----------
    block : loaded; parameters that are not in `state` are used as they are. Not modified.
    forward : called with something that is called like the block and hidden states (batch, seqlen, hidden); its output.
    state : where to start.
    inputs, targets : (n_sequences, seqlen, hidden) each, n_sequences >= 2.
    matching : how long and how fast.
    device, dtype : where and in which the block runs. Parameters and optimiser are float32.
    generator : CPU; decides which windows make up a batch.

    Returns
    -------
    Match

    Raises
    ------
    UsageError : fewer than two windows.

    Notes
    -----
    A step costs a forward and a backward pass of `matching.batch_size` windows through the block. Memory: the weights
    of the block five times over in float32, and the activations of a batch that its backward pass needs. The rate of a
    parameter is ``matching.lr`` times its root mean square, rises over the first `WARMUP_FRAC` of the steps and falls
    to 0 along a cosine; parameters that are zero throughout stay as they are.
    """
    n_train = split_windows(inputs.n_sequences, matching.held_out)
    size = min(matching.batch_size, n_train)
    held_out = torch.split(torch.arange(n_train, inputs.n_sequences), size)

    def loss_of(candidate: State) -> float:
        parameters = _installed(candidate, device, dtype)
        if not all(all_finite(tensor) for tensor in parameters.values()):
            return math.inf
        states = ((inputs.select(rows), targets.select(rows)) for rows in held_out)
        return output_error(block, forward, parameters, states, device)

    tuned = _Tuned(state, device)
    before = best_loss = loss_of(state)
    best, best_step, n_steps, waited = state, 0, 0, 0
    groups = tuned.groups(matching.lr)
    if not groups:
        return Match(state, before, before, 0, 0)
    optimiser = torch.optim.Adam(groups, betas=_BETAS, eps=_EPS)
    scale = _LARGEST_SCALE if dtype == torch.float16 else 1.0

    def differentiate(rows: Tensor) -> bool:
        """Leave the gradients of the loss on some windows with the parameters; False if it, or one, is not finite."""
        nonlocal scale
        with torch.enable_grad():  # also for a caller who wants none
            out = run_with(block, forward, tuned.parameters(dtype), inputs.select(rows).to(device))
            loss = token_errors(out, targets.select(rows).to(device)).mean()
            if not math.isfinite(loss.item()):
                return False
            while True:
                optimiser.zero_grad()
                torch.autograd.backward(loss * scale, retain_graph=scale > 1)
                if dtype != torch.float16 or _unscale(optimiser, scale):
                    return True
                if scale == 1:
                    return False
                scale /= _SCALE_STEP

    rates = [group["lr"] for group in optimiser.param_groups]
    batches = _batches(n_train, size, generator)
    for step in range(1, matching.n_steps + 1):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * _schedule(step, matching.n_steps)
        if not differentiate(next(batches)):
            break
        optimiser.step()
        n_steps = step
        if step % EVALUATE_EVERY and step != matching.n_steps:
            continue
        candidate = tuned.stored()
        loss_now = loss_of(candidate)
        if loss_now < best_loss:
            best, best_loss, best_step, waited = candidate, loss_now, step, 0
        else:
            waited += 1
            if waited == PATIENCE:
                break
    return Match(best, before, best_loss, n_steps, best_step)


class _Tuned:
    """The parameters while they are tuned, float32."""

    def __init__(self, state: State, device: torch.device) -> None:
        self._start = state
        self._masks: dict[str, Tensor] = {}
        self._factors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for path, weight in state.weights.items():
            values, bitmask, A, B = (part.to(device) for part in weight.parts)
            self._masks[path] = unpack_mask(bitmask, weight.d_in)
            S = unpack(values, bitmask, weight.d_in)
            self._factors[path] = (_leaf(S), _leaf(A), _leaf(B))
        self._vectors = {name: _leaf(vector.to(device)) for name, vector in state.vectors.items()}

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameter groups, each with its own rate; those that have no size are left out."""
        found = []
        for path, factors in self._factors.items():
            n_kept = int(self._masks[path].sum())
            for tensor, n in zip(factors, (n_kept, factors[1].numel(), factors[2].numel()), strict=True):
                found.append((tensor, n))
        found += [(vector, vector.numel()) for vector in self._vectors.values()]
        sizes = [(tensor, float(tensor.detach().square().sum() / max(n, 1)) ** 0.5) for tensor, n in found]
        return [{"params": [tensor], "lr": lr * rms} for tensor, rms in sizes if rms > 0]

    def parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Name in the block -> tensor that depends on what is tuned."""
        named = {name: vector.to(dtype) for name, vector in self._vectors.items()}
        for path, (S, A, B) in self._factors.items():
            W = torch.addmm(S * self._masks[path], B, A).to(dtype)
            named[f"{path}.weight"] = W.T if self._start.weights[path].transposed else W
        return named

    def stored(self) -> State:
        """Rounded to what is stored."""
        weights = {}
        for path, (S, A, B) in self._factors.items():
            old = self._start.weights[path]
            new = (S.detach()[self._masks[path]], None, A.detach(), B.detach())
            parts = [p if q is None else q.to(p.dtype).cpu().clone() for p, q in zip(old.parts, new, strict=True)]
            weights[path] = PackedWeight((parts[0], parts[1], parts[2], parts[3]), old.d_in, old.transposed)
        vectors = {
            name: vector.detach().to(self._start.vectors[name].dtype).cpu().clone()
            for name, vector in self._vectors.items()
        }
        return State(weights, vectors)


def _installed(state: State, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name in the block -> what a state puts there."""
    named = {name: vector.to(device, dtype) for name, vector in state.vectors.items()}
    return named | {f"{path}.weight": weight.dense(device, dtype) for path, weight in state.weights.items()}


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().float().clone().requires_grad_(True)


def _unscale(optimiser: torch.optim.Optimizer, scale: float) -> bool:
    """Divide all gradients by `scale` if they are finite; whether they are."""
    found = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    if not all(all_finite(gradient) for gradient in found):
        return False
    for gradient in found:
        gradient.div_(scale)
    return True


def _schedule(step: int, n_steps: int) -> float:
    """Share of the rate for a step from 1 to n_steps."""
    warmup = WARMUP_FRAC * n_steps
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(n_steps - warmup, 1)))


def _batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of `size` of the numbers below `n`, in a new order for each pass over them."""
    while True:
        yield from torch.split(torch.randperm(n, generator=generator)[: n - n % size], size)
