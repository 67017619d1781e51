"""GGUF to an ordinary transformers checkpoint, every tensor compared with the file after a reload."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mendlm._gguf_file import GGUFFile
from mendlm._quiet import quiet_transformers
from mendlm.checkpoints.staging import check_replaceable
from mendlm.devices import DTYPES
from mendlm.errors import CheckpointError, NonFiniteError, StorageError, UsageError
from mendlm.names import lookup
from mendlm.paths import local_path

# What transformers raises on a GGUF it cannot take, besides errors of its configs: it has no class of its own for that.
_LOAD_ERRORS = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    RuntimeError,
    OSError,
    ImportError,
    ArithmeticError,
)


@dataclass(frozen=True)
class ImportResult:
    """What was imported and how it was checked.

    Attributes
    ----------
    path : the checkpoint folder.
    architecture : of the GGUF file, e.g. "llama".
    dtype : storage dtype of the checkpoint.
    n_tensors, n_parameters : tensors compared, and their entries.
    max_abs_difference : largest absolute difference between a stored entry and the file's, both in `dtype`. Always 0.0
        in a result: anything else raises.
    max_rounding : the same against the file's values in float32: what storing in `dtype` cost. 0.0 for float32; None
        where only the model in memory, rounded already, was there to compare with.
    verified_against : "gguf package" (read, dequantized and mapped independently of transformers) or "model in memory"
        (architectures whose layout mendlm does not know).
    source_bytes, output_bytes : size of the GGUF file and of the weight files.
    seconds : wall time, the check included.
    """

    path: Path
    architecture: str
    dtype: str
    n_tensors: int
    n_parameters: int
    max_abs_difference: float
    max_rounding: float | None
    verified_against: str
    source_bytes: int
    output_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON."""
        return asdict(self) | {"path": str(self.path)}


def import_gguf(
    gguf_file: str | Path, dest: str | Path, *, dtype: str | torch.dtype | None = None, overwrite: bool = False
) -> ImportResult:
    """Write the model in a GGUF file as a transformers checkpoint folder.

    Parameters
    ----------
    gguf_file : one .gguf file, of an architecture that transformers can read as a causal language model.
    dest : folder to make; its parents are made too.
    dtype : storage dtype, float32 (None), bfloat16 or float16. Dequantized values are exact in float32 only.
    overwrite : replace `dest` if it is a checkpoint folder already.

    Returns
    -------
    ImportResult

    Raises
    ------
    UsageError : no such file, not a GGUF, unknown dtype, or `dest` is in the way.
    MissingDependencyError : the `gguf` package is not installed (``pip install 'mendlm[gguf]'``).
    CheckpointError : the file is damaged, transformers cannot read it or drops a part of it, or a stored tensor
        differs from the file's.
    NonFiniteError : the file holds NaN or infinity, or `dtype` float16 cannot hold a value.
    StorageError : too little disk space, or writing failed.

    Notes
    -----
    Written into a sibling folder that takes the name `dest` at the end; a failure leaves nothing behind and an old
    `dest` untouched. Peak memory is the model in float32 plus its largest tensor a few times, twice the model for
    architectures that can only be checked against the model in memory. Every tensor is dequantized twice.
    """
    start = time.perf_counter()
    source, dest = local_path(gguf_file), local_path(dest)
    name = str(dtype or "float32").removeprefix("torch.")
    storage = lookup(DTYPES, name, "dtype")
    file = GGUFFile.open(source)
    file.check_numbers()
    file.check_rope()
    _check_dest(dest, source, overwrite)
    with quiet_transformers(), file.shared(), _new_folder(dest, file.n_parameters * storage.itemsize) as folder:
        state = _convert(file, folder, storage)
        _same_mode_for_all(folder)
        checked = _compare(folder, file, storage) if state is None else _compare_with_memory(folder, storage, state)
        output_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return ImportResult(
        path=dest,
        architecture=file.architecture,
        dtype=name,
        verified_against="gguf package" if state is None else "model in memory",
        source_bytes=source.stat().st_size,
        output_bytes=output_bytes,
        seconds=time.perf_counter() - start,
        **checked,
    )


def _convert(file: GGUFFile, folder: Path, storage: torch.dtype) -> dict[str, Tensor] | None:
    """Load with transformers, save to `folder`. Returns the model's tensors where nothing else can check them."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": file.path.name, "local_files_only": True, "trust_remote_code": False}
    # Dense weights even where a kernel could keep the blocks packed. It also drops the quantization config after
    # loading, without which the model could not be saved. Older versions have no such class and always dequantize.
    config_class = getattr(transformers, "GgufConfig", None)
    dense = {} if config_class is None else {"quantization_config": config_class(dequantize=True)}
    parent = str(file.path.parent)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            parent, dtype=torch.float32, output_loading_info=True, **dense, **place
        )
        tokenizer = AutoTokenizer.from_pretrained(parent, **place)
    except (*_LOAD_ERRORS, StrictDataclassError) as err:
        raise CheckpointError(
            f"transformers cannot import {file.path.name!r} (architecture {file.architecture!r}): "
            f"{type(err).__name__}: {' '.join(str(err).split())} Use the original checkpoint, or a newer transformers."
        ) from err
    absent = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if absent:
        raise CheckpointError(
            f"{file.path.name!r} lacks {len(absent)} tensors of the model its metadata describes, e.g. {absent[0]!r}. "
            "Fetch it again, or use the original checkpoint."
        )
    _clean_config(model, file)
    model = model.to(storage)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as err:
        raise StorageError(f"cannot write the checkpoint: {err}. Free some space, or choose another DEST.") from err
    return None if file.layout_known else dict(model.state_dict())


def _clean_config(model: Any, file: GGUFFile) -> None:
    """Take off what belongs to the GGUF, add what transformers does not read from it."""
    if getattr(model, "hf_quantizer", None) is not None:  # it and the config below keep a model from being saved
        model.hf_quantizer = None
    for key in ("quantization_config", "_model_name_or_path"):  # the second is the file's general.name
        model.config.__dict__.pop(key, None)
    theta = (getattr(model.config, "rope_parameters", None) or {}).get("rope_theta")
    if file.layout_known and theta is not None:
        n_heads = model.config.num_attention_heads
        head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // n_heads
        model.config.rope_parameters = file.llama3_rope(theta, head_dim) or model.config.rope_parameters


def _stored(folder: Path) -> dict[str, Path]:
    names = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            names.update(dict.fromkeys(shard.keys(), path))
    return names


def _compare(folder: Path, file: GGUFFile, storage: torch.dtype) -> dict[str, Any]:
    """Compare every stored tensor with the file's, read independently of transformers."""
    where = _stored(folder)
    tally = _Tally()
    for name, W in file.expected(sorted(where)):
        with safe_open(where[name], framework="pt") as shard:
            tally.add(name, shard.get_tensor(name), W, storage)
    return tally.totals()


def _compare_with_memory(folder: Path, storage: torch.dtype, state: dict[str, Tensor]) -> dict[str, Any]:
    """Compare the reloaded model with the one that was saved."""
    from transformers import AutoModelForCausalLM

    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=storage, local_files_only=True).state_dict()
    if reloaded.keys() != state.keys():
        odd = sorted(reloaded.keys() ^ state.keys())
        raise CheckpointError(f"the saved checkpoint and the model differ in {len(odd)} tensors, e.g. {odd[0]!r}.")
    tally = _Tally()
    for name, W in state.items():
        tally.add(name, reloaded[name], W, W.dtype)
    return tally.totals() | {"max_rounding": None}


class _Tally:
    """Running comparison of stored tensors with what they must be."""

    def __init__(self) -> None:
        self.n_tensors = self.n_parameters = 0
        self.max_rounding = 0.0

    def add(self, name: str, stored: Tensor, W: Tensor, storage: torch.dtype) -> None:
        if stored.shape != W.shape or stored.dtype != storage:
            raise CheckpointError(
                f"{name!r} was stored as {tuple(stored.shape)} {stored.dtype}, the file has {tuple(W.shape)} for it. "
                "Nothing was kept."
            )
        if not bool(torch.isfinite(stored).all()):
            overflow = bool(torch.isfinite(W).all())
            reason = (
                f"values up to {float(W.abs().max()):g} overflow {storage}" if overflow else "NaN or infinity in it"
            )
            raise NonFiniteError(f"{name!r}: {reason}. Use another --dtype or another file; nothing was kept.")
        want = W.to(storage)
        if not torch.equal(stored, want):
            difference = (stored.double() - want.double()).abs()
            raise CheckpointError(
                f"{name!r} differs from the file in {int((difference > 0).sum())} of {difference.numel()} entries, by "
                f"up to {float(difference.max()):g}. The import is wrong and nothing was kept; please report the file."
            )
        self.n_tensors += 1
        self.n_parameters += stored.numel()
        if storage != W.dtype and stored.numel():
            self.max_rounding = max(self.max_rounding, float((stored.float() - W).abs().max()))

    def totals(self) -> dict[str, Any]:
        return {
            "n_tensors": self.n_tensors,
            "n_parameters": self.n_parameters,
            "max_abs_difference": 0.0,
            "max_rounding": self.max_rounding,
        }


def _check_dest(dest: Path, source: Path, overwrite: bool) -> None:
    if dest.exists() and not dest.is_dir():
        raise UsageError(f"{str(dest)!r} is a file. Give a folder to write the checkpoint to.")
    if not dest.is_dir() or not any(dest.iterdir()):
        return
    check_replaceable(dest, (path.name for path in dest.iterdir()))
    if not overwrite:
        raise UsageError(f"{str(dest)!r} exists and is not empty. Use --overwrite to replace it, or another folder.")
    if source.resolve().is_relative_to(dest.resolve()):
        raise UsageError(f"{str(source)!r} lies in {str(dest)!r}, which --overwrite would remove. Give another folder.")


@contextlib.contextmanager
def _new_folder(dest: Path, n_bytes: int) -> Iterator[Path]:
    """A folder beside `dest` that becomes `dest` when the block ends well and is removed when it does not."""
    dest = dest.resolve()
    made = [parent for parent in dest.parents if not parent.exists()]  # innermost first
    folder: Path | None = None
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(dest.parent).free
        if free < n_bytes:
            raise StorageError(
                f"{str(dest)!r} needs {n_bytes} bytes, only {free} are free there. Free some space, or choose "
                "a smaller --dtype or another DEST."
            )
        folder = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=".partial", dir=dest.parent))
        yield folder
        _swap(folder, dest)
        made = []
    except OSError as err:
        if isinstance(err, StorageError):
            raise
        raise StorageError(f"cannot write {str(dest)!r}: {err}.") from err
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _swap(folder: Path, dest: Path) -> None:
    """Give `folder` the name `dest`, keeping an old `dest` until that has worked."""
    if not dest.exists():
        folder.rename(dest)
        return
    old = folder.with_suffix(".old")
    dest.rename(old)
    try:
        folder.rename(dest)
    except OSError:
        old.rename(dest)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _same_mode_for_all(folder: Path) -> None:
    """Permissions as the umask has them, for the folder and all files, and the bytes on disk.

    safetensors makes its files 0600 and `tempfile` its folder 0700; json files are made the ordinary way.
    """
    mode = (folder / "config.json").stat().st_mode & 0o777
    for path in folder.iterdir():
        path.chmod(mode)
        with path.open("rb") as written:
            os.fsync(written.fileno())
    folder.chmod(mode | (mode & 0o444) >> 2)  # who may read files may enter the folder
