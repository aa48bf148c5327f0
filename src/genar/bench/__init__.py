"""A recipe's runs and tables: every method on every fold and seed, each once, with intervals and the paper's values.

A run lies in ``runs/<model>-<hash of its settings>/<fold>-<seed>`` and is not made again; an interrupted one goes on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from genar import encoders
from genar.bench.groups import write_groups
from genar.bench.home import home_of, settle
from genar.bench.plan import Fold, Plan, Run, figure_section, folds, plan_runs
from genar.bench.recipe import Cohort, Method, Recipe, read_recipe, recipe_names
from genar.bench.scores import expected_log2, read_run, refuse_other_data, score_runs
from genar.bench.tables import PAPER_METRICS, frame, gain_lines, nested, paper_results, table_lines, write_tables
from genar.bench.toy import make_toy, toy_method
from genar.data import contract
from genar.data.files import alone
from genar.data.progress import Bar, no_bar
from genar.errors import InputError
from genar.report import maps
from genar.runs import tidy, train_run

__all__ = [
    "PAPER_METRICS",
    "BenchResult",
    "Cohort",
    "Fold",
    "Method",
    "Plan",
    "Planned",
    "Recipe",
    "Run",
    "bench_run",
    "folds",
    "make_toy",
    "nested",
    "paper_results",
    "plan_runs",
    "read_recipe",
    "recipe_names",
    "toy_method",
]


@dataclass
class BenchResult:
    """Tables with a row a method (or a pair), a column a metric, and where they lie."""

    table: pd.DataFrame
    differences: pd.DataFrame
    outputs: dict[str, Path]


@dataclass
class Planned:
    """What a bench would do."""

    n_runs: int
    n_done: int
    """of them there already"""
    runs: list[str]
    """those that wait: method, sections held out, seed"""
    missing: list[str]
    """a line for each thing without which they cannot be made"""


def bench_run(
    recipe: Recipe,
    data: Path | None,
    out: Path,
    *,
    features: Path | None = None,
    read: Mapping[str, Any] | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = print,
    bar: Bar = no_bar,
    toy: bool = False,
) -> BenchResult:
    """Run what is not there yet and write tables, figure and gene groups.

    ``data`` holds a folder per data set, or the sections themselves, read as the fields of ``ReadOptions`` in ``read``
    say (``image``, ``mpp``, ``bin_um``); with ``toy`` the same plan runs on simulated sections instead. Raises
    ``InputError`` naming all that is missing (sections, images, weights), before anything runs, and where another bench
    is at work in ``out``.
    """
    with alone(out, "bench"):
        if toy:
            (recipe, data, features), read = make_toy(recipe, out / "toy"), None
        plan = plan_runs(recipe, data, out, features, device, read=read)
        missing = [] if toy else plan.missing()
        _tell(plan, _planned(plan, missing), say, every=False)
        if missing:
            raise InputError(f"{recipe.title}: missing are {'; '.join(missing)}")
        refuse_other_data(plan)
        return _run(plan, say, bar)


def plan_bench(
    recipe: Recipe,
    data: Path | None,
    out: Path,
    *,
    features: Path | None = None,
    read: Mapping[str, Any] | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> Planned:
    """Say what :func:`bench_run` would run and what is missing; nothing is written, and errors are as there."""
    plan = plan_runs(recipe, data, out, features, device, read=read)
    planned = _planned(plan, plan.missing())
    _tell(plan, planned, say, every=True)
    return planned


def _run(plan: Plan, say: Callable[[str], None], bar: Bar) -> BenchResult:
    waiting = plan.waiting
    for run in plan.runs:
        if run.plan.out not in waiting:
            tidy(run.plan.out)
    for encoder in plan.downloads():
        say(f"downloading the weights of {encoder}")
        encoders.load_encoder(encoder)
    for number, run in enumerate(waiting.values(), 1):
        say(f"[{number}] {run.label}")
        train_run(run.plan, say=lambda line: None, bar=bar)
    return _write(plan, say)


def _planned(plan: Plan, missing: list[str]) -> Planned:
    n_runs, waiting = len({run.plan.out for run in plan.runs}), plan.waiting
    return Planned(n_runs, n_runs - len(waiting), [run.label for run in waiting.values()], missing)


def _tell(plan: Plan, planned: Planned, say: Callable[[str], None], *, every: bool) -> None:
    say(f"{plan.recipe.title}: {planned.n_runs} runs, {planned.n_done} of them there already")
    for number, label in enumerate(planned.runs if every else (), 1):
        say(f"[{number} of {len(planned.runs)}] {label}")
    for line in planned.missing if every else ():
        say(f"missing: {line}")


def _write(plan: Plan, say: Callable[[str], None]) -> BenchResult:
    outputs: dict[str, Path] = {}
    table = differences = pd.DataFrame()
    home = home_of(plan.recipe, plan.out)
    if home != plan.out:
        say(f"{plan.out} holds the tables of another recipe: those of {plan.recipe.name} go to {home}")
    try:
        if plan.runs:
            scores = score_runs(plan)
            outputs |= write_tables(plan.recipe, scores, home)
            table = frame(table_lines(plan.recipe, plan.recipe.tables[0], scores))
            differences = frame(gain_lines(plan.recipe, scores)) if plan.recipe.compare else differences
            outputs["runs"] = plan.out / "runs"
        if plan.recipe.groups is not None:
            outputs |= write_groups(plan, home)
        if plan.recipe.figure is not None:
            outputs |= _write_figures(plan, home)
    finally:
        if outputs:
            settle(plan.recipe, home, outputs.values())
    return BenchResult(table, differences, outputs)


def _write_figures(plan: Plan, home: Path) -> dict[str, Path]:
    """For each cohort one picture: a row a gene, measured and the methods (of the first seed) side by side."""
    figure, outputs = plan.recipe.figure, {}
    assert figure is not None
    for cohort in plan.recipe.cohorts:
        runs = [run for run in plan.runs if run.cohort.name == cohort.name]
        section, genes = figure_section(plan.recipe, cohort, runs), figure.genes[cohort.name]
        shown = {}
        for name in figure.methods:
            run = next(r for r in runs if r.method.name == name and section in r.fold.test)
            predicted = read_run(run, section)
            if absent := [gene for gene in genes if gene not in predicted.var_names]:
                raise InputError(
                    f"figure: gene {absent[0]!r} is not among the {predicted.n_vars} that panel {cohort.panel} "
                    f"selected; name genes of {run.plan.out / 'panel.json'}. The tables are written: {home}"
                )
            predicted.layers[contract.LOG1P_MEAN] = expected_log2(predicted, run) * np.log(2)  # what is scored is shown
            shown[name] = predicted
        stem = f"figure_{cohort.name or 'sections'}_{section}"
        truth = plan.section(cohort.name, section)
        for suffix, kind in ((".png", ""), (".pdf", " (pdf)")):
            path = maps.write_method_maps(truth, shown, [(gene, "") for gene in genes], home / f"{stem}{suffix}")
            outputs[stem.replace("_", " ") + kind] = path
    return outputs
