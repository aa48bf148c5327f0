"""A recipe's runs and its table: every method on every held-out section and seed, each once, with intervals.

A recipe is a YAML file: sections (each is held out once), panel, encoder, seeds, methods (a model with its settings)
and pairs to compare. A run lies in ``runs/<method>/<section>-<seed>`` and is not made again; an interrupted one goes
on.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from genar.data import SectionRef, contract, find_sections, pick
from genar.data.files import json_ready, write_text
from genar.data.progress import Bar, no_bar
from genar.errors import InputError
from genar.evaluation import intervals, metrics
from genar.models import model_class
from genar.runs import TrainPlan, train_run
from genar.settings import Settings, read_settings

_FIELDS = {"title", "sections", "panel", "n_genes", "encoder", "seeds", "methods", "compare"}
_METHOD_FIELDS = {"name", "model", "preset", "recipe", "set"}


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    model: str
    preset: str = "small"
    recipe: str = "default"
    settings: Settings = field(default_factory=Settings)

    @property
    def folder(self) -> str:
        """Name of its folder: what changes a run changes it."""
        digest = hashlib.sha256(json.dumps(json_ready(asdict(self)), sort_keys=True).encode()).hexdigest()
        return f"{re.sub('[^A-Za-z0-9]+', '-', self.name).strip('-')}-{digest[:8]}"

    @property
    def seeded(self) -> bool:
        """Whether a seed changes it."""
        return model_class(self.model).gradient


@dataclass(frozen=True)
class Recipe:
    """What ``genar bench`` runs."""

    title: str
    sections: tuple[str, ...]
    methods: tuple[Method, ...]
    panel: str = "clean"
    n_genes: int = 200
    encoder: str = "efficientnet_lite0"
    seeds: tuple[int, ...] = (2021,)
    compare: tuple[tuple[str, str], ...] = ()


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _shipped() if path.name.endswith(".yaml"))


def read_recipe(name: str) -> Recipe:
    """A recipe from a YAML file, or one that comes with the package, by name.

    Raises ``InputError`` where there is none, or a line of it is not known or malformed.
    """
    import yaml

    path = Path(name)
    if not path.is_file():
        path = next((Path(str(p)) for p in _shipped() if p.name == f"{path.stem}.yaml"), path)
    if not path.is_file():
        raise InputError(f"recipe {name}: no such file; recipes of the package are {', '.join(recipe_names())}")
    try:
        facts = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable YAML ({error})") from error
    if not isinstance(facts, dict) or not {"sections", "methods"} <= set(facts) or set(facts) - _FIELDS:
        raise InputError(f"{path}: expected sections and methods, and of {', '.join(sorted(_FIELDS))} no other key")
    methods = tuple(_method(path, entry) for entry in facts["methods"])
    names = [method.name for method in methods]
    pairs = tuple(tuple(pair) for pair in facts.get("compare", ()))
    for wrong in [n for pair in pairs for n in pair if n not in names] + [n for n in names if names.count(n) > 1]:
        raise InputError(f"{path}: {wrong!r} must name one method, found {names.count(wrong)}")
    panel = str(facts.get("panel", "clean"))
    beside = path.parent / panel
    return Recipe(
        str(facts.get("title", path.stem)), tuple(map(str, facts["sections"])), methods,
        str(beside) if beside.is_file() else panel, int(facts.get("n_genes", 200)),
        str(facts.get("encoder", "efficientnet_lite0")), tuple(facts.get("seeds", (2021,))), pairs,
    )  # fmt: skip


def _shipped():
    return resources.files("genar.recipes").iterdir()


def _method(path: Path, entry) -> Method:
    if not isinstance(entry, dict) or not {"name", "model"} <= set(entry) or set(entry) - _METHOD_FIELDS:
        raise InputError(f"{path}: a method has name and model, and may have preset, recipe and set; found {entry}")
    model_class(entry["model"])
    settings = read_settings(None, [f"{key}={json.dumps(value)}" for key, value in entry.get("set", {}).items()])
    return Method(
        str(entry["name"]), entry["model"], entry.get("preset", "small"), entry.get("recipe", "default"), settings
    )


@dataclass
class BenchResult:
    """Tables with a row a method (or a pair), a column a metric, and where they lie."""

    table: pd.DataFrame
    differences: pd.DataFrame
    outputs: dict[str, Path]


def bench_run(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    features: Path | None = None,
    say: Callable[[str], None] = print,
    bar: Bar = no_bar,
    dry_run: bool = False,
) -> BenchResult | None:
    """Run what is not there yet and write the tables as CSV and Markdown; with ``dry_run`` only say what would run.

    Raises ``InputError`` where a section is missing, before anything runs.
    """
    refs = pick(find_sections(data), recipe.sections)
    plans = {
        (method.name, section, seed): _plan(recipe, method, section, seed, data, out, features)
        for method in recipe.methods
        for section in recipe.sections
        for seed in (recipe.seeds if method.seeded else recipe.seeds[:1])
    }
    missing = {key: plan for key, plan in plans.items() if not (plan.out / "run.json").exists()}
    say(f"{recipe.title}: {len(plans)} runs, {len(plans) - len(missing)} of them there already")
    for number, ((method, section, seed), plan) in enumerate(missing.items(), 1):
        say(f"[{number} of {len(missing)}] {method}, {section} held out, seed {seed}")
        if not dry_run:
            train_run(plan, say=lambda line: None, bar=bar)
    return None if dry_run else _write_tables(recipe, plans, refs, out)


def _plan(recipe: Recipe, method: Method, section: str, seed: int, data: Path, out: Path, features) -> TrainPlan:
    own = method.settings
    settings = Settings(own.model, {**own.train, "seed": seed}, {"decode": "mean", **own.decoding}, own.inputs)
    others = [s for s in recipe.sections if s != section]
    return TrainPlan(
        data, (section,), out / "runs" / method.folder / f"{section}-{seed}", method.model, method.preset,
        method.recipe, recipe.panel, recipe.n_genes, recipe.encoder, features=features, settings=settings,
        beside=(), maps=False, only=(*others, section),
    )  # fmt: skip


def _write_tables(
    recipe: Recipe, plans: Mapping[tuple[str, str, int], TrainPlan], refs: Sequence[SectionRef], out: Path
) -> BenchResult:
    sampled, coverage = _score_all(plans, {ref.id: ref for ref in refs})
    rows, gains = {}, {}
    for method in recipe.methods:
        values = intervals.over_sections(list(sampled[method.name].values()))
        rows[method.name] = {name: intervals.interval(v) for name, v in values.items()}
        rows[method.name]["coverage_90"] = (float(np.mean(coverage[method.name])),) * 3
    for ours, rival in recipe.compare:
        pairs = [
            {name: sampled[ours][section][name] - sampled[rival][section][name] for name in intervals.METRICS}
            for section in recipe.sections
        ]
        values = intervals.over_sections(pairs)
        gains[f"{ours} minus {rival}"] = {name: intervals.interval(v) for name, v in values.items()}
    table, differences = (_frame(part) for part in (rows, gains))
    per_section = {
        (method, section): {name: float(values[name][0]) for name in intervals.METRICS}
        for method, sections in sampled.items()
        for section, values in sections.items()
    }
    by_section = pd.DataFrame.from_dict(per_section, orient="index").rename_axis(["method", "section"])
    write_text(out / "table.csv", table.to_csv(float_format="%.6g"))
    write_text(out / "differences.csv", differences.to_csv(float_format="%.6g"))
    write_text(out / "by_section.csv", by_section.to_csv(float_format="%.6g"))
    write_text(out / "table.md", _markdown(recipe, rows, gains))
    names = {"table": "table.md", "table (csv)": "table.csv", "differences": "differences.csv"}
    outputs = {**{k: out / v for k, v in names.items()}, "by section": out / "by_section.csv", "runs": out / "runs"}
    return BenchResult(table, differences, outputs)


def _score_all(plans: Mapping[tuple[str, str, int], TrainPlan], refs: Mapping[str, SectionRef]):
    """method -> section -> metric -> resamples, the seeds averaged; and method -> coverages."""
    truths, weights = {}, {}
    collected: dict[str, dict[str, list]] = {}
    coverage: dict[str, list[float]] = {}
    for (method, section, _), plan in plans.items():
        predicted = anndata.read_h5ad(plan.out / "predictions" / f"{section}.h5ad")
        if section not in truths:
            truths[section] = refs[section].read()
            digest = int(hashlib.sha256(section.encode()).hexdigest()[:8], 16)
            weights[section] = intervals.resample_weights(truths[section].n_obs, seed=digest)
        counts = contract.counts(truths[section], list(predicted.var_names))
        log2 = np.asarray(predicted.layers[contract.LOG1P_MEAN], dtype=np.float64) / np.log(2)
        scores = intervals.resampled_scores(log2, metrics.log2p1(counts), weights[section])
        collected.setdefault(method, {}).setdefault(section, []).append(scores)
        held = float("nan")
        if {"q05", "q95"} <= set(predicted.layers):
            low, high = (np.asarray(predicted.layers[q]) for q in ("q05", "q95"))
            held = float(metrics.coverage(low, high, counts).mean())
        coverage.setdefault(method, []).append(held)
    averaged = {
        method: {section: intervals.over_sections(seeds) for section, seeds in sections.items()}
        for method, sections in collected.items()
    }
    return averaged, coverage


def _frame(rows: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> pd.DataFrame:
    flat = {
        name: {
            f"{metric}{end}": v
            for metric, values in row.items()
            for end, v in zip(("", "_low", "_high"), values, strict=True)
        }
        for name, row in rows.items()
    }
    return pd.DataFrame.from_dict(flat, orient="index").rename_axis("method")


def _markdown(recipe: Recipe, rows: Mapping, gains: Mapping) -> str:
    """The tables to read: value and 95 % interval."""
    lines = [
        f"# {recipe.title}",
        "",
        f"Each of {', '.join(recipe.sections)} held out once; means over sections and seeds "
        f"({', '.join(map(str, recipe.seeds))}), log2(1 + count) space, 95 % intervals by bootstrap over spots.",
        "",
    ]
    for title, part in (("method", rows), ("difference", gains)):
        if not part:
            continue
        names = list(next(iter(part.values())))
        lines += [f"| {title} | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
        lines += [f"| {name} | {' | '.join(_cell(row[n], title) for n in names)} |" for name, row in part.items()]
        lines.append("")
    return "\n".join(lines)


def _cell(values: Sequence[float], title: str) -> str:
    value, low, high = values
    if np.isnan(value):
        return "–"
    if low == high:
        return f"{value:.3f}"
    sign = "+" if title == "difference" else ""
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"
