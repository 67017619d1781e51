"""Experts of a mixture, one module for each projection of each expert.

transformers 5 holds all experts of a block in two 3-D parameters, `gate_up_proj` (E, 2 I, H) and `down_proj` (E, H, I).
Compressed experts differ in their number of kept entries, and calibration wants the inputs of each, so both need them
apart: `SparseLowRankExperts` computes the same function from separate modules and can turn back into the original.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mendlm.errors import UsageError
from mendlm.families import EXPERT_LAYOUTS, STACKED_LAYOUT, ExpertLayout, expert_name, split_expert

_FUSED = STACKED_LAYOUT.names


class SparseLowRankExperts(nn.Module):
    """``sum over chosen experts e of weight_e * down_e(act(gate_e(x)) * up_e(x))``.

    The children "0", "1", … hold the projections of an expert under their names in the checkpoint: first `nn.Linear`,
    and any of them can be replaced by a `SparseLowRankLinear`.

    Parameters
    ----------
    fused : experts of transformers (`is_fused_experts`). Its parameters move over here and it is kept for its gating
        and for `fuse`; do not use it meanwhile.
    layout : names of the projections.
    stacked : those of them that stay 3-D parameters, for tensors that are stored so; `STACKED_LAYOUT` only.

    Raises
    ------
    UsageError : `fused` computes something else, or keeps its weights in another way.

    Notes
    -----
    Experts run one after the other, each on the tokens that chose it, as in the eager implementation of transformers;
    its grouped implementations differ in the order of sums only.
    """

    _fused: Any

    def __init__(self, fused: nn.Module, layout: ExpertLayout, stacked: Collection[str] = ()) -> None:
        super().__init__()
        weights = _fused_weights(fused)
        self.num_experts = weights["down_proj"].shape[0]
        self.layout = layout
        object.__setattr__(self, "_fused", fused)  # not a child: it has no weights of its own any more
        for name, child in fused.named_children():
            self.add_module(name, child)
        for name in stacked:
            self.register_parameter(name, weights[name])
        for index in range(self.num_experts):
            matrices = _matrices(weights, index, layout)
            expert = {name: _linear(W) for name, W in matrices.items() if name not in stacked}
            self.add_module(str(index), nn.ModuleDict(expert))
        for name in _FUSED:
            delattr(fused, name)
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(n_tokens, H) -> (n_tokens, H) for the experts (n_tokens, k) chosen of each token and their weights."""
        out = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            if not 0 <= index < self.num_experts:  # "none", where experts are spread over several devices
                continue
            token, place = torch.where(top_k_index == index)
            y = self._expert(index, hidden_states[token]) * top_k_weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def fuse(self) -> nn.Module:
        """The module that this one was made of, with dense weights; every projection must be dense or merged.

        This module is empty afterwards. Needs the memory of one of the two 3-D parameters on top.
        """
        fused: nn.Module = self._fused
        for name, parts in zip(_FUSED, (self.layout.gate_up, (self.layout.down,)), strict=True):
            stacked = self._parameters.pop(name, None)
            fused.register_parameter(name, self._stacked(parts) if stacked is None else stacked)
        fused.train(self.training)
        return fused

    def _expert(self, index: int, x: Tensor) -> Tensor:
        gate_up = torch.cat([self._project(index, name, x) for name in self.layout.gate_up], dim=-1)
        return self._project(index, self.layout.down, self._fused._apply_gate(gate_up))

    def _project(self, index: int, name: str, x: Tensor) -> Tensor:
        stacked = self._parameters.get(name)
        if stacked is not None:
            return nn.functional.linear(x, stacked[index])
        y: Tensor = self._projections(index)[name](x)
        return y

    def _projections(self, index: int) -> Any:
        return self._modules[str(index)]

    def _stacked(self, names: tuple[str, ...]) -> nn.Parameter:
        """Weights (E, d_out, d_in) of the projections `names`, one above the other; they are removed here."""
        first = [self._projections(0)[name].weight for name in names]
        shape = (self.num_experts, sum(W.shape[0] for W in first), first[0].shape[1])
        out = torch.empty(shape, dtype=first[0].dtype, device=first[0].device)
        with torch.no_grad():
            for index in range(self.num_experts):
                expert = self._projections(index)
                out[index] = torch.cat([expert.pop(name).weight for name in names])
        return nn.Parameter(out)


def is_fused_experts(module: nn.Module | None) -> bool:
    """Whether `SparseLowRankExperts` can stand for this module.

    It must be one of those that transformers can run by several implementations, so that its forward is known: two 3-D
    parameters, gated, not transposed, neither interleaved nor with biases or norms.
    """
    if module is None or {name for name, _ in module.named_parameters(recurse=False)} != set(_FUSED):
        return False
    gate_up, down = (getattr(module, name).shape for name in _FUSED)
    fits = len(gate_up) == len(down) == 3 and gate_up == (down[0], 2 * down[2], down[1])
    flags = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    plain = all(getattr(module, flag, None) is value for flag, value in flags.items())
    return fits and plain and not getattr(module, "has_post_expert_norm", False) and hasattr(module, "_apply_gate")


def expert_layout(projections: Collection[str], *, stacked: bool) -> ExpertLayout:
    """The layout that has all these projections; the stacked one if it is known to be that.

    Raises
    ------
    UsageError : there is none.
    """
    for layout in (STACKED_LAYOUT,) if stacked else EXPERT_LAYOUTS:
        if set(projections) <= set(layout.names):
            return layout
    known = "; ".join(", ".join(layout.names) for layout in EXPERT_LAYOUTS)
    raise UsageError(f"experts with projections {', '.join(sorted(projections))} are not known. Known: {known}.")


def unfuse(root: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Replace, in place, the fused experts in `root` whose weights are among `names`.

    Parameters
    ----------
    root : a model or a block, on any device (also meta).
    names : of dense tensors of the checkpoint as `root` calls them (`families.module_name`), others included:
        ``mlp.experts.3.w1.weight`` or, stacked, ``mlp.experts.gate_up_proj``. They decide the names of the children.

    Returns
    -------
    Paths of the modules that were replaced; ``PATH.3.w1`` is an `nn.Linear` now, for stacked tensors
    ``PATH.3.gate_up_proj``. `split_stacked` cuts a stacked tensor accordingly.

    Raises
    ------
    UsageError : they are stored in a way that is not known.
    """
    found: dict[str, set[str]] = defaultdict(set)
    stacked = set()
    for name in names:
        expert = split_expert(name.removesuffix(".weight"))
        path, _, leaf = name.rpartition(".")
        if expert is not None:
            found[expert[0]].add(expert[2])
        elif leaf in _FUSED:
            found[path].add(leaf)
            stacked.add(path)
    replaced = []
    for path, projections in found.items():
        module = _submodule(root, path)
        if module is None or isinstance(module, nn.ModuleList | SparseLowRankExperts):
            continue  # apart already
        layout = expert_layout(projections, stacked=path in stacked)
        root.set_submodule(path, SparseLowRankExperts(module, layout))
        replaced.append(path)
    return tuple(replaced)


def split_stacked(name: str, weights: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Matrices (d_out, d_in) of ``….experts.down_proj`` (E, d_out, d_in), named ``….experts.3.down_proj.weight``."""
    return ((expert_name(name, index), W) for index, W in enumerate(weights))


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _fused_weights(fused: nn.Module) -> dict[str, nn.Parameter]:
    if not is_fused_experts(fused):
        raise UsageError(
            f"{type(fused).__name__} does not keep its experts as (E, 2 I, H) and (E, H, I) without biases, and mendlm "
            "knows no other way. Leave the experts out with --exclude."
        )
    return {name: fused.get_parameter(name) for name in _FUSED}


def _matrices(weights: Mapping[str, nn.Parameter], index: int, layout: ExpertLayout) -> dict[str, Tensor]:
    """(d_out, d_in) views of one expert's projections by name."""
    gate_up, down = (weights[name].detach()[index] for name in _FUSED)
    return dict(zip(layout.names, (*gate_up.chunk(len(layout.gate_up)), down), strict=True))


def _linear(W: Tensor) -> nn.Linear:
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta", dtype=W.dtype)
    linear.weight = nn.Parameter(W)
    return linear
