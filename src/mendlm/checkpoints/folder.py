"""The headers of a checkpoint folder, dense or packed: which tensors belong to which weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from mendlm.checkpoints.header import FLOATING, TensorInfo
from mendlm.checkpoints.plan import LAYOUT, PARTS, VALUES, VERSION, refuse_exported
from mendlm.checkpoints.reader import Checkpoint, Shard, open_checkpoint, read_tensor
from mendlm.checkpoints.staging import has_partial
from mendlm.errors import CheckpointError, UsageError


class Part(NamedTuple):
    """A tensor and the file it is in."""

    shard: Shard
    info: TensorInfo

    def read(self) -> Tensor:
        """The tensor, of a floating dtype or uint8, in fresh memory on the CPU.

        Raises
        ------
        CheckpointError : the file cannot be read, or has become shorter.
        """
        return read_tensor(self.shard, self.info)


class Packed(NamedTuple):
    """The tensors that a compressed weight is stored as; their shapes fit together."""

    values: Part
    bitmask: Part
    A: Part
    B: Part

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the weight."""
        return self.bitmask.info.shape[0], self.A.info.shape[1]

    @property
    def n_kept(self) -> int:
        """Entries stored in S."""
        return prod(self.values.info.shape)

    @property
    def rank(self) -> int:
        """Rank of B @ A."""
        return self.A.info.shape[0]

    @property
    def n_bytes(self) -> int:
        """Length of the data of all four."""
        return sum(part.info.n_bytes for part in self)


class Folder(NamedTuple):
    """A checkpoint folder: names of weights, ``….weight`` if compressed, and where they are."""

    checkpoint: Checkpoint
    layout: Literal["dense", "packed"]
    packed: Mapping[str, Packed]
    copied: Mapping[str, Part]

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed config.json."""
        return self.checkpoint.config


def open_folder(path: Path) -> Folder:
    """Read config, index and headers of a folder, dense or compressed by mendlm.

    Raises
    ------
    UsageError : no checkpoint there, an unfinished one, an export for other programs, or one quantized by something
        else.
    CheckpointError : a file is missing or damaged, a compressed weight lacks a part, or the format is of another
        version.
    """
    if not path.exists() and has_partial(path):
        raise UsageError(
            f"{str(path)!r} is an unfinished run. Finish it first: mendlm compress with the arguments it was started "
            "with, and --resume."
        )
    checkpoint = open_checkpoint(path, allow_packed=True)
    parts = _by_name(checkpoint.shards)
    quantization = checkpoint.config.get("quantization_config")
    if quantization is None:
        return Folder(checkpoint, "dense", {}, parts)
    refuse_exported(quantization.get("layout"), repr(str(path)))
    if quantization.get("layout") != LAYOUT:
        raise UsageError(f"{str(path)!r} has layout {quantization.get('layout')!r}, this mendlm knows {LAYOUT!r}.")
    if quantization.get("version") != VERSION:
        raise CheckpointError(
            f"{str(path)!r} has format version {quantization.get('version')!r}; this mendlm reads version {VERSION}. "
            "Install the mendlm that wrote it, or a newer one."
        )
    stems = sorted(name.removesuffix(VALUES) for name in parts if name.endswith(f".{VALUES}"))
    packed = {f"{stem}weight": gather(stem, parts) for stem in stems}
    # An empty tensor of the weight's own name may stand beside its parts: the guard against loading without mendlm.
    # For experts that were stacked in the input it is the stack's name.
    owned = {f"{stem}{part}" for stem in stems for part in (*PARTS, "weight")} | {str(quantization.get("guard"))}
    copied = {name: part for name, part in parts.items() if name not in owned}
    return Folder(checkpoint, "packed", packed, copied)


def _by_name(shards: Iterable[Shard]) -> dict[str, Part]:
    return {info.name: Part(shard, info) for shard in shards for info in shard.header.tensors}


def gather(stem: str, parts: Mapping[str, Part]) -> Packed:
    """The parts of the weight ``{stem}weight``.

    Raises
    ------
    CheckpointError : one is missing, or their shapes or dtypes do not fit together.
    """
    missing = [part for part in PARTS if f"{stem}{part}" not in parts]
    if missing:
        raise CheckpointError(f"'{stem}weight' lacks its {missing[0]}. The folder is incomplete: fetch it again.")
    packed = Packed(*(parts[f"{stem}{part}"] for part in PARTS))
    values, mask, A, B = (part.info.shape for part in packed)
    if not (len(mask) == len(A) == len(B) == 2 and B == (mask[0], A[0]) and mask[1] == -(-A[1] // 8)):
        raise CheckpointError(
            f"the parts of '{stem}weight' do not fit together: bitmask {mask}, lora_A {A}, lora_B {B}. "
            "The folder mixes two runs: compress the model again."
        )
    # Before anything of the weight's size is allocated: what is on the disk bounds what is made of it.
    if len(values) != 1 or values[0] > mask[0] * A[1]:
        raise CheckpointError(
            f"'{stem}weight' has values of shape {values}, a matrix of {mask[0]} x {A[1]} keeps at most "
            f"{mask[0] * A[1]}. The folder is damaged: fetch it again."
        )
    dtypes = [part.info.dtype for part in packed]
    if dtypes[1] != "U8" or dtypes[0] not in FLOATING or not dtypes[0] == dtypes[2] == dtypes[3]:
        raise CheckpointError(
            f"the parts of '{stem}weight' have dtypes {', '.join(dtypes)}; values, lora_A and lora_B must share one "
            "floating dtype and the bitmask must be U8. Fetch the folder again."
        )
    return packed
