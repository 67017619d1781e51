"""The options of `mendlm compress`. No default is written into a flag: what is not given leaves the recipe alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_WHAT, _HOW, _RUN = "What to prune", "How to mend", "Run and output"


RecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="A recipe in YAML or JSON; the other flags override it."),
]
CriterionOption = Annotated[
    str | None,
    typer.Option(
        "--criterion",
        metavar="NAME",
        help="Which weights count most: magnitude, random. Default: magnitude.",
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
        help="Where weights compete under --sparsity: tensor or row. Default: tensor.",
        rich_help_panel=_WHAT,
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
        help="tlr, accelerated-tlr, zero-shot-svd, or none: prune only. Default: tlr.",
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
    str, typer.Option("--executor", metavar="NAME", help="How the work is spread: local.", rich_help_panel=_RUN)
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
