"""Which tensors of a checkpoint are projections inside the blocks: one small table of name patterns.

Model knowledge lives here and nowhere else. A family is listed only if its checkpoints store every projection as
``nn.Linear`` does, (d_out, d_in), under ``layers.<i>.``. Never listed: embeddings, norms, ``lm_head`` and the routers
of mixtures of experts (``mlp.gate``, ``block_sparse_moe.gate``, ``shared_expert_gate``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from mendlm.errors import UsageError

_ATTENTION = r"self_attn\.[qkvo]_proj"
_GATED = r"(?:gate|up|down)_proj"
_LLAMA = (_ATTENTION, rf"mlp\.{_GATED}")
_GLM = (_ATTENTION, r"mlp\.(?:gate_up|down)_proj")
_EXPERTS = rf"mlp\.experts\.\d+\.{_GATED}"

FAMILIES: dict[str, tuple[str, ...]] = {
    "arcee": (_ATTENTION, r"mlp\.(?:up|down)_proj"),
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "ernie4_5": _LLAMA,
    "exaone4": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "glm": _GLM,
    "glm4": _GLM,
    "gpt_neox": (r"attention\.(?:query_key_value|dense)", r"mlp\.dense_(?:h_to_4h|4h_to_h)"),
    "granite": _LLAMA,
    "helium": _LLAMA,
    "llama": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": (_ATTENTION, r"block_sparse_moe\.experts\.\d+\.w[123]"),
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": _LLAMA,
    "olmoe": (_ATTENTION, _EXPERTS),
    "opt": (r"self_attn\.(?:[qkv]|out)_proj", r"fc[12]"),
    "phi": (r"self_attn\.(?:[qkv]_proj|dense)", r"mlp\.fc[12]"),
    "phi3": (r"self_attn\.(?:qkv|o)_proj", r"mlp\.(?:gate_up|down)_proj"),
    "qwen2": _LLAMA,
    "qwen2_moe": (*_LLAMA, _EXPERTS, rf"mlp\.shared_expert\.{_GATED}"),
    "qwen3": _LLAMA,
    "qwen3_moe": (*_LLAMA, _EXPERTS),
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": (_ATTENTION, r"mlp\.c_(?:fc|proj)"),
}

# Looked up by row, not multiplied: the packed layout and its modules are for matrix products.
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_positions|embed_in|word_embeddings|wte|wpe)\.weight$")


def choose_tensors(
    model_type: str | None,
    candidates: Sequence[str],
    all_names: Collection[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[str, ...]:
    """Names of the tensors to compress, in the order of `candidates`.

    Parameters
    ----------
    model_type : `model_type` of config.json, a key of `FAMILIES`; not looked at when `include` is given.
    candidates : the names that could be compressed at all: 2-D, floating, ending in ``.weight``.
    all_names : every tensor of the checkpoint.
    include : globs (`fnmatch`, case-sensitive). If given, exactly the candidates that match any of them are chosen.
    exclude : globs; what they match is taken out of the choice.

    Raises
    ------
    UsageError : unknown `model_type` without `include`; a glob that matches nothing; an embedding included; nothing
        chosen.
    """
    if include:
        for glob in include:
            _check_include(glob, candidates, all_names)
        chosen = [n for n in candidates if any(fnmatchcase(n, glob) for glob in include)]
    else:
        pattern = _block_pattern(model_type)
        chosen = [n for n in candidates if pattern.search(n)]
        if not chosen:
            raise UsageError(
                f"no tensor looks like a block projection of model_type {model_type!r}, e.g. {_example(candidates)}. "
                "Name the tensors to compress with --include."
            )
    for glob in exclude:
        if not any(fnmatchcase(n, glob) for n in all_names):
            raise UsageError(f"--exclude {glob!r} matches no tensor of this checkpoint, e.g. {_example(candidates)}.")
    chosen = [n for n in chosen if not any(fnmatchcase(n, glob) for glob in exclude)]
    if not chosen:
        raise UsageError("--exclude leaves no tensor to compress. Exclude less.")
    for name in chosen:
        if _EMBEDDING.search(name):
            raise UsageError(
                f"{name!r} is an embedding: its rows are looked up, so it cannot be stored as sparse + low-rank. "
                f"Add --exclude {name!r}."
            )
    return tuple(chosen)


def _check_include(glob: str, candidates: Sequence[str], all_names: Collection[str]) -> None:
    if any(fnmatchcase(n, glob) for n in candidates):
        return
    other = next((n for n in all_names if fnmatchcase(n, glob)), None)
    if other is not None:
        raise UsageError(
            f"--include {glob!r} matches {other!r} but no tensor that can be compressed: "
            "2-D, F64, F32, F16 or BF16, with a name that ends in '.weight'."
        )
    raise UsageError(f"--include {glob!r} matches no tensor of this checkpoint, e.g. {_example(candidates)}.")


def _block_pattern(model_type: str | None) -> re.Pattern[str]:
    if model_type not in FAMILIES:
        near = get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.75)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(sorted(FAMILIES))
        raise UsageError(
            f"unknown architecture: model_type {model_type!r} in config.json.{hint} Known: {known}. "
            "For another decoder whose projections are stored as (d_out, d_in), name them with --include."
        )
    return re.compile(rf"(?:^|\.)layers\.\d+\.(?:{'|'.join(FAMILIES[model_type])})\.weight$")


def _example(names: Sequence[str]) -> str:
    return repr(names[len(names) // 2]) if names else "none: it holds no 2-D floating tensor"
