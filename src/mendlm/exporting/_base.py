"""What a layout is: which tensors stand for a compressed weight, and in which files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mendlm.checkpoints.folder import Packed
from mendlm.checkpoints.header import FLOATING
from mendlm.checkpoints.plan import METHOD, VERSION
from mendlm.decomposition import SparseLowRank
from mendlm.errors import CheckpointError, UsageError
from mendlm.families import is_transposed
from mendlm.packing import unpack, unpack_mask

BASE = "base"  # subfolder of the checkpoint, where the exported folder itself is something else


@dataclass(frozen=True)
class Layer:
    """A compressed weight of the folder to export, not read yet.

    Attributes
    ----------
    path : of the module, as the checkpoint names it.
    packed : where its four tensors are.
    transposed : whether the family stores this weight as (d_in, d_out).
    """

    path: str
    packed: Packed
    transposed: bool

    @classmethod
    def of(cls, name: str, packed: Packed, model_type: str | None) -> Layer:
        """The layer whose weight is called `name`."""
        return cls(name.removesuffix(".weight"), packed, is_transposed(model_type, name))

    @property
    def dtype(self) -> str:
        """Storage dtype, by its safetensors name."""
        return self.packed.values.info.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.packed.shape

    @property
    def dense_shape(self) -> tuple[int, int]:
        """Shape of the weight as the family stores it."""
        d_out, d_in = self.shape
        return (d_in, d_out) if self.transposed else (d_out, d_in)

    def read(self) -> SparseLowRank:
        """S, B, A and mask, on the CPU.

        Raises
        ------
        CheckpointError : a file became shorter, or values and bitmask do not fit each other.
        """
        values, bitmask, A, B = (part.read() for part in self.packed)
        d_in = A.shape[1]
        return SparseLowRank(unpack(values, bitmask, d_in), B, A, unpack_mask(bitmask, d_in))

    def check(self) -> None:
        """Raise `CheckpointError` unless all but the bitmask have one floating dtype."""
        values, bitmask, A, B = (part.info.dtype for part in self.packed)
        if bitmask != "U8" or values not in FLOATING or not values == A == B:
            raise CheckpointError(
                f"the parts of {self.path!r} have dtypes {values}, {bitmask}, {A} and {B}; values, lora_A and lora_B "
                "must share one floating dtype and the bitmask must be U8. Fetch the folder again."
            )


@dataclass(frozen=True)
class Stored:
    """A tensor to write.

    Attributes
    ----------
    file : which it goes to, relative to the exported folder.
    name, dtype, shape : as in the header of the file; the dtype by its safetensors name.
    """

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """The folder to export.

    Attributes
    ----------
    folder : where it is.
    config : config.json without `quantization_config`.
    layers : the compressed weights, by name.
    manifest : `mendlm.json`, empty if there is none.
    """

    folder: Path
    config: Mapping[str, Any]
    layers: tuple[Layer, ...]
    manifest: Mapping[str, Any]

    @property
    def max_rank(self) -> int:
        """The largest rank of all layers."""
        return max(layer.packed.rank for layer in self.layers)


class Layout(ABC):
    """One form of a compressed model; a new instance is made for every export.

    Attributes
    ----------
    name : of the layout, for ``--to``.
    summary : one line for people.
    mark : layout that config.json names, so that no loader takes the folder for an ordinary checkpoint; None if it, or
        its subfolder `base`, is one.
    base : subfolder of the checkpoint; "" for the folder itself.
    stacks : whether experts that the input had in 3-D tensors are stacked again.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    mark: ClassVar[str | None] = None
    base: ClassVar[str] = ""
    stacks: ClassVar[bool] = False

    def check(self, source: Source) -> None:  # noqa: B027 (most layouts take everything)
        """Refuse, before anything is written, what this layout cannot hold.

        Raises
        ------
        UsageError : names the layer and what to do.
        """

    @abstractmethod
    def stored(self, layer: Layer, file: str) -> Sequence[Stored]:
        """The tensors that stand for a layer whose shard is `file`."""

    @abstractmethod
    def tensors(self, layer: Layer) -> Iterable[Tensor]:
        """Their contents, in the same order, contiguous on the CPU; reads the layer."""

    def files(self, source: Source) -> Mapping[str, bytes]:
        """Small files that belong to the layout, by name relative to the exported folder."""
        return {}

    def config(self, source: Source) -> Mapping[str, Any]:
        """config.json of the checkpoint."""
        if self.mark is None:
            return source.config
        return {
            **source.config,
            "quantization_config": {"quant_method": METHOD, "version": VERSION, "layout": self.mark},
        }

    @abstractmethod
    def card(self, dest: str) -> str:
        """For the model card: what this is and how to load it; Markdown, with `dest` as the folder's name."""


def refuse_experts(layer: Layer, why: str) -> UsageError:
    """The error about a projection of an expert."""
    return UsageError(
        f"{layer.path!r} is a projection of an expert, and {why} Export --to dense, or compress with "
        "--exclude '*.experts.*' and export that."
    )
