"""Reading: find the files of a checkpoint, check that they fit together, and read single tensors.

No file is mapped: mapped pages would count as resident memory. A tensor is read into a buffer of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mendlm.checkpoints.header import FLOATING, MAX_HEADER_BYTES, Header, TensorInfo, is_text, read_header, shorten
from mendlm.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from mendlm.checkpoints.plan import PlannedTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
ADAPTER_CONFIG = "adapter_config.json"  # of a PEFT adapter
# Names that no shard may have, whatever an index says: what is written there would take its place.
OWN_FILES = frozenset({CONFIG_FILE, INDEX_FILE, ADAPTER_CONFIG, "mendlm.json", "mendlm.run.json", "mendlm.export.json"})
CHUNK_BYTES = 8 * 2**20
MAX_JSON_BYTES = MAX_HEADER_BYTES  # config, index: an index names the tensors that the headers name

_MAX_NAME_BYTES = 255  # of a file, in every common file system
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a checkpoint."""

    name: str
    path: Path
    header: Header
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose headers have been read and found to fit together.

    Attributes
    ----------
    folder : where it is.
    config : the parsed config.json.
    shards : sorted by name.
    index : the parsed index of a sharded checkpoint, None for a single file.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    index: Mapping[str, Any] | None

    @property
    def model_type(self) -> str | None:
        """The architecture's name in config.json."""
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None


def open_checkpoint(folder: Path, *, allow_packed: bool = False) -> Checkpoint:
    """Read config, index and the header of every shard of a dense checkpoint.

    With `allow_packed` one that mendlm compressed is opened as well: its files are named as those of a dense one.

    Raises
    ------
    UsageError : not a folder of safetensors, e.g. pickles only; or compressed or quantized already.
    CheckpointError : a file is missing, damaged or unsafe, or index and shards disagree.
    """
    weights = find_weights(folder)
    config = read_json_object(inside(folder, CONFIG_FILE))
    _refuse_quantized(folder, config, allow_packed)
    if weights == SINGLE_FILE:
        return Checkpoint(folder, config, (open_shard(folder, SINGLE_FILE),), None)
    index = read_json_object(inside(folder, INDEX_FILE))
    return Checkpoint(folder, config, _open_listed(folder, index), index)


def open_shards(folder: Path) -> tuple[Shard, ...]:
    """The shards of any checkpoint of safetensors, whatever its config says.

    Raises
    ------
    UsageError : not a folder of safetensors, e.g. pickles only.
    CheckpointError : a file is missing, damaged or unsafe, or index and shards disagree.
    """
    inside(folder, CONFIG_FILE)
    if find_weights(folder) == SINGLE_FILE:
        return (open_shard(folder, SINGLE_FILE),)
    return _open_listed(folder, read_json_object(inside(folder, INDEX_FILE)))


def _open_listed(folder: Path, index: Mapping[str, Any]) -> tuple[Shard, ...]:
    """The shards that an index names, which must fit it; errors as `open_shards`."""
    weight_map = check_weight_map(index)
    shards = tuple(open_shard(folder, name) for name in sorted(set(weight_map.values())))
    check_index(weight_map, {shard.name: shard.header.by_name.keys() for shard in shards})
    return shards


def read_tensor(shard: Shard, info: TensorInfo) -> Tensor:
    """Read one tensor of a floating dtype or uint8 into fresh memory, on the CPU.

    Raises
    ------
    CheckpointError : it has another dtype, or the file cannot be read or has become shorter.
    """
    if info.dtype not in FLOATING and info.dtype != "U8":
        raise CheckpointError(f"{info.name!r} has dtype {info.dtype}, and only floating weights and bitmasks are read.")
    tensor = torch.empty(info.shape, dtype=FLOATING.get(info.dtype, torch.uint8))
    if tensor.numel():
        _fill(shard, shard.header.data_start + info.start, as_bytes(tensor))
    return tensor


def read_weight(shard: Shard, tensor: PlannedTensor) -> Tensor:
    """Read the matrix (d_out, d_in) that a planned tensor is, contiguous, on the CPU, whatever way it is stored.

    Of a 3-D tensor of experts only the slice is read.

    Raises
    ------
    CheckpointError : the file cannot be read, or has become shorter.
    """
    info = shard.header.by_name[tensor.source]
    shape = info.shape[-2:]
    W = torch.empty(shape, dtype=FLOATING[info.dtype])
    start = shard.header.data_start + info.start + (tensor.index or 0) * W.nbytes
    if W.numel():
        _fill(shard, start, as_bytes(W))
    return W.T.contiguous() if tensor.transposed else W


def read_chunks(shard: Shard, info: TensorInfo, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Yield the raw bytes of a tensor in pieces; each piece is overwritten by the next."""
    buffer = memoryview(bytearray(min(chunk_bytes, info.n_bytes)))
    for start in range(info.start, info.end, chunk_bytes):
        piece = buffer[: min(chunk_bytes, info.end - start)]
        _fill(shard, shard.header.data_start + start, piece)
        yield piece


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor that is not empty."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` about reading `path` into a `CheckpointError`."""
    try:
        yield
    except OSError as err:
        raise CheckpointError(f"cannot read {path.name!r}: {err.strerror or err}.") from err


def _fill(shard: Shard, offset: int, target: memoryview) -> None:
    with read_errors(shard.path), shard.path.open("rb", buffering=0) as file:
        file.seek(offset)
        while target:
            n = file.readinto(target)
            if not n:
                raise CheckpointError(f"{shard.name!r} became shorter while it was read. Do not change it meanwhile.")
            target = target[n:]


def is_plain_name(name: str) -> bool:
    """Whether `name` can only be a file of the folder that it is looked up in, on any system."""
    if not name or name in (".", "..") or any(c in name for c in "/\\\0"):
        return False
    return len(os.fsencode(name) if is_text(name) else name) <= _MAX_NAME_BYTES


def inside(folder: Path, name: str) -> Path:
    """Path of the file `name` in `folder`.

    Raises
    ------
    CheckpointError : `name` is not a plain file name, or a link that leads out of the folder (links of a hub cache,
        ``snapshots/<revision>/`` into ``blobs/``, may stay).
    """
    if not is_plain_name(name):
        raise CheckpointError(
            f"{shorten(name)} is not a plain file name, and only files in the checkpoint's folder are read."
        )
    path = folder / name
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in allowed):
        raise CheckpointError(
            f"{name!r} is a link that leads out of the checkpoint's folder. Put the file itself there."
        )
    return path


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object.

    Raises
    ------
    CheckpointError : missing, unreadable, not JSON or not an object.
    """
    with read_errors(path):
        if not path.exists():
            raise CheckpointError(f"{path.name!r} is missing. The download is probably incomplete: fetch it again.")
        if not path.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(f"{path.name!r} is not a file. Fetch it again.")
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    return parse_json_object(raw, path.name)


def parse_json_object(raw: bytes, name: str) -> dict[str, Any]:
    """The JSON object that the file `name` holds.

    Raises
    ------
    CheckpointError : longer than `MAX_JSON_BYTES`, not JSON or not an object.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(f"{name!r} is longer than {MAX_JSON_BYTES} bytes, the limit. Fetch that file again.")
    try:
        parsed = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{name!r} is not valid JSON: {str(err)[:200]}. Fetch that file again.") from err
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{name!r} must hold a JSON object, got {type(parsed).__name__}. Fetch it again.")
    return parsed


def find_weights(folder: Path) -> str:
    """The file that lists the weights of a checkpoint; as in transformers, a single file wins over an index.

    Raises
    ------
    UsageError : not a folder of safetensors, e.g. pickles only.
    CheckpointError : config.json or the index is missing.
    """
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError as err:
        raise UsageError(f"cannot open the folder {str(folder)!r}: {err.strerror or err}.") from err
    found = next((name for name in (SINGLE_FILE, INDEX_FILE) if name in names), None)
    if found:
        if CONFIG_FILE not in names:
            raise CheckpointError(
                f"{str(folder)!r} has weights but no {CONFIG_FILE}, which names the architecture. Add the model's."
            )
        return found
    if pickles := [n for n in names if n.endswith(_PICKLES)]:
        raise UsageError(
            f"{str(folder)!r} holds its weights as pickles only, e.g. {pickles[0]!r}. Loading a pickle can run any "
            "code, so mendlm reads safetensors alone. Convert once with a program you trust: "
            "AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(NEW_FOLDER)."
        )
    if ADAPTER_CONFIG in names:
        raise UsageError(
            f"{str(folder)!r} is a PEFT adapter ({ADAPTER_CONFIG}), not a model. Load it with PEFT, on top of its base "
            "model; or give the folder that it was exported from."
        )
    stray = next((n for n in names if n.endswith(".safetensors")), None)
    if stray:
        raise CheckpointError(
            f"{str(folder)!r} holds {stray!r} but neither {SINGLE_FILE} nor {INDEX_FILE}. Add the index."
        )
    if gguf := next((n for n in names if n.endswith(".gguf")), None):
        raise UsageError(f"{gguf!r} is a GGUF file. Turn it into a checkpoint first: mendlm import {gguf} FOLDER.")
    raise UsageError(
        f"{str(folder)!r} is not a checkpoint: it holds neither {SINGLE_FILE} nor {INDEX_FILE}. "
        "Give the folder that save_pretrained wrote."
    )


def _refuse_quantized(folder: Path, config: Mapping[str, Any], allow_packed: bool) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == "mendlm":
        if allow_packed:
            return
        raise UsageError(f"{str(folder)!r} was already compressed by mendlm. Compress the dense model instead.")
    raise UsageError(
        f"{str(folder)!r} is quantized (quant_method {method!r}), and mendlm compresses floating weights. "
        "Give the model before quantization."
    )


def open_shard(folder: Path, name: str) -> Shard:
    """Read the header of the shard `name`; errors as `open_checkpoint`."""
    path = inside(folder, name)
    if not path.is_file():
        raise CheckpointError(
            f"{INDEX_FILE!r} names the shard {name!r}, which is missing. "
            "The download is probably incomplete: fetch that shard again. Nothing was written."
        )
    header = read_header(path)
    with read_errors(path):
        stat = path.stat()
    return Shard(name, path, header, stat.st_size, stat.st_mtime_ns)


def check_weight_map(index: Mapping[str, Any]) -> dict[str, str]:
    """Tensor name -> file name of a parsed index.

    Raises
    ------
    CheckpointError : there is no such map, or a file name is not a plain one or that of another file.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{INDEX_FILE!r} has no weight_map from tensor names to file names. Fetch it again.")
    for tensor, shard in weight_map.items():
        if not is_plain_name(shard) or not is_text(shard):
            raise CheckpointError(
                f"{INDEX_FILE!r} puts {shorten(tensor)} into {shorten(shard)}, which is not a plain file name. Only "
                "files in the checkpoint's folder are read: do not trust this checkpoint before you know where it "
                "comes from."
            )
        if shard in OWN_FILES:
            raise CheckpointError(
                f"{INDEX_FILE!r} puts {shorten(tensor)} into {shard!r}, which is the name of another file. Give the "
                "shard another name, and the index with it."
            )
    return weight_map


def check_index(weight_map: Mapping[str, str], held: Mapping[str, Collection[str]]) -> None:
    """Check that an index and the shards' headers name the same tensors.

    Parameters
    ----------
    weight_map : tensor name -> file name.
    held : file name -> names of the tensors in it, of every file of `weight_map`.

    Raises
    ------
    CheckpointError : a tensor is in one of them only.
    """
    listed: dict[str, set[str]] = {name: set() for name in held}
    for tensor, name in weight_map.items():
        listed[name].add(tensor)
    for name, tensors in held.items():
        for tensor in sorted(listed[name].difference(tensors)):
            raise CheckpointError(
                f"{INDEX_FILE!r} lists {shorten(tensor)} in {name!r}, which holds no such tensor. The download is "
                "probably incomplete or mixes two versions: fetch that shard again. Nothing was written."
            )
        for tensor in sorted(set(tensors) - listed[name]):
            raise CheckpointError(
                f"{name!r} holds {tensor!r}, which {INDEX_FILE!r} does not list there. Index and shards are "
                "probably of different versions: fetch both again. Nothing was written."
            )
