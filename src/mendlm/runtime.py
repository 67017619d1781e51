"""`SparseLowRankLinear`: a linear layer whose weight is S + B @ A, in one of several runtimes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mendlm.checkpoints.plan import BITMASK, LORA_A, LORA_B, VALUES, packed_shapes
from mendlm.decomposition import merge
from mendlm.errors import CheckpointError, UsageError
from mendlm.kernels import packed as kernels
from mendlm.kernels import semi_structured
from mendlm.names import lookup
from mendlm.packing import check_packed, find_row_starts, half_of, scatter, unpack_mask

Runtime = Literal["merged", "factored", "packed", "semi-structured"]

# What each runtime keeps in memory, and so what it is for.
RUNTIMES: dict[str, str] = {
    "merged": "dense W' = S + B @ A: the speed of the original model, no sparsity left",
    "factored": "dense S beside A and B: exact, trainable factors",
    "packed": "S stays packed: least memory; a kernel multiplies few tokens, for many S is unpacked in every call",
    "semi-structured": "2:4 S for the sparse tensor cores of a CUDA device, bfloat16 or float16; not trainable",
}


def resolve_runtime(name: str) -> str:
    """The runtime that `name` stands for; "auto" is the merged one, on no device slower than another.

    Raises
    ------
    UsageError : unknown name.
    """
    if name == "auto":
        return "merged"
    lookup({**RUNTIMES, "auto": ""}, name, "runtime")
    return name


def runtime_on(name: str, layers: Iterable[tuple[str, Tensor, int]], dtype: torch.dtype, device: torch.device) -> str:
    """The runtime that `name` stands for, on a device that is known to have it.

    Parameters
    ----------
    name : a runtime or "auto".
    layers : path, bitmask (d_out, ceil(d_in / 8)) uint8 and d_in of every compressed layer; read for "semi-structured"
        only, and no further than the first layer that does not allow it.
    dtype : of the weights in memory.
    device : where they will be.

    Raises
    ------
    UsageError : unknown name, or "semi-structured" where a layer does not allow it; it is named.
    """
    resolved = resolve_runtime(name)
    if resolved == "semi-structured":
        for path, bitmask, d_in in layers:
            reason = semi_structured.obstacle(bitmask, d_in, dtype, device)
            if reason is not None:
                raise UsageError(f"{path!r} cannot be semi-structured: {reason}.")
    return resolved


class SparseLowRankLinear(nn.Module):
    """``y = x (S + B A)ᵀ + bias``.

    A new module is in the packed runtime with uninitialised tensors, named as in the checkpoint, so that a loader can
    fill them: `weight_values` (n_kept,), `weight_bitmask` (d_out, ceil(d_in / 8)) uint8, `lora_A` (rank, d_in),
    `lora_B` (d_out, rank). `set_runtime` then turns it into the runtime wanted. A and B can be trained in the factored
    and packed runtimes; so can S, which is frozen at first: its zeros get no gradient.

    Parameters
    ----------
    in_features, out_features : d_in, d_out.
    n_kept : kept entries of S.
    rank : of L = B @ A.
    bias : whether there is one.
    dtype, device : of the parameters.
    """

    in_features: int
    out_features: int
    n_kept: int
    rank: int
    runtime: str
    _half_of: int  # for the kernels, see `mendlm.packing.half_of`
    bias: nn.Parameter | None
    S: nn.Parameter  # dense, in the factored runtime
    _shown: Tensor | None = None
    _sparse: Tensor  # S in the semi-structured runtime, and B beside it if `lora_B` is no parameter
    _trains_b: bool  # what B's `requires_grad` was then
    row_starts: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        n_kept: int,
        rank: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        shapes = packed_shapes(out_features, in_features, n_kept, rank)
        tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        tensors[BITMASK] = torch.empty(shapes[BITMASK], dtype=torch.uint8, device=device)
        offset = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self._hold(tensors, in_features, offset)

    @classmethod
    def holding(cls, tensors: Mapping[str, Tensor], in_features: int, bias: nn.Parameter | None) -> Self:
        """A layer in the packed runtime of given tensors (named as in the checkpoint), which are not copied."""
        layer = cls.__new__(cls)
        layer._hold(tensors, in_features, bias)
        return layer

    def _hold(self, tensors: Mapping[str, Tensor], in_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        # Past the tests of `Module.__setattr__`, which are for tensors and modules: a model has many layers.
        self.__dict__.update(
            in_features=in_features,
            out_features=tensors[LORA_B].shape[0],
            n_kept=tensors[VALUES].numel(),
            rank=tensors[LORA_A].shape[0],
            runtime="packed",
            _half_of=0,  # not known
        )
        self.weight_values = nn.Parameter(tensors[VALUES], requires_grad=False)
        self.register_buffer(BITMASK, tensors[BITMASK])
        self.register_buffer("row_starts", None, persistent=False)  # of S in weight_values, found when needed
        self.lora_A = nn.Parameter(tensors[LORA_A])
        self.lora_B = nn.Parameter(tensors[LORA_B])
        self.bias = bias

    def check(self) -> None:
        """Raise `CheckpointError` unless values and bitmask fit each other (packed runtime only)."""
        self.row_starts = check_packed(self.weight_values, self._bitmask, self.in_features)
        self._look_for_halves()

    def _look_for_halves(self) -> None:
        """Find out what the kernels of CUDA can make use of; of a bitmask that was checked."""
        if self._bitmask.is_cuda and self.row_starts is not None:
            self._half_of = half_of(self._bitmask)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) -> (…, d_out), in the dtype of `x`."""
        if self.runtime == "merged":
            return linear(x, self.weight, self.bias)
        if self.runtime == "packed" and not self._needs_grad(x) and kernels.serves(x, self.weight_values):
            packed_S = self.weight_values, self._bitmask, self._row_starts()
            return kernels.packed_linear(x, *packed_S, self.lora_A, self.lora_B, self.bias, self._half_of)
        if self.runtime == "semi-structured":
            return self._multiply_semi_structured(x)
        y = linear(x, self._S_and_B()[0], self.bias)
        alone = not self._needs_grad(x) and not torch.is_autocast_enabled(x.device.type)
        return kernels.add_low_rank(y, x, self.lora_A, self.lora_B, in_place=alone)

    @property
    def weight(self) -> Tensor:
        """W' = S + B A (d_out, d_in), for models that read it instead of calling the layer (Mamba).

        A parameter in the merged runtime. In the others it is computed at every access, rounded once, with gradients
        for what can be trained; writing into it changes nothing.
        """
        held = self._parameters.get("weight") if self._shown is None else self._shown
        if held is not None:
            return held
        if self.runtime != "semi-structured":
            return self._computed_weight()
        with torch.no_grad():
            weight = self._computed_weight()
        return self._refusing_gradients(weight)

    def show(self, weight: Tensor | None) -> None:
        """Let `weight` be this tensor while the layer is being filled; None ends that."""
        self._shown = weight

    def _multiply_semi_structured(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = semi_structured.multiply(x, self._sparse, self.lora_A, self.bias)
            if self._holds_B():
                alone = not torch.is_autocast_enabled(x.device.type)
                y = kernels.add_low_rank(y, x, self.lora_A, self.lora_B, in_place=alone)
        return self._refusing_gradients(y, x)

    def _refusing_gradients(self, y: Tensor, *inputs: Tensor) -> Tensor:
        """`y`, computed from `inputs` and the layer; a backward pass through it is an error."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return y
        needing = [t for t in (*inputs, *self.parameters(recurse=False)) if t.requires_grad]
        return _NoGradient.apply(y, *needing) if needing else y  # type: ignore[no-untyped-call]

    def set_runtime(self, runtime: str) -> None:
        """Change the runtime in place; between all but the merged one without any loss (of the sign of zeros at most).

        Raises
        ------
        UsageError : unknown runtime; leaving the merged one, in which S, B and A no longer exist; or semi-structured
            where device, dtype, shape or mask do not allow it.
        """
        runtime = resolve_runtime(runtime)
        if runtime == self.runtime:
            return
        if self.runtime == "merged":
            raise UsageError(f"a merged layer cannot become {runtime}: S, B and A are gone. Load the checkpoint again.")
        with torch.no_grad():
            S, B = self._S_and_B()
            trains_S = self._trains_S()
            if runtime == "merged":
                self._merge(S, B)
            elif runtime == "semi-structured":
                sparse = self._compressed(S, self._bitmask, B)
                self._forget_S(B)
                self._hold_sparse(sparse)
            elif runtime == "factored":
                self._forget_S(B)
                self.S = nn.Parameter(S, requires_grad=trains_S)
            else:
                values = S[self._mask()]
                self._forget_S(B)
                self.weight_values = nn.Parameter(values, requires_grad=trains_S)
        self.runtime = runtime

    def packed_tensors(self) -> dict[str, Tensor]:
        """The four tensors of the packed layout, by their names relative to the module.

        Raises
        ------
        UsageError : the layer is merged.
        """
        if self.runtime == "merged":
            raise UsageError("a merged layer has no packed form. Load the checkpoint with another runtime to save it.")
        others = {"weight_bitmask": self._bitmask, "lora_A": self.lora_A}
        if self.runtime == "packed":
            return {"weight_values": self.weight_values, **others, "lora_B": self.lora_B}
        S, B = self._S_and_B()
        return {"weight_values": S[self._mask()], **others, "lora_B": B}

    def extra_repr(self) -> str:
        """Shape, rank and runtime for `print(model)`."""
        kept = self.n_kept / max(self.in_features * self.out_features, 1)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, kept={kept:.3g}, rank={self.rank}, "
            f"bias={self.bias is not None}, runtime={self.runtime}"
        )

    @property
    def _bitmask(self) -> Tensor:
        bitmask = self.weight_bitmask
        if not isinstance(bitmask, Tensor):
            raise CheckpointError("the layer has lost its bitmask.")
        return bitmask

    def _mask(self) -> Tensor:
        return unpack_mask(self._bitmask, self.in_features)

    def _unpacked(self) -> Tensor:
        """Dense S (d_out, d_in); shapes were checked when the layer was loaded."""
        if kernels.unpacks(self.weight_values) and not (self._trains_S() and torch.is_grad_enabled()):
            packed_S = self.weight_values, self._bitmask, self._row_starts()
            return kernels.unpack(*packed_S, self.in_features, self._half_of)
        return scatter(self.weight_values, self._bitmask, self.in_features)

    def _row_starts(self) -> Tensor:
        if self.row_starts is None:
            self.row_starts = find_row_starts(self._bitmask)
        return self.row_starts

    def _needs_grad(self, x: Tensor) -> bool:
        tensors = (x, self.lora_A, self.lora_B, self.bias)
        return torch.is_grad_enabled() and (self._trains_S() or any(t is not None and t.requires_grad for t in tensors))

    def _trains_S(self) -> bool:
        held = self._parameters.get("S" if self.runtime == "factored" else VALUES)
        return held is not None and held.requires_grad

    def _holds_B(self) -> bool:
        """Whether B is a parameter of the layer; otherwise it is a part of `_sparse`."""
        return LORA_B in self._parameters

    def _S_and_B(self) -> tuple[Tensor, Tensor]:
        """Dense S (d_out, d_in) and B (d_out, rank) in any runtime but the merged one."""
        if self.runtime == "semi-structured":
            S, B = semi_structured.split(self._sparse, self.in_features, self.rank)
            return S, self.lora_B if B is None else B
        if self.runtime == "packed":
            return self._unpacked(), self.lora_B
        # Trained without the mask, S would fill up, and be saved without what came into its zeros.
        masked = self._trains_S() and torch.is_grad_enabled()
        return self.S.where(self._mask(), 0) if masked else self.S, self.lora_B

    def _computed_weight(self) -> Tensor:
        S, B = self._S_and_B()
        return merge(S, B, self.lora_A, S.dtype)

    def _compressed(self, S: Tensor, bitmask: Tensor, lora_B: Tensor) -> Tensor:
        reason = semi_structured.obstacle(bitmask, self.in_features, S.dtype, S.device)
        if reason is not None:
            raise UsageError(f"the layer cannot become semi-structured: {reason}.")
        return semi_structured.compress(S, lora_B)

    def _hold_sparse(self, sparse: Tensor) -> None:
        """Keep what `_compressed` gave, and B in one place only: a change of a copy would change nothing."""
        self._sparse = sparse
        if sparse.shape[1] > self.in_features and self._holds_B():
            self._trains_b = self.lora_B.requires_grad
            del self.lora_B

    def _forget_S(self, B: Tensor) -> None:
        """Drop S as the runtime has it; B is a parameter afterwards."""
        if not self._holds_B():
            self.lora_B = nn.Parameter(B, requires_grad=self._trains_b)
        delattr(self, {"packed": "weight_values", "factored": "S", "semi-structured": "_sparse"}[self.runtime])
        self.row_starts = None

    def _merge(self, S: Tensor, B: Tensor) -> None:
        merged = merge(S, B, self.lora_A, S.dtype)
        self._forget_S(B)
        del self.lora_A, self.lora_B, self.weight_bitmask, self.row_starts
        self._parameters["weight"] = nn.Parameter(merged)  # an ordinary dense layer now

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Refuse what torch's semi-structured tensors do not do."""
        if self.runtime == "semi-structured":
            before, after = self.lora_A, fn(self.lora_A)
            if (before.device, before.dtype) != (after.device, after.dtype):
                raise UsageError(
                    "a semi-structured layer keeps its device and dtype: call set_runtime('packed') on it, move it, "
                    "and set the runtime again."
                )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.runtime == "packed":
            self._look_for_halves()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """S is saved packed, whatever it looks like in memory."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.runtime in ("factored", "semi-structured"):
            destination.pop(prefix + "S", None)
            packed = self.packed_tensors()
            for name in (VALUES, LORA_B):
                destination[prefix + name] = packed[name] if keep_vars else packed[name].detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """The inverse: packed values become S in the runtime of the layer."""
        self.row_starts, self._half_of = None, 0
        if self.runtime in ("factored", "semi-structured"):
            bitmask: Tensor = state_dict.get(prefix + BITMASK, self._bitmask)
            values = state_dict.pop(prefix + VALUES, None)
            S = None if values is None else scatter(values, bitmask, self.in_features)
            B = None if self._holds_B() else state_dict.pop(prefix + LORA_B, None)
            if self.runtime == "factored" and S is not None:
                state_dict[prefix + "S"] = S
            elif self.runtime == "semi-structured" and not (S is None and B is None):
                S = self._S_and_B()[0] if S is None else S
                if B is None:
                    B = self.lora_B if self._holds_B() else self._S_and_B()[1]
                self._hold_sparse(self._compressed(S.to(self.lora_A), bitmask, B.to(self.lora_A)))
        super()._load_from_state_dict(state_dict, prefix, *args)


def weight_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a model holds: parameters, buffers, and S of semi-structured layers, which is neither."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, SparseLowRankLinear) and module.runtime == "semi-structured":
            yield module._sparse


class _NoGradient(torch.autograd.Function):
    """y, whose gradient with regard to the other arguments is refused."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *inputs: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UsageError(
            "a semi-structured layer has no gradients: call set_runtime('factored') on it, or load the model with "
            "runtime='factored'."
        )
