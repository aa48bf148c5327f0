"""Score the runs of a plan: every method of a section sees the same resamples of its spots, differences are paired."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from genar import encoders
from genar.bench.plan import Plan, Run
from genar.data import contract, reading
from genar.data.door import read_json
from genar.errors import InputError
from genar.evaluation import intervals, metrics
from genar.evaluation.intervals import Interval
from genar.features import FeatureRecipe, recipe_and_inputs, store_path
from genar.genes import leak_note, read_panel
from genar.models import model_class

Key = tuple[str, str]
"""Cohort and method."""


@dataclass
class BenchScores:
    """What the runs reached."""

    sampled: dict[Key, dict[str, dict[str, np.ndarray]]]
    """(cohort, method) -> held-out section -> metric -> resamples [1 + R], the seeds averaged"""
    coverage: dict[Key, dict[str, float]]
    """the same, share of true counts in the 90 % interval; NaN where a method has none"""
    undefined: dict[Key, dict[str, float]]
    """the same, number of genes whose PCC is undefined"""
    runs: pd.DataFrame
    """a row a run: seed, hashes, seconds, memory"""
    patients: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """cohort -> section -> patient, "" where not known"""
    notes: tuple[str, ...] = ()
    """what a reader of the scores must know: of the folds, and of panels that saw what is held out"""

    def row(self, key: Key, only: Sequence[str] = ()) -> dict[str, Interval]:
        """Metric -> value, low, high: means over the held-out sections, or over ``only`` some of them."""
        sections = only or list(self.sampled[key])
        row = intervals.intervals_of(intervals.over_sections(self._of(key, only)))
        for name, values in (("coverage_90", self.coverage), ("n_undefined", self.undefined)):
            row[name] = float(np.mean([values[key][section] for section in sections])), float("nan"), float("nan")
        return row

    def gain(self, cohort: str, ours: str, rival: str) -> dict[str, Interval]:
        """The paired difference of two methods, the same form, over the sections that both hold out."""
        return intervals.intervals_of(intervals.over_sections(self._gains(cohort, ours, rival)), differences=True)

    def across(self, key: Key, only: Sequence[str] = ()) -> dict[str, Interval]:
        """As :meth:`row`, with intervals across patients and sections; none where a single one is held out."""
        sections = only or list(self.sampled[key])
        return _across(self._of(key, only), self.patients_of(key[0], sections))

    def gain_across(self, cohort: str, ours: str, rival: str) -> dict[str, Interval]:
        """As :meth:`gain`, with intervals across patients and sections; none where a single one is held out."""
        patients = self.patients_of(cohort, self.shared(cohort, ours, rival))
        return _across(self._gains(cohort, ours, rival), patients, differences=True)

    def shared(self, cohort: str, ours: str, rival: str) -> list[str]:
        """The sections that both methods hold out."""
        return [section for section in self.sampled[cohort, ours] if section in self.sampled[cohort, rival]]

    def patients_of(self, cohort: str, sections: Sequence[str]) -> list[str]:
        """The patient of each section, "" where not known."""
        known = self.patients.get(cohort, {})
        return [known.get(section, "") for section in sections]

    def _of(self, key: Key, only: Sequence[str]) -> list[dict[str, np.ndarray]]:
        return [self.sampled[key][section] for section in only or self.sampled[key]]

    def _gains(self, cohort: str, ours: str, rival: str) -> list[dict[str, np.ndarray]]:
        one, other = self.sampled[cohort, ours], self.sampled[cohort, rival]
        both = self.shared(cohort, ours, rival)
        return [{name: one[s][name] - other[s][name] for name in intervals.METRICS} for s in both]

    def by_section(self) -> pd.DataFrame:
        """A row per cohort, method and held-out section."""
        rows = {
            (*key, section): {name: float(values[name][0]) for name in intervals.METRICS}
            | {"n_undefined": self.undefined[key][section]}
            for key, sections in self.sampled.items()
            for section, values in sections.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["data", "method", "section"])


def _across(
    sections: Sequence[Mapping[str, np.ndarray]], patients: Sequence[str], *, differences: bool = False
) -> dict[str, Interval]:
    if len(sections) < 2:
        return {}
    drawn = intervals.across_sections(sections, patients)
    return intervals.intervals_of(drawn, differences=differences, unbiased=True)


def score_runs(plan: Plan) -> BenchScores:
    """Read the predictions of all runs, which must be finished, and score them; a section is in memory by itself."""
    found: dict[Key, dict[str, list[tuple]]] = {}
    for (cohort, section), runs in _by_section(plan.runs).items():
        truth = plan.section(cohort, section)
        _refuse_other(truth, [run for run in plan.runs if run.cohort.name == cohort], section)
        weights = intervals.resample_weights(truth.n_obs, seed=intervals.seed_of(section))
        for run in runs:
            key = cohort, run.method.name
            found.setdefault(key, {}).setdefault(section, []).append(_score(run, section, truth, weights))
    drawn = {
        key: {s: intervals.over_sections([o[0] for o in seeds]) for s, seeds in by.items()} for key, by in found.items()
    }
    held, undefined = (
        {key: {s: float(np.mean([one[part] for one in seeds])) for s, seeds in by.items()} for key, by in found.items()}
        for part in (1, 2)
    )
    facts = pd.DataFrame([_facts(run) for run in plan.runs])
    patients = {cohort.name: cohort.sections for cohort in plan.recipe.cohorts}
    return BenchScores(drawn, held, undefined, facts, patients, _notes(plan.runs))


def _score(run: Run, section: str, truth: AnnData, weights: np.ndarray) -> tuple[dict[str, np.ndarray], float, int]:
    """Metrics of the resamples, coverage, and the number of genes without a PCC."""
    predicted = read_run(run, section)
    log2, counts = expected_log2(predicted, run), contract.counts(truth, list(predicted.var_names))
    true_log2 = metrics.log2p1(counts)
    undefined = int(np.isnan(metrics.pcc(log2, true_log2)).sum())
    return intervals.resampled_scores(log2, true_log2, weights), _coverage(predicted, counts), undefined


def refuse_other_data(plan: Plan) -> None:
    """``InputError`` where a run that is there was made with other sections than the data hold now, be they trained on
    or held out; a section is in memory by itself."""
    done = [run for run in plan.runs if run.done]
    for cohort, refs in plan.refs.items():
        for section in refs:
            if made := [run for run in done if run.cohort.name == cohort and section in _data_of(run)]:
                _refuse_other(plan.section(cohort, section), made, section)


def _refuse_other(read: AnnData, runs: Iterable[Run], section: str) -> None:
    digest, names = contract.digest(read), cache(lambda facts: _stores_of(read, json.loads(facts)))
    for run in runs:
        told, what = _told(run), ""
        if told.get("data", {}).get(section, digest) != digest:
            what = "another section"
        elif (made := told.get("features", {}).get(section)) and contract.slide_path(read) is not None:
            path = run.plan.out / "checkpoint" / "config.json"
            facts = read_json(path, "checkpoint", "delete the folder and run again").get("features", {})
            what = "" if made == names(json.dumps(facts)) else "another image, or other places, of section"
        if what:
            raise InputError(
                f"{run.plan.out}: was made with {what} {section} than the data hold now; give the data it was "
                "made with, or delete the folder to make it again"
            )


def _stores_of(section: AnnData, facts: Mapping) -> list[str]:
    """Names that the feature stores of a section have, of a checkpoint that says this of its features."""
    recipe, inputs = recipe_and_inputs(facts)
    return [store_path(section, one, Path()).name for one in inputs.recipes(recipe)]


def _data_of(run: Run) -> dict[str, str]:
    """Section -> digest, of all that a finished run was trained on or predicted."""
    return _told(run).get("data", {})


def _told(run: Run) -> dict:
    return read_json(run.plan.out / "run.json", "record of a run", "delete the folder and run again")


def _notes(runs: Iterable[Run]) -> tuple[str, ...]:
    """Of the folds, and of panels that were selected with sections that are held out."""
    notes: dict[str, None] = {}
    for run in runs:
        if run.fold.note:
            notes[run.fold.note] = None
        if Path(run.cohort.panel).is_file():
            notes[leak_note(read_panel(run.cohort.panel), Path(run.cohort.panel).name, run.fold.test)] = None
    return tuple(filter(None, notes))


def _by_section(runs: Iterable[Run]) -> dict[Key, list[Run]]:
    found: dict[Key, list[Run]] = {}
    for run in runs:
        for section in run.fold.test:
            found.setdefault((run.cohort.name, section), []).append(run)
    return found


def read_run(run: Run, section: str) -> AnnData:
    """The prediction of a finished run for one of its held-out sections."""
    return reading.read_adata(run.plan.out / "predictions" / f"{section}.h5ad")


def expected_log2(predicted: AnnData, run: Run) -> np.ndarray:
    """float64 [N, G]: what is scored. The expectation of log2(1 + count); of a method that the recipe decodes
    otherwise (``greedy``: the paper), and of one without an expectation, its counts."""
    asked = run.method.settings.decoding.get("decode", "mean")
    if asked == "mean" and contract.LOG1P_MEAN in predicted.layers:
        values = contract.expected_log2(predicted)
    else:
        values = metrics.log2p1(contract.counts(predicted, list(predicted.var_names)))
    if not np.isfinite(values).all():
        raise InputError(
            f"{run.plan.out}: the prediction holds NaN or infinite values; delete the folder and run again"
        )
    return values


def _coverage(predicted: AnnData, counts: np.ndarray) -> float:
    if not {"q05", "q95"} <= set(predicted.layers):
        return float("nan")
    low, high = (contract.layer(predicted, q) for q in ("q05", "q95"))
    return float(metrics.coverage(low, high, counts).mean())


def _inputs(run: Run) -> str:
    """What the method saw of a spot."""
    if run.plan.input == "patches":
        return "pixels"
    seen = run.plan.inputs
    widths = " + ".join(f"{width:g}" for width in seen.widths_um or (FeatureRecipe.width_um,)) + " um"
    parts = ["imported" if run.plan.encoder.startswith(encoders.IMPORTED) else widths]
    parts += [f"mean of {n} spots" for n in seen.context_spots]
    parts += ["whole section"] if model_class(run.plan.model).unit == "section" else []
    return ", ".join(parts)


def _facts(run: Run) -> Mapping:
    """A row of ``runs.csv``."""
    told = _told(run)
    seconds = told.get("seconds", {})
    stores = sorted({name for names in told.get("features", {}).values() for name in names})
    return {
        "data": run.cohort.name,
        "method": run.method.name,
        "fold": run.fold.name,
        "seed": run.seed if run.method.seeded else "",
        "encoder": run.method.encoder,
        "inputs": _inputs(run),
        "seconds_training": seconds.get("training", float("nan")),
        "seconds": round(sum(seconds.values()), 1),
        "peak_rss_mib": told.get("peak_rss_mib") or float("nan"),
        "panel_sha256": told.get("panel_sha256", ""),
        "checkpoint_sha256": told.get("checkpoint_sha256", ""),
        "features": hashlib.sha256("\n".join(stores).encode()).hexdigest(),
        "genar_version": told.get("genar_version", ""),
        "folder": f"{run.plan.out.parent.name}/{run.plan.out.name}",
    }
