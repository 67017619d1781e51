"""The walk: hidden states of the calibration text on their way from block to block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    from mendlm.planning import CompressionPlan


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
    """

    def __init__(self, model: BlockModel, text: CalibrationText, tell: Callable[[int, str], None]) -> None:
        self.model = model
        self._tell = tell
        embedded = (model.embed(ids) for ids in torch.split(text.ids, text.batch_size))
        first = next(embedded)
        n_sequences, seqlen = text.ids.shape
        self._states = Activations(n_sequences, seqlen, first.shape[-1], first.dtype, text.batch_size, text.folder)
        for batch, hidden in zip(self._states.batches(), chain([first], embedded), strict=True):
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
            self._pass(index, block, advance=advance, after_batch=gatherer.batch_ends)
        return gatherer.results()

    def propagate(self, index: int, block: nn.Module) -> None:
        """Replace the hidden states by the outputs of a loaded block."""
        self._tell(index, "propagate")
        self._pass(index, block, advance=True)

    def _pass(
        self, index: int, block: nn.Module, *, advance: bool, after_batch: Callable[[], None] = lambda: None
    ) -> None:
        with torch.no_grad():
            for batch in self._states.batches():
                out = self.model.forward(index, block, batch.to(self.model.device))
                if advance:
                    batch.copy_(out)
                after_batch()


def modules_by_block(model: BlockModel, plan: CompressionPlan) -> dict[int, dict[str, tuple[str, int]]]:
    """Block -> tensor name -> (path of its module in the block, d_in), for the tensors to compress.

    Raises
    ------
    UsageError : a tensor to compress is outside the blocks, where calibration sees no inputs.
    """
    found: dict[int, dict[str, tuple[str, int]]] = {}
    for tensor in plan.compressed:
        place = model.module_path(tensor.name)
        if place is None or place[0] >= model.n_blocks:
            raise UsageError(
                f"{tensor.name!r} is in no block, so calibration does not see its inputs. "
                f"Add --exclude {tensor.name!r}, or compress without --calibration."
            )
        found.setdefault(place[0], {})[tensor.name] = (place[1], tensor.shape[1])
    return found
