"""Fills the compressed layers of a model straight from the files, without transformers.

transformers (5.17 to 5.23) compiles a regular expression and starts a task for every tensor that a model asks for, 0.3
ms each, and a packed checkpoint has three times as many tensors as a dense one. So the model holds an `Awaited` in the
place of a compressed layer while transformers loads the rest, which asks for none of the packed tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mendlm.checkpoints.header import FLOATING, Header, TensorInfo
from mendlm.checkpoints.plan import BITMASK, PARTS
from mendlm.runtime import SparseLowRankLinear


class Awaited(nn.Module):
    """Stands for a compressed layer while a model is loaded; has its bias, which transformers fills.

    Parameters
    ----------
    in_features : d_in.
    weight : what it shows as its weight; not a parameter.
    dtype : of the layer to come.
    bias : parameter of the dense layer, or None.
    """

    def __init__(self, in_features: int, weight: Tensor, dtype: torch.dtype, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.weight, self.dtype, self.bias = in_features, weight, dtype, bias


class PackedFiles:
    """The safetensors files of a packed checkpoint, opened by memory map; writing to a tensor does not change the file.

    A tensor is a part of the map, in a fifth of the time that safetensors takes for it, and has a storage of its own:
    what saves tensors writes their whole storage, and not one that tensors of several dtypes share.

    Parameters
    ----------
    headers : their paths, and what they hold; checked.
    device : where layers go.
    """

    def __init__(self, headers: Mapping[Path, Header], device: Any) -> None:
        self._device = device
        self._by_name: dict[str, tuple[Any, int, TensorInfo]] = {}
        for path, header in headers.items():
            size = header.data_start + max((info.end for info in header.tensors), default=0)
            # Unlike `mmap`, torch keeps no descriptor of the file open.
            data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
            self._by_name.update((info.name, (data, header.data_start, info)) for info in header.tensors)

    def layer(self, path: str, awaited: Awaited) -> SparseLowRankLinear:
        """The layer at `path` in the checkpoint, packed. A tensor that keeps device and dtype is not copied.

        Its tensors are known to be there, in shapes that fit.
        """
        tensors = {part: self._read(f"{path}.{part}", None if part == BITMASK else awaited.dtype) for part in PARTS}
        layer = SparseLowRankLinear.holding(tensors, awaited.in_features, awaited.bias)
        return layer.train(awaited.training)

    def _read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        data, data_start, info = self._by_name[name]
        stored = torch.uint8 if dtype is None else FLOATING[info.dtype]
        offset = data_start + info.start
        if not info.n_bytes:
            raw = torch.empty(0, dtype=stored)
        elif offset % stored.itemsize:  # not of mendlm's making, which aligns what it writes
            raw = torch.frombuffer(data, dtype=torch.uint8, count=info.n_bytes, offset=offset).clone().view(stored)
        else:
            raw = torch.frombuffer(data, dtype=stored, count=info.n_bytes // stored.itemsize, offset=offset)
        return raw.view(info.shape).to(device=self._device, dtype=dtype)


def the_one_device(device_map: Any) -> Any:
    """The device of a `device_map` that has only one; None where there are several, or any part stays on disk."""
    if device_map is None:
        return torch.device("cpu")
    if not isinstance(device_map, Mapping) or set(device_map) != {""} or device_map[""] == "disk":
        return None
    return device_map[""]


def any_index(name: str) -> str:
    """Regular expression of a tensor's name with any numbers in it: one for all blocks and experts."""
    return re.sub(r"\d+", r"\\d+", re.escape(name))


def may_match(pattern: str, name: str) -> bool:
    """Whether a pattern of transformers for modules to keep in float32 could match a tensor's name."""
    return all(piece in name for piece in pattern.split("*"))
