"""transformers: how it builds, fills, saves and refuses a compressed model.

Importing this module registers quantization method "mendlm" with transformers (written against 5.17 to 5.23). Users get
it by `import mendlm` (see `_import_hook`).
"""

from __future__ import annotations

import logging
import re
import types
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mendlm._filling import Awaited, PackedFiles, any_index, may_match, the_one_device
from mendlm.checkpoints.header import Header, TensorInfo, read_header
from mendlm.checkpoints.plan import BITMASK, LAYOUT, METHOD, PARTS, VALUES, VERSION, packed_shapes, refuse_exported
from mendlm.errors import CheckpointError, MendError, UsageError, located
from mendlm.experts import SparseLowRankExperts, expert_layout, is_fused_experts
from mendlm.families import STACKED_LAYOUT, is_transposed, split_expert
from mendlm.runtime import SparseLowRankLinear, resolve_runtime

logger = logging.getLogger(__name__)

# What `mendlm.load` has read and checked of the files that it lets transformers open.
known_headers: ContextVar[Mapping[Path, Header]] = ContextVar("known_headers", default=types.MappingProxyType({}))


class Unchanging(dict[str, Any]):
    """A dict that copies share: transformers copies a config two dozen times while it loads."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Unchanging:
        """Itself."""
        return self


class MendlmConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a compressed checkpoint.

    Parameters
    ----------
    version, layout : of the file format.
    guard : name of the empty tensor that stops loaders which do not know this method.
    modules : path of a compressed module, as the checkpoint names it -> {"n_kept": int, "rank": int}.
    runtime : "auto" or one of `mendlm.runtime.RUNTIMES`; a choice of the moment, not saved. transformers ignores it in
        a config passed to `from_pretrained`, so use `mendlm.load`.

    Raises
    ------
    UsageError : the layout is one of `export`, for other programs.
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
        refuse_exported(layout, "this checkpoint")
        known = (version, layout) == (VERSION, LAYOUT)  # of others `validate_environment` says what they are
        if known and not (isinstance(modules, Mapping) and modules):
            raise CheckpointError(
                f"quantization_config has modules {modules!r}; it must name the compressed layers. Fetch config.json "
                "again. (To choose a runtime, call mendlm.load(folder, runtime=...) instead of passing a config.)"
            )
        self.modules = Unchanging(modules or {})
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
    """Puts `SparseLowRankLinear` where the config says, and checks everything it is given.

    Attributes
    ----------
    paths : path of each compressed module, as `save_pretrained` will write it -> its path in this model.
    guard : name of the guard in this model.
    experts : path in this model of each module of experts that was taken apart.
    """

    requires_calibration = True  # refuses to "quantize" a dense model on the fly
    quantization_config: MendlmConfig
    paths: Mapping[str, str]
    guard: str | None
    experts: tuple[str, ...]

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
        known = known_headers.get()
        self._headers = {path: known.get(path) or read_header(path) for path in map(Path, files)}
        stored = {info.name: info for header in self._headers.values() for info in header.tensors}
        _check_all_listed(stored, config.modules)
        names = _Names(model)
        self._leave_out(names.of_another_head(model, config.modules))
        places = {path: names.in_model(path) for path in config.modules}
        self.experts = _take_experts_apart(model, places, stored)
        self._inside = frozenset(change(place) for place in self.experts for change in names.prefix_changes())
        self._device = the_one_device(kwargs.get("device_map"))
        self._take_places(model, names, places, stored, filled_here=self._device is not None)
        self._sources = {place: path for path, place in places.items()}
        # From here on in the names that save_pretrained will write for this model.
        config.modules = Unchanging(
            {names.when_saved(path, places[path]): facts for path, facts in config.modules.items()}
        )
        self.paths = dict(zip(config.modules, places.values(), strict=True))
        self.guard = None
        if config.guard is not None:
            self._expect_guard(model, names, config.guard)
        return model

    def _leave_out(self, paths: Collection[str]) -> None:
        """Forget modules that the model has no use for, as transformers does with dense ones, unless none are left."""
        config = self.quantization_config
        if left := {path: facts for path, facts in config.modules.items() if path not in paths}:
            config.modules = Unchanging(left)

    def _take_places(
        self, model: Any, names: _Names, places: Mapping[str, str], stored: Mapping[str, TensorInfo], filled_here: bool
    ) -> None:
        """Put an unfilled layer in the place of every compressed one.

        transformers fills those that it spreads over devices or disk, and those in a model's list of modules to keep in
        float32; the others are an `Awaited`.
        """
        wide = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
        untold, shown, modules = set[str](), _initialized(), _modules(model)
        ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
        tied = {*ties, *ties.values()}
        for path, facts in self.quantization_config.modules.items():
            place = places[path]
            dense, d_out, d_in = _dense_layer(model, path, modules.get(place))
            if f"{place}.weight" in tied:
                raise CheckpointError(
                    f"the checkpoint has a compressed linear layer {path!r} whose weight {type(model).__name__} ties "
                    "to the embedding, as tie_word_embeddings in config.json is true. Compress the model again "
                    f"without {path!r}."
                )
            n_kept, rank = _facts(path, facts)
            _check_stored(path, packed_shapes(d_out, d_in, n_kept, rank), stored)
            layer: nn.Module
            if filled_here and not any(may_match(pattern, f"{place}.{part}") for pattern in wide for part in PARTS):
                layer = Awaited(d_in, shown, dense.weight.dtype, dense.bias)
                untold |= {path, names.renamed(path), place}
            else:
                layer = SparseLowRankLinear(
                    d_in,
                    d_out,
                    n_kept=n_kept,
                    rank=rank,
                    bias=dense.bias is not None,
                    dtype=dense.weight.dtype,
                    device="meta",
                )
                layer.show(shown)
            _put(modules, place, layer.train(dense.training))
        _pass_over(model, (f"{name}\\.({'|'.join(PARTS)})" for name in set(map(any_index, untold))))

    def _expect_guard(self, model: Any, names: _Names, guard: str) -> None:
        """Let transformers pass over the guard without a word."""
        module, _, leaf = guard.rpartition(".")
        seen = {guard, f"{names.renamed(module)}.{leaf}", f"{names.in_model(module)}.{leaf}"}
        if names.of_another_head(model, [module]):  # it would stop no loader of what is saved
            saved, place = next(iter(self.paths.items()))
            self.guard, self.quantization_config.guard = f"{place}.weight", f"{saved}.weight"
        else:
            place = names.in_model(module)
            self.guard = f"{place}.{leaf}"
            self.quantization_config.guard = f"{names.when_saved(module, place)}.{leaf}"
        _pass_over(model, (re.escape(name) for name in seen))

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Let transformers stack the experts of no module that was taken apart."""
        if self.experts:
            weight_conversions = [
                _Elsewhere.than(self._inside, c) if type(c) is WeightConverter else c for c in weight_conversions
            ]
        self._conversions = weight_conversions
        return weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        packed, modules = PackedFiles(self._headers, self._device), _modules(model)
        for path, place in self.paths.items():
            layer = modules[place]
            if isinstance(layer, Awaited):
                layer = packed.layer(self._sources[place], layer)
                _put(modules, place, layer)
            else:
                layer.show(None)
                layer.weight_values.requires_grad_(False)
            if layer.weight_values.is_meta:
                _check_offload(path, config.runtime)
                continue
            try:
                layer.check()
                layer.set_runtime(config.runtime)
            except MendError as err:
                raise located(err, path) from err
        if config.runtime == "merged":
            self._restore(model)
            logger.info("the model is merged: it is dense now and save_pretrained writes it as an ordinary checkpoint")
        return model

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """`model` merged in place, as a load with ``runtime="merged"`` has it; `model.dequantize()` calls this.

        Parameters
        ----------
        model : that this quantizer loaded.
        dtype : of the whole model afterwards; as it is if not given.

        Raises
        ------
        UsageError : a layer was offloaded by device_map.
        """
        layers = {path: model.get_submodule(place) for path, place in self.paths.items()}
        for path, layer in layers.items():
            if any(tensor.is_meta for tensor in layer.parameters()):
                _check_offload(path, "merged")
        for layer in layers.values():
            layer.set_runtime("merged")
        self._restore(model)
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)

    def _restore(self, model: Any) -> None:
        """Put dense modules in the place of merged layers: what looks for linear layers (PEFT) goes by their type."""
        modules = _modules(model)
        for path, place in self.paths.items():
            expert = split_expert(place)
            if expert is None or expert[0] not in self.experts:
                transposed = is_transposed(model.config.model_type, f"{path}.weight")
                _put(modules, place, (_conv1d if transposed else _linear)(modules[place]))
        for place in self.experts:
            experts = model.get_submodule(place)
            if any(weight.is_meta for weight in experts.parameters()):
                _check_offload(place, "merged")
            if experts.layout != STACKED_LAYOUT:
                # transformers notes which of its conversions it used, and undoes those when it saves.
                for conversion in self._conversions:
                    if isinstance(conversion, _Elsewhere):
                        for name in experts.layout.names:
                            conversion.was_used_for(f"{place}.0.{name}.weight")
            model.set_submodule(place, experts.fuse())
        if self.experts:
            model._weight_conversions = [conversion for conversion in self._conversions if conversion.was_used()]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The packed tensors, and the guard with them.

        Raises
        ------
        UsageError : a layer was merged by hand: config.json would promise packed tensors that no longer exist.
        """
        layers = {path: model.get_submodule(place) for path, place in self.paths.items()}
        for path, layer in layers.items():
            if layer.runtime == "merged":
                raise UsageError(
                    f"{path!r} is merged and the model is not, so it cannot be saved in the packed layout. "
                    "Load the checkpoint again with one runtime."
                )
        state: dict[str, Tensor] = model.state_dict()
        if self.guard is not None:
            state[self.guard] = torch.empty(0, dtype=next(iter(layers.values())).lora_A.dtype)
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


def module_places(folder: Path, paths: Iterable[str]) -> dict[str, str | None]:
    """Path of each linear layer in a checkpoint -> its path in the model that transformers builds.

    None where the model has no linear layer of that name. The model is built without memory for its weights.

    Raises
    ------
    CheckpointError : transformers cannot build it.
    """
    model = empty_model(folder)
    names = _Names(model)
    places = {path: names.in_model(path) for path in paths}
    modules = {path: _submodule(model, place) for path, place in places.items()}
    return {
        path: places[path] if isinstance(module, Conv1D) or _multiplies(module) else None
        for path, module in modules.items()
    }


def empty_model(folder: Path) -> Any:
    """The dense model of the config.json in a folder, without memory for its weights.

    Raises
    ------
    CheckpointError : transformers cannot build it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError) as err:
        reason = " ".join(str(err).split()) or type(err).__name__
        raise CheckpointError(f"transformers cannot build the model of {str(folder)!r}: {reason[:500]}") from err


class _Names:
    """What the modules of a checkpoint are called in a model, and what `save_pretrained` will call them.

    The two differ where transformers renames tensors on loading, which it undoes on saving, and in the prefix of the
    base model, which a model without a head does not have.
    """

    def __init__(self, model: Any) -> None:
        self._prefix = f"{model.base_model_prefix}."
        self._renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
        self._renamed: dict[str, str] = {}
        self._modules = _modules(model)

    def renamed(self, path: str) -> str:
        """With the names of transformers, but the prefix of the checkpoint."""
        if path not in self._renamed:
            name = f"{path}.weight"
            for renaming in self._renamings:
                name, _ = renaming.rename_source_key(name)
            self._renamed[path] = name.removesuffix(".weight")
        return self._renamed[path]

    def in_model(self, path: str) -> str:
        """Path in the model; where there is none, what it would be called."""
        renamed = self.renamed(path)
        for change in self.prefix_changes():
            if self._exists(change(renamed)):
                return change(renamed)
        return renamed

    def when_saved(self, path: str, place: str) -> str:
        """What the module of the checkpoint that is at `place` will be called in another one."""
        renamed = self.renamed(path)
        return next((change(path) for change in self.prefix_changes() if change(renamed) == place), path)

    def of_another_head(self, model: Any, paths: Iterable[str]) -> set[str]:
        """Those modules of the checkpoint that a model of another class than the checkpoint's has not: of its head."""
        if type(model).__name__ in (model.config.architectures or [type(model).__name__]):
            return set()
        tops = {name for part in (model, model.base_model) for name, _ in part.named_children()}
        return {path for path in paths if self.renamed(path).removeprefix(self._prefix).partition(".")[0] not in tops}

    def prefix_changes(self) -> tuple[Callable[[str], str], ...]:
        """Ways in which the prefix of a checkpoint may differ from the model's."""
        prefix = self._prefix
        return (str, lambda path: path.removeprefix(prefix), lambda path: prefix + path)

    def _exists(self, path: str) -> bool:
        expert = split_expert(path)
        fused = None if expert is None else self._modules.get(expert[0])
        return path in self._modules or is_fused_experts(fused)


class _Elsewhere(WeightConverter):  # type: ignore[misc]
    """A conversion that leaves alone what is inside some modules."""

    inside: frozenset[str] = frozenset()

    @classmethod
    def than(cls, inside: frozenset[str], converter: Any) -> _Elsewhere:
        """`converter`, but for what is inside the modules `inside`."""
        new = cls(
            list(converter._original_source_patterns),
            list(converter._original_target_patterns),
            operations=converter.operations,
        )
        for name in ("scope_prefix", "base_model_prefix", "force_cpu"):
            if hasattr(converter, name):
                setattr(new, name, getattr(converter, name))
        new.inside = inside
        return new

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """(`source_key`, None), which says "no match", for what is inside."""
        parts = source_key.split(".")
        if not self.inside.isdisjoint(".".join(parts[:n]) for n in range(1, len(parts))):
            return source_key, None
        renamed: tuple[str, str | None] = super().rename_source_key(source_key)
        return renamed

    def was_used_for(self, source_key: str) -> None:
        """Note that the checkpoint had a tensor `source_key`, if the conversion is for such a one."""
        super().rename_source_key(source_key)


def _pass_over(model: Any, patterns: Iterable[str]) -> None:
    """Let transformers be silent about tensors in the files that the model does not ask for."""
    known = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = {*known, *(f"^{pattern}$" for pattern in patterns)}


def _take_experts_apart(model: Any, places: Mapping[str, str], stored: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Replace the fused experts that have a compressed projection; their paths in the model."""
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    sources: dict[str, str] = {}
    for path, place in places.items():
        expert, source = split_expert(place), split_expert(path)
        if expert is None or source is None or not is_fused_experts(_submodule(model, expert[0])):
            continue
        found[expert[0]][expert[2]].append(expert[1])
        sources[expert[0]] = source[0]
    for place, indices in found.items():
        fused = model.get_submodule(place)
        stacked = any(f"{sources[place]}.{name}" in stored for name in STACKED_LAYOUT.names)
        try:
            layout = expert_layout(indices, stacked=stacked)
        except MendError as err:
            raise located(err, place) from err
        kept: list[str] = []
        if layout == STACKED_LAYOUT:
            kept = [name for name in layout.names if name not in indices]
            for name, some in indices.items():
                if sorted(some) != list(range(fused.down_proj.shape[0])):
                    raise CheckpointError(f"config.json lists {place}.*.{name} for some experts only. Fetch it again.")
        model.set_submodule(place, SparseLowRankExperts(fused, layout, kept))
    return tuple(found)


def _check_all_listed(stored: Mapping[str, TensorInfo], modules: Mapping[str, Any]) -> None:
    """Every packed layer in the files must be in config.json, or it would get random weights."""
    for name in sorted(stored):
        path, _, part = name.rpartition(".")
        if part in (VALUES, BITMASK) and path not in modules:
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


def _dense_layer(model: Any, path: str, module: nn.Module | None) -> tuple[Any, int, int]:
    """`module` itself, which the model has where the checkpoint has a compressed layer, and its d_out and d_in."""
    # Asked of the table and of the model, as the shape of a square matrix does not tell which way round it is.
    transposed = is_transposed(model.config.model_type, f"{path}.weight")
    if isinstance(module, Conv1D) and transposed:
        d_in, d_out = module.weight.shape
    elif _multiplies(module) and not transposed:
        d_out, d_in = module.weight.shape
    else:
        found = "no such module" if module is None else f"a {type(module).__name__} there"
        raise CheckpointError(
            f"the checkpoint has a compressed linear layer {path!r}"
            f"{', turned from (d_in, d_out),' if transposed else ''} but {type(model).__name__} has {found}. "
            "config.json does not fit the model, or mendlm does not know how this family keeps its weights."
        )
    return module, d_out, d_in


def _multiplies(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer that computes ``x Wᵀ + bias`` and nothing else.

    Subclasses with a `forward` of their own compute something else: block by block, or a choice of experts. Falcon's
    computes the same.
    """
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or type(module).__name__ == "FalconLinear"


def _initialized() -> Tensor:
    """What a layer shows as its weight while it is loaded: some models (GPT-2) initialise that of a child by name."""
    weight = torch.empty(0, device="meta")
    setattr(weight, "_is_hf_initialized", True)  # noqa: B010 (transformers' own mark, unknown to type checkers)
    return weight


def _conv1d(layer: SparseLowRankLinear) -> nn.Module:
    """A `Conv1D` with the weight and the bias of a merged layer."""
    with torch.device("meta"):
        conv: nn.Module = Conv1D(layer.out_features, layer.in_features)
    conv.weight = nn.Parameter(layer.weight.detach().T.contiguous())
    conv.register_parameter("bias", layer.bias)
    return conv.train(layer.training)


def _linear(layer: SparseLowRankLinear) -> nn.Module:
    """An `nn.Linear` with the weight and the bias of a merged layer."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.register_parameter("weight", nn.Parameter(layer.weight.detach()))
    linear.register_parameter("bias", layer.bias)
    return linear.train(layer.training)


def _submodule(model: Any, path: str) -> nn.Module | None:
    try:
        module: nn.Module = model.get_submodule(path)
    except AttributeError:
        return None
    return module


def _modules(model: Any) -> dict[str, Any]:
    """Every module of a model by its path; faster, for many, than walking to each."""
    return dict(model.named_modules(remove_duplicate=False))


def _put(modules: Mapping[str, Any], path: str, module: nn.Module) -> None:
    """Put a module into the parent that its path names."""
    parent, _, name = path.rpartition(".")
    setattr(modules[parent], name, module)


def _facts(path: str, facts: Any) -> tuple[int, int]:
    try:
        n_kept, rank = int(facts["n_kept"]), int(facts["rank"])
    except (KeyError, TypeError, ValueError):
        n_kept = rank = -1
    if n_kept < 0 or rank < 0:
        raise CheckpointError(f"config.json says {facts!r} of module {path!r}; n_kept and rank >= 0 are needed.")
    return n_kept, rank


def _check_stored(path: str, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, TensorInfo]) -> None:
    """All four tensors of a layer must be there in the shapes that model and config ask for."""
    for name, shape in shapes.items():
        full = f"{path}.{name}"
        if full not in stored:
            raise CheckpointError(f"the checkpoint has no tensor {full!r}, which config.json promises.")
        if tuple(stored[full].shape) != shape:
            raise CheckpointError(
                f"tensor {full!r} has shape {tuple(stored[full].shape)}, config.json and the model need {shape}."
            )


register()
