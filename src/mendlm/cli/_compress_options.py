"""The options of `mendlm compress`. No default is written into a flag: what is not given leaves the recipe alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_WHAT, _HOW, _TEXT, _RUN = "What to prune", "How to mend", "Calibration", "Run and output"


RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="A built-in recipe ('mendlm recipes' lists them), or one in YAML or JSON; the other flags override it.",
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="Settings in place of a recipe: fast (no data), balanced (text, minutes) or best (text, longer).",
    ),
]
CriterionOption = Annotated[
    str | None,
    typer.Option(
        "--criterion",
        metavar="NAME",
        help="Which weights count most: magnitude, random; with calibration wanda, ria, dsnot, sparsegpt. "
        "Default: magnitude.",
        rich_help_panel=_WHAT,
    ),
]
SparsityOption = Annotated[
    float | None,
    typer.Option(
        "--sparsity", metavar="FRACTION", help="Fraction of zeros, 0 to 1. Default: 0.5.", rich_help_panel=_WHAT
    ),
]
PatternOption = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        metavar="N:M",
        help="Keep N of every M consecutive weights, e.g. 2:4; instead of --sparsity.",
        rich_help_panel=_WHAT,
    ),
]
ScopeOption = Annotated[
    str | None,
    typer.Option(
        "--scope",
        metavar="SCOPE",
        help="Where weights compete under --sparsity: tensor or row. Default: as in the criterion's paper.",
        rich_help_panel=_WHAT,
    ),
]
TileOption = Annotated[
    str | None,
    typer.Option(
        "--tile",
        metavar="ROWSxCOLS",
        help="Under --sparsity prune whole tiles of this size, e.g. 16x16.",
        rich_help_panel=_WHAT,
    ),
]
LayerSparsityOption = Annotated[
    str | None,
    typer.Option(
        "--layer-sparsity",
        metavar="HOW",
        help="uniform, or owl: prune blocks with many outliers less. Default: uniform.",
        rich_help_panel=_WHAT,
    ),
]
SkipLayersOption = Annotated[
    str | None,
    typer.Option(
        "--skip-layers", metavar="I,J,…", help="Blocks that stay dense; -1 is the last.", rich_help_panel=_WHAT
    ),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="GLOB",
        help="Compress exactly the tensors whose names match; may be repeated.",
        rich_help_panel=_WHAT,
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="GLOB", help="Leave out tensors whose names match; may be repeated.", rich_help_panel=_WHAT
    ),
]
RefinerOption = Annotated[
    str | None,
    typer.Option(
        "--refiner",
        metavar="NAME",
        help="tlr, accelerated-tlr, joint-admm, zero-shot-svd, pcp, oats, hassle-free, eora, slim-lora, or none: prune "
        "only. Default: tlr.",
        rich_help_panel=_HOW,
    ),
]
RankOption = Annotated[
    str | None,
    typer.Option(
        "--rank",
        metavar="RANK",
        help="Rank of B @ A: 128, or 5% of min(d_out, d_in). Default: 5%.",
        rich_help_panel=_HOW,
    ),
]
IterationsOption = Annotated[
    int | None,
    typer.Option("--n-iter", metavar="T", help="Iterations of the refiner. Default: its own.", rich_help_panel=_HOW),
]
SolverOption = Annotated[
    str | None,
    typer.Option(
        "--solver",
        metavar="NAME",
        help="auto, subspace or exact (a full SVD in every step: the reference, slow). Default: auto.",
        rich_help_panel=_HOW,
    ),
]
MetricOption = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="What mending minimises: plain (error of the weights), diagonal (each input weighed), gram (error of the "
        "outputs). Default: auto.",
        rich_help_panel=_HOW,
    ),
]
DampingOption = Annotated[
    float | None,
    typer.Option(
        "--damping",
        metavar="SHARE",
        help="Added to the diagonal of a Gram matrix, as a share of its mean. Default: 0.01.",
        rich_help_panel=_HOW,
    ),
]
MatchBlocksOption = Annotated[
    int | None,
    typer.Option(
        "--match-blocks",
        metavar="N",
        help="Tune what is stored of each block, in at most N steps, to give the dense block's outputs; needs "
        "--calibration. Default: 0.",
        rich_help_panel=_HOW,
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="SOURCE",
        help="A .txt, .jsonl or .parquet FILE, c4, wikitext2, self (text the model writes) or random-tokens.",
        rich_help_panel=_TEXT,
    ),
]
SequencesOption = Annotated[
    int | None,
    typer.Option("--n-sequences", metavar="N", help="Windows of text. Default: 128.", rich_help_panel=_TEXT),
]
SeqlenOption = Annotated[
    int | None,
    typer.Option(
        "--seqlen",
        metavar="TOKENS",
        help="Tokens of a window. Default: 2048, or the model's positions if they are fewer.",
        rich_help_panel=_TEXT,
    ),
]
WindowsOption = Annotated[
    str | None,
    typer.Option(
        "--windows",
        metavar="HOW",
        help="random places of the text, or its leading windows. Default: random.",
        rich_help_panel=_TEXT,
    ),
]
PropagateOption = Annotated[
    str | None,
    typer.Option(
        "--propagate",
        metavar="HOW",
        help="What a block sees: sequential (outputs of the compressed blocks) or dense. Default: sequential.",
        rich_help_panel=_TEXT,
    ),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="N", help="Windows that run together. Default: 4.", rich_help_panel=_TEXT),
]
CalibrationDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--calibration-dtype",
        metavar="DTYPE",
        help="To run the model in. Default: float32 on a CPU, the model's own on a GPU.",
        rich_help_panel=_TEXT,
    ),
]
DeadColumnsOption = Annotated[
    str | None,
    typer.Option(
        "--dead-columns",
        metavar="HOW",
        help="Inputs that the text never excites: keep, drop or error. Default: keep.",
        rich_help_panel=_TEXT,
    ),
]
ActivationDirOption = Annotated[
    Path | None,
    typer.Option(
        "--activation-dir",
        metavar="FOLDER",
        help="Keep the hidden states of the text in a file there. Default: in memory.",
        rich_help_panel=_TEXT,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Same seed, same bytes. Default: 0.", rich_help_panel=_HOW),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Storage dtype of all weights: float32, bfloat16 or float16. Default: each as it is.",
        rich_help_panel=_RUN,
    ),
]
ExecutorOption = Annotated[
    str,
    typer.Option("--executor", metavar="NAME", help="How the work is spread: local or ray.", rich_help_panel=_RUN),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        help="With --executor ray: auto (the cluster of this machine), HOST:PORT, or local (one for this run). "
        "Default: auto.",
        rich_help_panel=_RUN,
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        help="Tensors worked on at once, one thread each. Default: one a core or GPU, as memory allows.",
        rich_help_panel=_RUN,
    ),
]
TaskTimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--task-timeout",
        metavar="SECONDS",
        help="End and repeat the work on a tensor that takes longer. Default: wait.",
        rich_help_panel=_RUN,
    ),
]
DevicesOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICES",
        help="cpu, cuda, cuda:N, or several: cuda:0,1. Default: cpu.",
        rich_help_panel=_RUN,
        show_default=False,
    ),
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Go on with the interrupted run into OUT.", rich_help_panel=_RUN, show_default=False),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="List the tensors and their bytes before and after; write nothing.",
        rich_help_panel=_RUN,
        show_default=False,
    ),
]
