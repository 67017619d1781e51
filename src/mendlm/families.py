"""Which tensors of a checkpoint are projections inside the blocks, and how they are stored: one small table.

Model knowledge lives here and nowhere else. Never listed: embeddings, norms, ``lm_head`` and the routers of mixtures of
experts (``mlp.gate``, ``block_sparse_moe.gate``, ``shared_expert_gate``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from mendlm.errors import UsageError


@dataclass(frozen=True)
class Family:
    """How one family names and stores its projections.

    Attributes
    ----------
    projections : regexes of the modules inside a block whose ``.weight`` is a projection.
    blocks : name of the list of blocks.
    transposed : whether these weights are stored as (d_in, d_out), as `Conv1D` of transformers does.
    stacked : regex of the tensors inside a block that hold one (d_out, d_in) matrix for each expert, if there are any.
    renames : pairs of a part of a tensor's name and what transformers calls it in the tree of modules.
    """

    projections: tuple[str, ...]
    blocks: str = "layers"
    transposed: bool = False
    stacked: str | None = None
    renames: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ExpertLayout:
    """Names of the projections of one expert, ``down(act(gate(x)) * up(x))``.

    Attributes
    ----------
    gate_up : (gate, up), or the one that computes both, gate first.
    down : the last one.
    """

    gate_up: tuple[str, ...]
    down: str

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.gate_up, self.down)


# The last one is that of experts stacked into 3-D tensors.
EXPERT_LAYOUTS = (
    ExpertLayout(("gate_proj", "up_proj"), "down_proj"),
    ExpertLayout(("w1", "w3"), "w2"),
    ExpertLayout(("gate_up_proj",), "down_proj"),
)
STACKED_LAYOUT = EXPERT_LAYOUTS[-1]

_ATTENTION = r"self_attn\.[qkvo]_proj"
_GATED = r"(?:gate|up|down)_proj"
_GATED_MLP = rf"mlp\.{_GATED}"
_EXPERTS = rf"mlp\.experts\.\d+\.{_GATED}"
_STACKED = r"mlp\.experts\.(?:gate_up|down)_proj"
_LLAMA = Family((_ATTENTION, _GATED_MLP))
_GLM = Family((_ATTENTION, r"mlp\.(?:gate_up|down)_proj"))

FAMILIES: dict[str, Family] = {
    "arcee": Family((_ATTENTION, r"mlp\.(?:up|down)_proj")),
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "ernie4_5": _LLAMA,
    "exaone4": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "glm": _GLM,
    "glm4": _GLM,
    "gpt2": Family((r"attn\.c_(?:attn|proj)", r"mlp\.c_(?:fc|proj)"), blocks="h", transposed=True),
    "gpt_neox": Family((r"attention\.(?:query_key_value|dense)", r"mlp\.dense_(?:h_to_4h|4h_to_h)")),
    "granite": _LLAMA,
    "helium": _LLAMA,
    "llama": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Family(
        (_ATTENTION, r"(?:block_sparse_moe|mlp)\.experts\.\d+\.w[123]"),
        stacked=_STACKED,
        renames=((".block_sparse_moe.", ".mlp."),),
    ),
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": _LLAMA,
    "olmoe": Family((_ATTENTION, _EXPERTS), stacked=_STACKED),
    "opt": Family((r"self_attn\.(?:[qkv]|out)_proj", r"fc[12]")),
    "phi": Family((r"self_attn\.(?:[qkv]_proj|dense)", r"mlp\.fc[12]")),
    "phi3": Family((r"self_attn\.(?:qkv|o)_proj", r"mlp\.(?:gate_up|down)_proj")),
    "qwen2": _LLAMA,
    "qwen2_moe": Family((_ATTENTION, _GATED_MLP, _EXPERTS, rf"mlp\.shared_expert\.{_GATED}"), stacked=_STACKED),
    "qwen3": _LLAMA,
    "qwen3_moe": Family((_ATTENTION, _GATED_MLP, _EXPERTS), stacked=_STACKED),
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": Family((_ATTENTION, r"mlp\.c_(?:fc|proj)")),
}

# Looked up by row, not multiplied: the packed layout and its modules are for matrix products.
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_positions|embed_in|word_embeddings|wte|wpe)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")
_BLOCK_LISTS = "|".join(sorted({family.blocks for family in FAMILIES.values()}))
_IN_BLOCK = re.compile(rf"((?:.*?\.)?(?:{_BLOCK_LISTS}))\.(\d+)\.(.+)", re.DOTALL)
_EXPERT_NAMES = "|".join(sorted({name for layout in EXPERT_LAYOUTS for name in layout.names}))
_EXPERT = re.compile(rf"((?:.+\.)?experts)\.(\d+)\.({_EXPERT_NAMES})")


def split_block(name: str) -> tuple[str, int, str] | None:
    """("model.layers", 3, "mlp.up_proj.weight") of "model.layers.3.mlp.up_proj.weight"; None outside the blocks."""
    found = _IN_BLOCK.fullmatch(name)
    return None if found is None else (found[1], int(found[2]), found[3])


def block_of(name: str, model_type: str | None) -> int | None:
    """Index of the block that a tensor belongs to, norms and biases included; None for what is outside of them.

    For an unknown `model_type` every name of a list of blocks counts.
    """
    found = split_block(name)
    if found is None:
        return None
    family = FAMILIES.get(str(model_type))
    return found[1] if family is None or found[0].rpartition(".")[2] == family.blocks else None


def module_name(model_type: str | None, name: str) -> str:
    """What transformers calls a tensor of the checkpoint in the tree of modules; the prefix stays as it is."""
    family = FAMILIES.get(str(model_type))
    for old, new in family.renames if family is not None else ():
        name = name.replace(old, new)
    return name


def split_expert(path: str) -> tuple[str, int, str] | None:
    """("….experts", 5, "up_proj") of the module path "….experts.5.up_proj"; None if it is no expert's projection."""
    found = _EXPERT.fullmatch(path)
    return None if found is None else (found[1], int(found[2]), found[3])


def place_of(name: str) -> tuple[int | None, str]:
    """(layer, projection) of a weight, experts together: "mlp.experts.down_proj"; layer None outside of the blocks."""
    split = split_block(name)
    if split is None:
        return None, name
    path = split[2].removesuffix(".weight")
    expert = split_expert(path)
    return split[1], path if expert is None else f"{expert[0]}.{expert[2]}"


def short_names(projections: Iterable[str]) -> dict[str, str]:
    """Projection -> its last word, as far as that is one projection's alone."""
    unique = list(dict.fromkeys(projections))
    last = [name.rpartition(".")[2] for name in unique]
    return {name: word if last.count(word) == 1 else name for name, word in zip(unique, last, strict=True)}


def expert_name(name: str, index: int) -> str:
    """The name that slice `index` of a stacked tensor is compressed under: ``….experts.5.down_proj.weight``."""
    path, _, projection = name.rpartition(".")
    return f"{path}.{index}.{projection}.weight"


def is_transposed(model_type: str | None, name: str) -> bool:
    """Whether a tensor is a projection that its family stores as (d_in, d_out)."""
    family = FAMILIES.get(str(model_type))
    return family is not None and family.transposed and _block_pattern(model_type).search(name) is not None


def can_be_compressed(model_type: str | None, name: str, n_dim: int) -> bool:
    """Whether a tensor is a matrix, or one matrix for each expert in a family that stacks them."""
    family = FAMILIES.get(str(model_type))
    if n_dim == 3 and family is not None and family.stacked is not None:
        return _block_regex(family.blocks, family.stacked).search(name) is not None
    return n_dim == 2 and name.endswith(".weight")


def choose_tensors(
    model_type: str | None,
    candidates: Sequence[str],
    all_names: Collection[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tied: bool = False,
) -> tuple[str, ...]:
    """Names of the tensors to compress, in the order of `candidates`.

    Parameters
    ----------
    model_type : `model_type` of config.json, a key of `FAMILIES`; not looked at when `include` is given.
    candidates : the names that could be compressed at all: `can_be_compressed`.
    all_names : every tensor of the checkpoint.
    include : globs (`fnmatch`, case-sensitive). If given, exactly the candidates that match any of them are chosen.
    exclude : globs; what they match is taken out of the choice.
    tied : whether the output layer is the embedding (``tie_word_embeddings``); a checkpoint may hold both nevertheless.

    Raises
    ------
    UsageError : unknown `model_type` without `include`; a glob that matches nothing; an embedding, or an output
        layer tied to one, included; nothing chosen.
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
        if tied and _HEAD.search(name):
            raise UsageError(
                f"{name!r} is tied to the embedding, as tie_word_embeddings in config.json is true, so it cannot be "
                f"stored as sparse + low-rank. Add --exclude {name!r}, or set that to false if the two differ."
            )
    return tuple(chosen)


def _check_include(glob: str, candidates: Sequence[str], all_names: Collection[str]) -> None:
    if any(fnmatchcase(n, glob) for n in candidates):
        return
    other = next((n for n in all_names if fnmatchcase(n, glob)), None)
    if other is not None:
        raise UsageError(
            f"--include {glob!r} matches {other!r} but no tensor that can be compressed: "
            "2-D, F64, F32, F16 or BF16, with a name that ends in '.weight' (or 3-D experts of a family that is known)."
        )
    raise UsageError(f"--include {glob!r} matches no tensor of this checkpoint, e.g. {_example(candidates)}.")


def _block_pattern(model_type: str | None) -> re.Pattern[str]:
    family = FAMILIES.get(str(model_type))
    if family is None:
        near = get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.75)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(sorted(FAMILIES))
        raise UsageError(
            f"unknown architecture: model_type {model_type!r} in config.json.{hint} Known: {known}. "
            "For another decoder whose projections are stored as (d_out, d_in), name them with --include."
        )
    weights = rf"(?:{'|'.join(family.projections)})\.weight"
    return _block_regex(family.blocks, weights if family.stacked is None else f"(?:{weights}|{family.stacked})")


def _block_regex(blocks: str, rest: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|\.){blocks}\.\d+\.{rest}$")


def _example(names: Sequence[str]) -> str:
    return repr(names[len(names) // 2]) if names else "none: it holds no 2-D floating tensor"
