"""The rest of an output folder: config, index, and the files that are copied as they are."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mendlm.checkpoints.reader import CONFIG_FILE, INDEX_FILE, OWN_FILES, SINGLE_FILE, Checkpoint, inside, read_errors
from mendlm.checkpoints.writer import ShardLayout

# Weights in other forms, code, and what mendlm writes itself.
_LEFT_OUT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".onnx", ".onnx_data"),
    *(".h5", ".msgpack", ".npz", ".npy", ".tflite", ".ot", ".index.json", ".py", ".pyc"),
)
# transformers would take an adapter's config for the folder's own, and load the model that it names instead.
_LEFT_OUT = {*OWN_FILES, SINGLE_FILE}


def is_left_out(name: str) -> bool:
    """Whether a file of this name is not copied from one folder to another: weights, code, what mendlm writes."""
    return name in _LEFT_OUT or name.lower().endswith(_LEFT_OUT_SUFFIXES)


def side_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the files that are copied: tokenizer, generation config, chat template, licence and the like.

    Weights, whatever the index calls their files, code, hidden files and subfolders stay out.

    Raises
    ------
    CheckpointError : one of them is a link that leads out of the folder.
    """
    shards = {shard.name for shard in checkpoint.shards}
    with read_errors(checkpoint.folder):
        names = sorted(
            path.name
            for path in checkpoint.folder.iterdir()
            if path.is_file() and not path.name.startswith(".") and not is_left_out(path.name)
            if path.name not in shards
        )
    for name in names:
        inside(checkpoint.folder, name)
    return tuple(names)


def input_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of all files of the input that decide the output, sorted."""
    names = {shard.name for shard in checkpoint.shards} | {CONFIG_FILE} | set(side_files(checkpoint))
    return tuple(sorted(names | ({INDEX_FILE} if checkpoint.index is not None else set())))


def make_config(checkpoint: Checkpoint, quantization: Mapping[str, Any], storage_dtype: str | None) -> dict[str, Any]:
    """config.json of the output: the original's, plus `quantization_config`, in the new dtype if there is one."""
    config = copy.deepcopy(dict(checkpoint.config))
    if storage_dtype is not None:
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
            config[key] = storage_dtype
    return config | {"quantization_config": dict(quantization)}


def make_index(checkpoint: Checkpoint, layouts: Iterable[ShardLayout]) -> dict[str, Any]:
    """model.safetensors.index.json of the output: the original's metadata with the new size and tensor names."""
    weight_map = {name: layout.name for layout in layouts for name in layout.infos}
    total = sum(layout.data_bytes for layout in layouts)
    metadata = (checkpoint.index or {}).get("metadata")
    return {
        "metadata": (metadata if isinstance(metadata, dict) else {}) | {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON text as transformers writes it; halves of surrogate pairs, which UTF-8 lacks, stay escaped as JSON does."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name -> {"sha256", "size_bytes"} of files in `folder`, read piece by piece.

    As many at a time as torch has threads: a GB takes a thread a second, which is most of what the end of a run costs.
    """
    paths = {name: folder / name for name in names}
    n_threads = min(torch.get_num_threads(), len(paths))
    if n_threads < 2:
        return {name: _hash_file(path) for name, path in paths.items()}
    pool = ThreadPoolExecutor(n_threads)
    try:
        return dict(zip(paths, pool.map(_hash_file, paths.values()), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _hash_file(path: Path) -> dict[str, Any]:
    with read_errors(path), path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size_bytes": file.seek(0, os.SEEK_END)}
