"""`peft`: S as an ordinary checkpoint, B and A as a LoRA adapter in PEFT's own format.

PEFT computes ``W x + (lora_alpha / r) B A x``, so alpha = r everywhere. Where ranks differ, `rank_pattern` and
`alpha_pattern` must hold the same numbers: with the first alone PEFT scales by another factor, without a word.

In some mixtures of experts PEFT takes every target module with the name of an expert's projection for the experts, as
transformers 4 had them, and adapts those instead. Such layers, of a dense MLP or a shared expert, are named as
`target_parameters`, which PEFT leaves as they are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mendlm.checkpoints.reader import ADAPTER_CONFIG
from mendlm.errors import CheckpointError, UsageError
from mendlm.exporting._base import BASE, Layer, Layout, Source, Stored, refuse_experts
from mendlm.families import split_expert

ADAPTER_FILE = "adapter_model.safetensors"
# `_MOE_TARGET_MODULE_MAPPING` of peft 0.21, by the architecture that a model's tensors are converted like.
_TAKEN_FOR_EXPERTS = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of vLLM's max_lora_rank


class Peft(Layout):
    """The adapter in the exported folder, S in its subfolder ``base``.

    Parameters
    ----------
    uniform_rank : pad every factor with zeros to one rank: "auto" for the smallest of `VLLM_RANKS` that holds all, or a
        number; None keeps each layer's own rank.
    base_name : what the adapter's config calls the model it belongs to; `DEST/base` if not given.
    dest : the exported folder, as the user calls it.
    """

    name = "peft"
    summary = "S as an ordinary checkpoint (DEST/base) and a LoRA adapter in PEFT's format (DEST)"
    base = BASE

    def __init__(
        self, *, uniform_rank: int | str | None = None, base_name: str | None = None, dest: str = "DEST"
    ) -> None:
        self._wanted = uniform_rank
        self._base_name = base_name or f"{dest.rstrip('/')}/{BASE}"
        self._uniform: int | None = None
        self._places: Mapping[str, str] = {}
        self._taken: Collection[str] = ()

    def check(self, source: Source) -> None:
        """Experts have no module of their own in transformers 5, so no adapter either; nor has a model without factors.

        Raises
        ------
        UsageError : one of these, or a `uniform_rank` below the largest rank.
        """
        for layer in source.layers:
            if split_expert(layer.path) is not None:
                raise refuse_experts(
                    layer,
                    "transformers keeps all experts of a block in one 3-D tensor, to which PEFT cannot attach a "
                    "factor of its own for each expert.",
                )
        if source.max_rank == 0:
            raise UsageError("the folder has rank 0 everywhere, so there is no adapter to write. Export --to dense.")
        self._uniform = _uniform_rank(self._wanted, source.max_rank)
        self._places = _places(source)
        self._taken = _taken_for_experts(source.config)

    def stored(self, layer: Layer, file: str) -> Sequence[Stored]:
        """S in the base, the factors in the adapter; a layer of rank 0 has none."""
        S = Stored(f"{BASE}/{file}", f"{layer.path}.weight", layer.dtype, layer.dense_shape)
        if not layer.packed.rank:
            return [S]
        d_out, d_in = layer.shape
        rank = self._rank(layer)
        stem = f"base_model.model.{self._places[layer.path]}"
        return [
            S,
            Stored(ADAPTER_FILE, f"{stem}.lora_A.weight", layer.dtype, (rank, d_in)),
            Stored(ADAPTER_FILE, f"{stem}.lora_B.weight", layer.dtype, (d_out, rank)),
        ]

    def tensors(self, layer: Layer) -> Iterator[Tensor]:
        """S bit for bit; A and B bit for bit, with zeros below and beside them if they are padded."""
        out = layer.read()
        yield out.S.T.contiguous() if layer.transposed else out.S
        if out.rank:
            more = self._rank(layer) - out.rank
            yield torch.nn.functional.pad(out.A, (0, 0, 0, more))
            yield torch.nn.functional.pad(out.B, (0, more))

    def files(self, source: Source) -> Mapping[str, bytes]:
        """adapter_config.json."""
        return {ADAPTER_CONFIG: json.dumps(self._adapter_config(source), indent=2).encode() + b"\n"}

    def card(self, dest: str) -> str:
        """How to load it with PEFT, transformers, vLLM."""
        return f"""`base/` holds S as an ordinary checkpoint, this folder the factors as a LoRA adapter
(`lora_alpha = r`: nothing is scaled). **S without the adapter is worse than plain pruning: always load both.** Merging
the adapter destroys the zeros of S.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{dest}/base", dtype="auto")
model = PeftModel.from_pretrained(model, "{dest}")  # is_trainable=True trains B and A on; S keeps its zeros
# or, without PEFT's class but with PEFT installed: model.load_adapter("{dest}")
```

vLLM reads one rank for all layers: export with `--uniform-rank auto`, then serve `{dest}/base` with `--enable-lora`,
`--lora-modules mended={dest}` and `--max-lora-rank` of that rank, and ask for the model `mended`.
"""

    def _rank(self, layer: Layer) -> int:
        return self._uniform or layer.packed.rank

    def _target(self, place: str) -> str:
        """What PEFT is told to adapt: the module, or its weight where it would take the module for an expert's."""
        return f"{place}.weight" if place.rpartition(".")[2] in self._taken else place

    def _adapter_config(self, source: Source) -> dict[str, Any]:
        layers = [layer for layer in source.layers if layer.packed.rank]
        r = self._uniform or source.max_rank
        targets = {layer.path: self._target(self._places[layer.path]) for layer in layers}
        pattern = {targets[layer.path]: self._rank(layer) for layer in layers if self._rank(layer) != r}
        modules = [place for place in targets.values() if not place.endswith(".weight")]
        parameters = [weight for weight in targets.values() if weight.endswith(".weight")]
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self._base_name,
            "r": r,
            "lora_alpha": r,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": modules,
            **({"target_parameters": parameters} if parameters else {}),
            "fan_in_fan_out": any(layer.transposed for layer in layers),
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }


def _uniform_rank(wanted: int | str | None, max_rank: int) -> int | None:
    if wanted is None:
        return None
    if wanted == "auto":
        fits = [rank for rank in VLLM_RANKS if rank >= max_rank]
        if not fits:
            raise UsageError(
                f"the largest rank is {max_rank}, above the largest that vLLM serves ({VLLM_RANKS[-1]}). "
                "Give --uniform-rank a number, or leave it out."
            )
        return fits[0]
    if not isinstance(wanted, int) or wanted < max_rank:
        raise UsageError(
            f"uniform_rank is {wanted!r}; it must be 'auto' or a whole number from the largest rank, {max_rank}, on."
        )
    return wanted


def _taken_for_experts(config: Mapping[str, Any]) -> Collection[str]:
    """Last words of the modules that PEFT takes for experts' in a model of this config, or of one that it holds."""
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as CONVERTED_LIKE

    inner = [value for value in config.values() if isinstance(value, dict)]
    kinds = [str(held.get("model_type")) for held in (config, *inner)]
    return {word for kind in kinds for word in _TAKEN_FOR_EXPERTS.get(CONVERTED_LIKE.get(kind, kind), ())}


def _places(source: Source) -> Mapping[str, str]:
    """Path of every layer in the checkpoint -> its path in the model that transformers builds."""
    from mendlm.hf import module_places

    places = module_places(source.folder, [layer.path for layer in source.layers])
    lost = next((path for path, place in places.items() if place is None), None)
    if lost is not None:
        raise CheckpointError(
            f"transformers builds a model without a linear layer {lost!r} from config.json, so there is nothing to "
            "adapt. Export --to dense."
        )
    return {path: str(place) for path, place in places.items()}
