"""transformers: how it builds, fills, saves and refuses a compressed model.

Importing this module registers quantization method "mendlm" with transformers (written against 5.17 to 5.23). Users get
it by `import mendlm` (see `_import_hook`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mendlm.checkpoints.header import TensorInfo, read_header
from mendlm.errors import CheckpointError, UsageError, located
from mendlm.runtime import SparseLowRankLinear, resolve_runtime

logger = logging.getLogger(__name__)

METHOD = "mendlm"
VERSION = 1
LAYOUT = "packed"


class MendlmConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a compressed checkpoint.

    Parameters
    ----------
    version, layout : of the file format.
    guard : name of the empty tensor that stops loaders which do not know this method.
    modules : module path -> {"n_kept": int, "rank": int}.
    runtime : "auto", "merged", "factored" or "packed"; a choice of the moment, not saved. transformers ignores it in a
        config passed to `from_pretrained`, so use `mendlm.load`.

    Raises
    ------
    CheckpointError : no modules, or not a mapping: without them the compressed weights would be initialised at random.
    """

    def __init__(
        self,
        version: int = VERSION,
        layout: str = LAYOUT,
        guard: str | None = None,
        modules: Mapping[str, Mapping[str, int]] | None = None,
        runtime: str = "auto",
        **unknown: Any,
    ) -> None:
        self.quant_method = METHOD
        self.version, self.layout, self.guard = version, layout, guard
        if not isinstance(modules, Mapping) or not modules:
            raise CheckpointError(
                f"quantization_config has modules {modules!r}; it must name the compressed layers. Fetch config.json "
                "again. (To choose a runtime, call mendlm.load(folder, runtime=...) instead of passing a config.)"
            )
        self.modules = dict(modules)
        self.runtime = resolve_runtime(runtime)
        # transformers reads this name: True makes it forget the quantization once the model is built.
        self.dequantize = self.runtime == "merged"

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {
            "quant_method": METHOD,
            "version": self.version,
            "layout": self.layout,
            "guard": self.guard,
            "modules": self.modules,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: there are no defaults to leave out."""
        return self.to_dict()


class MendlmQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `SparseLowRankLinear` where the config says, and checks everything it is given."""

    requires_calibration = True  # refuses to "quantize" a dense model on the fly
    quantization_config: MendlmConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a file format of another time."""
        config = self.quantization_config
        if config.version != VERSION or config.layout != LAYOUT:
            raise CheckpointError(
                f"this checkpoint has layout {config.layout!r}, version {config.version!r}; this mendlm reads "
                f"{LAYOUT!r}, version {VERSION}. Install the mendlm that wrote it, or a newer one."
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        files = kwargs.get("checkpoint_files")
        if not files:
            raise UsageError("a compressed model is loaded from the files of its folder, not from a state_dict.")
        stored = _stored_tensors(files)
        _check_all_listed(stored, config.modules)
        paths = {path: _path_in_model(model, path) for path in config.modules}
        for path, facts in config.modules.items():
            linear = _linear_at(model, paths[path])
            n_kept, rank = _facts(path, facts)
            with torch.device("meta"):
                layer = SparseLowRankLinear(
                    linear.in_features,
                    linear.out_features,
                    n_kept=n_kept,
                    rank=rank,
                    bias=linear.bias is not None,
                    dtype=linear.weight.dtype,
                )
            _check_stored(path, layer, stored)
            model.set_submodule(paths[path], layer)
        # From here on in the names of this model, which are those that save_pretrained will write.
        config.modules = {paths[path]: facts for path, facts in config.modules.items()}
        if config.guard is not None:
            module = config.guard.removesuffix(".weight")
            names = {config.guard, f"{paths.get(module, module)}.weight"}
            known = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*known, *(f"^{re.escape(name)}$" for name in names)}
            config.guard = f"{paths.get(module, module)}.weight"
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        for path in config.modules:
            layer = model.get_submodule(path)
            if layer.weight_values.is_meta:
                _check_offload(path, config.runtime)
                continue
            try:
                layer.check()
            except CheckpointError as err:
                raise located(err, path) from err
            layer.set_runtime(config.runtime)
        if config.runtime == "merged":
            logger.info("the model is merged: it is dense now and save_pretrained writes it as an ordinary checkpoint")
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The packed tensors, and the guard with them.

        Raises
        ------
        UsageError : a layer was merged by hand: config.json would promise packed tensors that no longer exist.
        """
        for path in self.quantization_config.modules:
            if model.get_submodule(path).runtime == "merged":
                raise UsageError(
                    f"{path!r} is merged and the model is not, so it cannot be saved in the packed layout. "
                    "Load the checkpoint again with one runtime."
                )
        state: dict[str, Tensor] = model.state_dict()
        guard = self.quantization_config.guard
        if guard is not None:
            layer = model.get_submodule(guard.removesuffix(".weight"))
            state[guard] = torch.empty(0, dtype=layer.lora_A.dtype)
        return state, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Packed and factored models are saved packed again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """A and B can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """And without an adapter on top: transformers' `Trainer` asks for this."""
        return True


def register() -> None:
    """Tell transformers about the method; a second call does nothing, unless transformers' table was reloaded."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(MendlmConfig)
        auto.register_quantizer(METHOD)(MendlmQuantizer)


def _path_in_model(model: Any, path: str) -> str:
    """`path` of the checkpoint as this model names it; a model without a head has no ``model.`` in front."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return path


def _check_all_listed(stored: Mapping[str, TensorInfo], modules: Mapping[str, Any]) -> None:
    """Every packed layer in the files must be in config.json, or it would get random weights."""
    for name in sorted(stored):
        path, _, part = name.rpartition(".")
        if part in ("weight_values", "weight_bitmask") and path not in modules:
            raise CheckpointError(
                f"the checkpoint holds {name!r} but config.json does not list {path!r} as compressed. config.json and "
                "the weights are of different versions: fetch both again."
            )


def _check_offload(path: str, runtime: str) -> None:
    """Weights that stay on disk or in another memory can only be used packed: there is nothing here to convert."""
    if runtime != "packed":
        raise UsageError(
            f"{path!r} was offloaded by device_map, and offloaded layers cannot become {runtime}. "
            'Load with runtime="packed", or without offloading.'
        )


def _linear_at(model: Any, path: str) -> nn.Linear:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        found = "no such module" if module is None else f"a {type(module).__name__} there"
        raise CheckpointError(
            f"the checkpoint has a compressed linear layer {path!r} but {type(model).__name__} has {found}. Loading "
            "experts that transformers fuses into one tensor is not supported yet; otherwise config.json does not fit "
            "the model."
        )
    return module


def _facts(path: str, facts: Any) -> tuple[int, int]:
    try:
        n_kept, rank = int(facts["n_kept"]), int(facts["rank"])
    except (KeyError, TypeError, ValueError):
        n_kept = rank = -1
    if n_kept < 0 or rank < 0:
        raise CheckpointError(f"config.json says {facts!r} of module {path!r}; n_kept and rank >= 0 are needed.")
    return n_kept, rank


def _stored_tensors(files: Iterable[str]) -> dict[str, TensorInfo]:
    return {info.name: info for file in files for info in read_header(Path(file)).tensors}


def _check_stored(path: str, layer: SparseLowRankLinear, stored: dict[str, TensorInfo]) -> None:
    """All four tensors of a layer must be there in the shapes that model and config ask for."""
    for name in ("weight_values", "weight_bitmask", "lora_A", "lora_B"):
        full = f"{path}.{name}"
        shape = tuple(getattr(layer, name).shape)
        if full not in stored:
            raise CheckpointError(f"the checkpoint has no tensor {full!r}, which config.json promises.")
        if tuple(stored[full].shape) != shape:
            raise CheckpointError(
                f"tensor {full!r} has shape {tuple(stored[full].shape)}, config.json and the model need {shape}."
            )


register()
