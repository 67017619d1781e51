"""One block of a transformers model at a time: its weights come from the shards and go again.

Nothing here knows a model family beyond the names in `mendlm.families`: the model's own forward says with which
arguments it calls its blocks, and is believed.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mendlm._memory import trim
from mendlm.calibration.products import quick_products
from mendlm.checkpoints.header import FLOATING, TensorInfo, check_shape
from mendlm.checkpoints.reader import Checkpoint, Shard, read_tensor
from mendlm.errors import CheckpointError, UsageError
from mendlm.experts import split_stacked, unfuse
from mendlm.families import module_name, split_block


@dataclass(frozen=True)
class _Call:
    """The arguments of a block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class BlockModel:
    """A model whose blocks are on the meta device but for the one at work.

    Parameters
    ----------
    checkpoint : dense, open.
    device : where blocks run.
    dtype : in which they run.

    Attributes
    ----------
    n_blocks : how many blocks.

    Raises
    ------
    UsageError : transformers does not know the architecture, or its blocks cannot be found.
    CheckpointError : a tensor that the model needs outside its blocks is missing.

    Notes
    -----
    Memory: embeddings, norms and one block.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._checkpoint = checkpoint
        self._model = _skeleton(checkpoint, dtype)
        self._list_name, self._blocks = _find_blocks(self._model, checkpoint)
        self.n_blocks = len(self._blocks)
        self._files: dict[int, dict[str, tuple[Shard, TensorInfo]]] = defaultdict(dict)
        self._calls: dict[tuple[int, ...], list[_Call]] = {}
        self._load_outside()

    def module_path(self, tensor_name: str) -> tuple[int, str] | None:
        """Block and path within it of the module whose weight `tensor_name` is; None outside the blocks."""
        found = split_block(module_name(self._checkpoint.model_type, tensor_name))
        return None if found is None else (found[1], found[2].removesuffix(".weight"))

    def vectors(self, index: int, compressed: Collection[str]) -> dict[str, str]:
        """Norms of a block and biases of some of its modules: name in the block -> name in the checkpoint.

        Parameters
        ----------
        index : of the block, loaded or not.
        compressed : paths of the modules whose biases count. Vectors of other modules with a matrix (routers) do not.
        """
        found = {}
        for path, module in self._blocks[index].named_modules():
            own = dict(module.named_parameters(recurse=False))
            if path not in compressed and any(parameter.ndim != 1 for parameter in own.values()):
                continue
            for name, parameter in own.items():
                place = self._files[index].get(f"{path}.{name}")
                if parameter.ndim == 1 and place is not None and place[1].dtype in FLOATING:
                    found[f"{path}.{name}"] = place[1].name
        return found

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states (batch, seqlen, hidden) that enter block 0 for token ids (batch, seqlen)."""
        recorders = [_Recorder(block) for block in self._blocks]
        with torch.no_grad(), _replaced(self._blocks, recorders):
            self._run(ids, recorders)
        self._calls.setdefault(tuple(ids.shape), [_Call(r.args, r.kwargs) for r in recorders])
        hidden = recorders[0].hidden
        if hidden is None:
            raise UsageError(f"{type(self._model).__name__} did not call its blocks, so it cannot be calibrated.")
        return hidden

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights, for a while.

        Raises
        ------
        CheckpointError : the checkpoint lacks one of them.
        """
        block = self._blocks[index]
        self._fill(block, self._files[index], f"{self._list_name}.{index}")
        block.to(self.device)
        try:
            yield block
        finally:
            # The parameters go; buffers were computed when the model was built and stay.
            empty = {name: torch.empty_like(value, device="meta") for name, value in block.named_parameters()}
            block.load_state_dict(empty, strict=False, assign=True)
            block.requires_grad_(False)
            trim()

    def forward(self, index: int, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Output of a loaded block, or of what is called like it, for hidden states (batch, seqlen, hidden).

        The batch must have a shape that `embed` has seen.
        """
        call = self._calls[tuple(hidden.shape[:2])][index]
        with quick_products(self.device, self.dtype):
            out = block(hidden, *call.args, **call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def _run(self, ids: Tensor, recorders: list[_Recorder]) -> None:
        for as_tuple in (False, True):
            for recorder in recorders:
                recorder.as_tuple = as_tuple
            try:
                self._model(input_ids=ids.to(self.device), use_cache=False)
            except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
                if as_tuple:
                    raise
                continue
            # A model that takes the first of what its blocks return would have passed on a part of a bare tensor.
            if all(recorder.hidden is recorders[0].hidden for recorder in recorders):
                return
        raise UsageError(
            f"{type(self._model).__name__} changes hidden states between its blocks; it cannot be calibrated."
        )

    def _load_outside(self) -> None:
        """Sort the tensors by block, and load those that belong to none."""
        outside: dict[str, tuple[Shard, TensorInfo]] = {}
        for shard in self._checkpoint.shards:
            for info in shard.header.tensors:
                name = module_name(self._checkpoint.model_type, info.name)
                found = split_block(name)
                if found is not None and found[0].rpartition(".")[2] == self._list_name.rpartition(".")[2]:
                    self._files[found[1]][found[2]] = (shard, info)
                else:
                    outside[name] = (shard, info)
        absent = [index for index in range(self.n_blocks) if index not in self._files]
        if absent:
            raise CheckpointError(
                f"config.json of {str(self._checkpoint.folder)!r} asks for {self.n_blocks} blocks, and its files hold "
                f"no tensor of block {absent[0]}. They are of different models: fetch both again."
            )
        known = {name for name, _ in self._model.named_parameters()} | {n for n, _ in self._model.named_buffers()}
        prefix = f"{self._model.base_model_prefix}."
        wanted = {
            next((n for n in (name, name.removeprefix(prefix)) if n in known), ""): place
            for name, place in outside.items()
        }
        wanted.pop("", None)  # the output embedding, which no block needs
        for index, block in enumerate(self._blocks):
            unfuse(block, self._files[index])
            _check_shapes(block, self._files[index])
        _check_shapes(self._model, wanted)
        _assign(self._model, wanted, self.dtype)
        for name, parameter in self._model.named_parameters():
            if parameter.is_meta and not name.startswith(f"{self._list_name}."):
                raise CheckpointError(f"the checkpoint has no tensor for {name!r}, which the model needs.")
        self._move_outside(self._model)

    def _move_outside(self, module: nn.Module) -> None:
        """Everything but the blocks to the device."""
        for child in module.children():
            if child is self._blocks:
                continue
            if any(inner is self._blocks for inner in child.modules()):
                self._move_outside(child)
            else:
                child.to(self.device)

    def _fill(self, block: nn.Module, files: Mapping[str, tuple[Shard, TensorInfo]], where: str) -> None:
        _assign(block, files, self.dtype)
        for name, parameter in block.named_parameters():
            if parameter.is_meta:
                raise CheckpointError(f"the checkpoint has no tensor for {where}.{name}, which the model needs.")


class _Recorder(nn.Module):
    """Stands for a block: notes its arguments and hands the hidden states on unchanged."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._stands_for = [block]  # in a list: not a submodule
        self.hidden: Tensor | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.as_tuple = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            self.hidden, self.args = args[0], args[1:]
        else:
            self.hidden = kwargs.pop("hidden_states")
        self.kwargs = kwargs
        return (self.hidden,) if self.as_tuple else self.hidden


@contextlib.contextmanager
def _replaced(blocks: nn.ModuleList, others: list[_Recorder]) -> Iterator[None]:
    own = list(blocks)
    for index, other in enumerate(others):
        blocks[index] = other
    try:
        yield
    finally:
        for index, block in enumerate(own):
            blocks[index] = block


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The base model (no output embedding) with every parameter on the meta device and every buffer computed."""
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModel
    from transformers.initialization import no_init_weights

    from mendlm._quiet import quiet_transformers

    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
            with init_empty_weights(include_buffers=False), no_init_weights():
                model = AutoModel.from_config(config, dtype=dtype, trust_remote_code=False)
        except (OSError, ValueError, KeyError, StrictDataclassError) as err:
            reason = " ".join(str(err).split())[:300]
            raise UsageError(
                f"transformers cannot build model_type {checkpoint.model_type!r}, and calibration runs the model: "
                f"{reason} Compress it without --calibration."
            ) from err
    model.eval()
    model.requires_grad_(False)
    return model


def _find_blocks(model: Any, checkpoint: Checkpoint) -> tuple[str, nn.ModuleList]:
    """The list of blocks: as many modules as the config has hidden layers."""
    config = model.config.get_text_config()
    n = getattr(config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n and split_block(f"{name}.0.x") is not None:
            return name, module
    raise UsageError(
        f"cannot find the blocks of model_type {checkpoint.model_type!r} ({type(model).__name__}): no list of "
        f"{n} modules called 'layers' or 'h'. Compress it without --calibration."
    )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in (*module.named_parameters(), *module.named_buffers())}


def _check_shapes(module: nn.Module, files: Mapping[str, tuple[Shard, TensorInfo]]) -> None:
    """Refuse a tensor that has not the shape of its place in `module`."""
    known = _shapes(module)
    for name, (shard, info) in files.items():
        if info.dtype in FLOATING and name in known:
            check_shape(info, shard.name, known[name])


def _assign(module: nn.Module, files: Mapping[str, tuple[Shard, TensorInfo]], dtype: torch.dtype) -> None:
    """Read the tensors that `module` has a place for; others (buffers of old checkpoints) are left out."""
    known = _shapes(module)
    state = {}
    for name, (shard, info) in files.items():
        if info.dtype not in FLOATING:
            continue
        if name in known:
            state[name] = read_tensor(shard, info).to(dtype)
        elif len(info.shape) == 3:
            stacked = {n: W for n, W in split_stacked(name, read_tensor(shard, info)) if n in known}
            state |= {n: W.to(dtype) for n, W in stacked.items()}
    module.load_state_dict(state, strict=False, assign=True)
    module.requires_grad_(False)
