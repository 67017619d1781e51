"""`load`: a folder, compressed or dense, as a transformers model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mendlm.checkpoints.folder import open_folder
from mendlm.checkpoints.header import Header, check_shape
from mendlm.checkpoints.plan import METHOD, refuse_exported
from mendlm.checkpoints.reader import find_weights, open_shards, read_json_object
from mendlm.devices import DTYPES, resolve_device
from mendlm.errors import CheckpointError, MendError, UsageError, located
from mendlm.linalg import WEIGHT_DTYPES
from mendlm.names import lookup
from mendlm.paths import local_path
from mendlm.runtime import SparseLowRankLinear, resolve_runtime, runtime_on


def load(
    path: str | Path,
    *,
    runtime: str = "auto",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Open a checkpoint folder as a causal language model in eval mode.

    Parameters
    ----------
    path : a folder that mendlm wrote, or any dense transformers folder; ``~`` is the home folder. Nothing is
        downloaded, no code in it is run.
    runtime : for a compressed folder, how its layers compute: "merged", "factored", "packed", "semi-structured", or
        "auto", which is merged: no other is as fast as a dense layer for every number of tokens (docs/runtimes.md).
    dtype : of the weights in memory, a floating `torch.dtype` or its name; that of the checkpoint if not given.
    device : where to put the model; CPU if not given.

    Returns
    -------
    A `transformers.PreTrainedModel`. Loading reads the packed tensors and converts layer by layer: at most one layer is
    in memory twice.

    Raises
    ------
    UsageError : no such folder, no checkpoint in it, pickles only, an adapter or an export that is no model, an unknown
        runtime, dtype or device, a runtime for a dense folder, or "semi-structured" where device, dtype or a layer
        (named) does not allow it.
    CheckpointError : the folder is damaged: config.json or a tensor is missing, a tensor has another shape, or its
        bitmask is inconsistent.
    """
    folder, compressed = local_path(path), is_compressed(path)
    headers = _check_files(folder)
    resolved = resolve_runtime(runtime)
    compute = _resolve_dtype(dtype)
    where = None if device is None else resolve_device(str(device))
    if not compressed and runtime != "auto":
        raise UsageError(f"{str(path)!r} is not compressed by mendlm, so there is no runtime {runtime!r} to choose.")
    if compressed:
        resolved = _runtime_for(folder, runtime, compute, where or torch.device("cpu"))
    # torch makes semi-structured tensors on the device only: packed weights move there first.
    at_first = "packed" if resolved == "semi-structured" else resolved
    model = _from_pretrained(folder, at_first if compressed else None, compute, headers)
    if where is not None:
        model = model.to(where)
    if compressed and resolved == "semi-structured":
        _convert(model, resolved)
    return model


def is_compressed(path: str | Path) -> bool:
    """Whether mendlm wrote the checkpoint in a folder, by its config.json.

    Raises
    ------
    UsageError : no such folder, or it is no checkpoint, or an export for other programs.
    CheckpointError : config.json is not there or cannot be read.
    """
    folder = local_path(path)
    if not folder.is_dir():
        raise UsageError(f"{str(path)!r} is no folder. Download the model first and give the folder that holds it.")
    if not (folder / "config.json").is_file():
        find_weights(folder)  # says what is there in its place
        raise UsageError(f"{str(path)!r} holds no config.json: it is not a transformers checkpoint.")
    quantization = read_json_object(folder / "config.json").get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        return False
    refuse_exported(quantization.get("layout"), repr(str(path)))
    return True


def _resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype meant; None is the checkpoint's, which transformers calls "auto"."""
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, str):
        return lookup(DTYPES, dtype, "dtype")
    if dtype not in WEIGHT_DTYPES:
        raise UsageError(f"dtype must be a floating one of 16 bits or more, e.g. torch.bfloat16, got {dtype!r}.")
    return dtype


def _check_files(folder: Path) -> dict[Path, Header]:
    """Look at what transformers takes on trust: paths in the index, headers (returned), and the number of layers.

    Raises
    ------
    UsageError : it holds no safetensors.
    CheckpointError : a file is missing, damaged or unsafe, or config.json asks for more layers than there are tensors.
    """
    headers = {shard.path: shard.header for shard in open_shards(folder)}
    n_tensors = sum(len(header.tensors) for header in headers.values())
    config = read_json_object(folder / "config.json")
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        n_layers = config.get(key)
        if n_tensors and isinstance(n_layers, int) and n_layers > n_tensors:
            raise CheckpointError(
                f"config.json of {str(folder)!r} says {key} {n_layers}, and its files hold {n_tensors} tensors. "
                "They are of different models: fetch both again."
            )
    return headers


def _runtime_for(folder: Path, name: str, dtype: torch.dtype | None, device: torch.device) -> str:
    """`runtime_on` for the layers of a folder, before it is loaded."""
    config = read_json_object(folder / "config.json")
    stated = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    in_memory = dtype or (stated if isinstance(stated, torch.dtype) else torch.float32)
    return runtime_on(name, _bitmasks(folder), in_memory, device)


def _bitmasks(folder: Path) -> Iterator[tuple[str, Tensor, int]]:
    """Path, bitmask and d_in of every compressed layer; nothing is opened before the first is asked for."""
    for name, packed in open_folder(folder).packed.items():
        yield name.removesuffix(".weight"), packed.bitmask.read(), packed.shape[1]


def _convert(model: Any, runtime: str) -> None:
    for path, layer in model.named_modules():
        if isinstance(layer, SparseLowRankLinear):
            try:
                layer.set_runtime(runtime)
            except UsageError as err:
                raise located(err, path) from err


def _check_shapes(folder: Path, headers: Mapping[Path, Header]) -> None:
    """Refuse a tensor that has not the shape of its place in the model of config.json."""
    from mendlm.hf import empty_model

    wanted = {name: tuple(value.shape) for name, value in empty_model(folder).state_dict().items()}
    for path, header in headers.items():
        for info in header.tensors:
            if info.name in wanted:
                check_shape(info, path.name, wanted[info.name])


def _from_pretrained(
    folder: Path, runtime: str | None, dtype: torch.dtype | None, headers: Mapping[Path, Header]
) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    from mendlm import hf
    from mendlm._quiet import quiet_transformers

    hf.register()
    known = hf.known_headers.set(headers)
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if runtime is not None:
                facts = config.quantization_config
                modules = hf.Unchanging(facts["modules"]) if isinstance(facts.get("modules"), dict) else None
                config.quantization_config = {**facts, "modules": modules, "runtime": runtime}
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype="auto" if dtype is None else dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,  # the alternative are pickles
                output_loading_info=True,
            )
        except MendError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as err:
            if "ignore_mismatched_sizes" in str(err):  # it says that some do not fit, not which
                _check_shapes(folder, headers)
            reason = " ".join(str(err).split()) or type(err).__name__
            raise CheckpointError(f"transformers cannot open {str(folder)!r}: {reason[:500]}") from err
        finally:
            hf.known_headers.reset(known)
    # transformers fills what is missing with random numbers and warns, which nobody sees here.
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{str(folder)!r} lacks {len(missing)} tensors that the model needs, e.g. {missing[0]!r}. "
            "The download is probably incomplete: fetch it again."
        )
    return model
