"""The walk: hidden states of the calibration text on their way from block to block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mendlm.calibration.activations import Activations
from mendlm.calibration.blocks import BlockModel
from mendlm.calibration.statistics import InputGatherer
from mendlm.errors import UsageError
from mendlm.inputs import InputStats

if TYPE_CHECKING:
    from mendlm.checkpoints.plan import PlannedTensor


@dataclass(frozen=True)
class CalibrationText:
    """The token windows of a run and how they go through the model.

    Attributes
    ----------
    ids : (n_sequences, seqlen) int64, CPU.
    batch_size : windows that run together.
    folder : where activations are kept in a file; None keeps them in memory.
    """

    ids: Tensor
    batch_size: int
    folder: Path | None = None


class Walk:
    """The hidden states of the calibration text on their way through the blocks.

    Parameters
    ----------
    model : the blocks.
    text : what runs through them.
    tell : called with the index of a block (from 0) and the phase before it runs over the text.
    dense_stream : whether to carry a second buffer, of the hidden states that the original model has; `propagate_dense`
        moves it on, and nothing else does.

    Attributes
    ----------
    states : hidden states that enter the block at work: what the blocks before it, as they were propagated, gave.
    dense_states : the same of the original model; None without `dense_stream`.

    Notes
    -----
    Memory: ``n_sequences * seqlen * hidden`` numbers for each buffer, in memory or each in a file.
    """

    def __init__(
        self, model: BlockModel, text: CalibrationText, tell: Callable[[int, str], None], *, dense_stream: bool = False
    ) -> None:
        self.model = model
        self._tell, self._ids = tell, text.ids
        embedded = (model.embed(ids) for ids in torch.split(text.ids, text.batch_size))
        first = next(embedded)
        n_sequences, seqlen = text.ids.shape
        shape = (n_sequences, seqlen, first.shape[-1])
        self.states = Activations(*shape, first.dtype, text.batch_size, text.folder)
        for batch, hidden in zip(self.states.batches(), chain([first], embedded), strict=True):
            batch.copy_(hidden)
        self.dense_states: Activations | None = None
        if dense_stream:
            self.dense_states = Activations(*shape, first.dtype, text.batch_size, text.folder)
            for batch, hidden in zip(self.dense_states.batches(), self.states.batches(), strict=True):
                batch.copy_(hidden)

    def gather(
        self,
        index: int,
        block: nn.Module,
        modules: Mapping[str, tuple[str, int]],
        *,
        gram: bool,
        advance: bool,
        phase: str = "gather",
    ) -> dict[str, InputStats]:
        """Statistics by tensor name of one pass of a loaded block; `advance` also keeps its outputs.

        `modules` maps tensor names to the path of the module in the block and its number of inputs.
        """
        self._tell(index, phase)
        layers = {name: block.get_submodule(path) for name, (path, _) in modules.items()}
        d_in = {name: n for name, (_, n) in modules.items()}
        gatherer = InputGatherer(layers, d_in, gram=gram, device=self.model.device)
        with gatherer.watching():
            self._pass(self.states, index, block, advance=advance, after_batch=gatherer.batch_ends)
        return gatherer.results()

    def leading(self, n_windows: int) -> list[Tensor]:
        """Copies of the hidden states of the first batches, as many as have `n_windows` windows together."""
        found: list[Tensor] = []
        for batch in self.states.batches():
            if sum(map(len, found)) >= n_windows:
                break
            found.append(batch.clone())
        return found

    def propagate(self, index: int, block: nn.Module) -> None:
        """Replace the hidden states by the outputs of a loaded block."""
        self._tell(index, "propagate")
        self._pass(self.states, index, block, advance=True)

    def propagate_dense(self, index: int, block: nn.Module) -> Activations:
        """Replace the hidden states of the original model by the outputs of a loaded block, which is still dense.

        They are returned.

        Raises
        ------
        UsageError : there are none.
        """
        if self.dense_states is None:
            raise UsageError("this walk carries no dense stream: make it with dense_stream=True.")
        self._tell(index, "dense")
        self._pass(self.dense_states, index, block, advance=True)
        return self.dense_states

    def learn_batches(self, sizes: Iterable[int]) -> None:
        """Let blocks run on batches of other numbers of windows than `text.batch_size` too."""
        for size in sizes:
            self.model.embed(self._ids[:size])

    def _pass(
        self,
        states: Activations,
        index: int,
        block: nn.Module,
        *,
        advance: bool,
        after_batch: Callable[[], None] = lambda: None,
    ) -> None:
        with torch.no_grad():
            for batch in states.batches():
                out = self.model.forward(index, block, batch.to(self.model.device))
                if advance:
                    batch.copy_(out)
                after_batch()


def modules_by_block(model: BlockModel, tensors: Iterable[PlannedTensor]) -> dict[int, dict[str, tuple[str, int]]]:
    """Block -> tensor name -> (path of its module in the block, d_in), for tensors to compress.

    Raises
    ------
    UsageError : a tensor to compress is outside the blocks, where calibration sees no inputs.
    """
    found: dict[int, dict[str, tuple[str, int]]] = {}
    for tensor in tensors:
        place = model.module_path(tensor.name)
        if place is None or place[0] >= model.n_blocks:
            raise UsageError(
                f"{tensor.name!r} is in no block, so calibration does not see its inputs. "
                f"Add --exclude {tensor.name!r}, or compress without --calibration."
            )
        found.setdefault(place[0], {})[tensor.name] = (place[1], tensor.shape[1])
    return found
