"""Score any method's prediction of a section against its truth, with intervals, and beside another method's."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from genar import defaults
from genar.data import contract, reading
from genar.data.files import drop_own, json_ready, refuse_foreign, write_text
from genar.errors import InputError, first_names
from genar.evaluation import MEAN_SUFFIX, Aligned, Scores, align_both, intervals, score_aligned, write_scores
from genar.evaluation.calibration import zero_reliability
from genar.evaluation.intervals import Interval
from genar.report import maps

GENES = ("same", "common")
_OF_SCORES = {
    "intervals.csv": "section,method,metric,", "intervals.json": '"resamples"',
    "zero_reliability.csv": "section,method,low,",
}  # fmt: skip
"""files that not every scoring writes, and how they begin"""


@dataclass
class Assessment:
    """Where things lie and what came out."""

    outputs: dict[str, Path]
    scores: dict[str, dict[str, Scores]]
    """section -> method -> scores"""
    intervals: dict[str, dict[str, Interval]]
    """method -> metric -> (value, low, high), 95 % by bootstrap over the spots"""
    differences: dict[str, dict[str, Interval]]
    """"method minus rival" -> metric -> (value, low, high), on the same resamples"""
    notes: tuple[str, ...] = ()
    """what a reader of the scores must know: genes left out, metrics that are undefined"""
    seconds: dict[str, float] = field(default_factory=dict)


def evaluate_run(
    predicted: AnnData,
    truth: AnnData,
    out: str | Path,
    *,
    against: AnnData | None = None,
    panel: Sequence[str] | None = None,
    genes: str = "same",
    resamples: int = defaults.RESAMPLES,
) -> Assessment:
    """Score a prediction, and another one ``against`` it, on the same spots and genes; write scores, intervals, maps.

    ``prediction`` is its X, ``prediction_mean`` its layer ``log1p_mean`` where it has one; the other's are ``against``
    and ``against_mean``. The truth may measure more genes than were predicted. Otherwise the genes must be the same:
    both predictions', and the ``panel``'s where it is given; ``genes="common"`` scores those that all have.
    ``resamples`` 0 leaves the intervals out. Raises ``InputError`` where genes or spots differ or values are no
    counts.
    """
    out = Path(out)
    if resamples < 0:
        raise InputError(f"resamples must be >= 0, found {resamples}")
    if (out / "run.json").exists():
        raise InputError(f"{out}: holds the scores of a training run; choose another --out")
    refuse_foreign(out / "metrics.csv", "section,method,gene")
    started = time.perf_counter()
    named = {"prediction": predicted} | ({"against": against} if against is not None else {})
    named, notes = _same_genes(named, truth, panel, genes)
    name = contract.name(truth)
    aligned = {method: one for kind, adata in named.items() for method, one in _aligned(kind, adata, truth).items()}
    scores = {name: {method: score_aligned(one) for method, one in aligned.items()}}
    notes = [*_other_sections(named, name), *notes]
    notes += [line for method, one in scores[name].items() for line in _undefined(method, one)]
    found, differences = _intervals(aligned, name, resamples)
    scored = time.perf_counter()
    outputs = write_scores(out, scores) | _write_tables(out, aligned, name, found, differences, resamples)
    per_gene = scores[name].get("prediction" + MEAN_SUFFIX, scores[name]["prediction"]).per_gene
    maps.write_section_maps(named["prediction"], truth, per_gene, out / "maps")
    seconds = {"scores": round(scored - started, 1), "files and maps": round(time.perf_counter() - scored, 1)}
    return Assessment({**outputs, "maps": out / "maps"}, scores, found, differences, tuple(notes), seconds)


def _other_sections(named: Mapping[str, AnnData], truth: str) -> list[str]:
    """A note where a prediction says to be of another section than the truth, or its model knew the section."""
    notes = []
    for kind, adata in named.items():
        facts = adata.uns.get(contract.GENAR, {})
        if facts.get(contract.SECTION, truth) != truth:
            notes.append(f"the truth is of section {truth}, the {kind} of {facts[contract.SECTION]}")
        if note := contract.trained_on_note(adata):
            notes.append(note if kind == "prediction" else f"--{kind}: {note}")
    return notes


def read_prediction(path: Path) -> AnnData:
    """Any method's prediction; ``InputError`` where it is not a readable ``.h5ad``."""
    return reading.read_adata(path)


def _same_genes(
    named: Mapping[str, AnnData], truth: AnnData, panel: Sequence[str] | None, genes: str
) -> tuple[dict[str, AnnData], list[str]]:
    """The predictions with the genes to score, in one order, and what to say of it."""
    if genes not in GENES:
        raise InputError(f"genes must be one of {', '.join(GENES)}, found {genes!r}")
    who = {"prediction": "the prediction", "against": "the other prediction"}
    sets = {who[kind]: adata.var_names for kind, adata in named.items()}
    for whose, names in sets.items():
        if not len(names):
            raise InputError(f"{whose} has no genes; expected at least one")
        if not names.is_unique:
            raise InputError(f"{whose} names gene {names[names.duplicated()][0]!r} more than once; expected each once")
    sets |= {"the panel": pd.Index(panel)} if panel is not None else {}
    first = sets["the prediction"]
    if genes == "same":
        for whose, theirs in sets.items():
            _refuse_other_genes(first, theirs, whose, both=True)
        _refuse_other_genes(first, truth.var_names, "the truth", both=False)
        chosen = list(first)
    else:
        chosen = [g for g in first if g in truth.var_names and all(g in theirs for theirs in sets.values())]
        if not chosen:
            every = {**sets, "the truth": truth.var_names}
            found = "; ".join(f"{whose} has {len(theirs)} ({first_names(theirs)})" for whose, theirs in every.items())
            raise InputError(f"no gene is common to all: {found}; do they name genes in the same way?")
    notes = []
    if len(chosen) < truth.n_vars:
        notes.append(f"{len(chosen)} of the {truth.n_vars} genes of the truth are scored")
    for whose, theirs in sets.items():
        if left := list(theirs[~theirs.isin(chosen)]):
            notes.append(f"{len(left)} of {len(theirs)} genes of {whose} are left out ({first_names(left)})")
    held = {kind: adata.to_memory() if adata.isbacked else adata for kind, adata in named.items()}
    return {kind: adata[:, chosen] for kind, adata in held.items()}, notes


def _refuse_other_genes(ours: pd.Index, theirs: pd.Index, who: str, *, both: bool) -> None:
    missing = ours[~ours.isin(theirs)]
    more = theirs[~theirs.isin(ours)] if both else theirs[:0]
    parts = [
        f"{len(part)} {text} ({first_names(part)})"
        for part, text in ((missing, f"not in {who}"), (more, f"of {who} not predicted"))
        if len(part)
    ]
    if parts:
        raise InputError(
            f"the genes differ: the prediction has {len(ours)}, {who} {len(theirs)}: {', '.join(parts)}; "
            "score the genes that all have with --genes common"
        )


def _aligned(kind: str, predicted: AnnData, truth: AnnData) -> dict[str, Aligned]:
    """method -> arrays; a mistake is said to be in that prediction."""
    try:
        return align_both(kind, predicted, truth)
    except InputError as error:
        raise InputError(f"--against: {error}" if kind == "against" else str(error)) from error


def _undefined(method: str, scores: Scores) -> list[str]:
    """What of a method's scores is undefined, and why."""
    table, n_spots = scores.per_gene, scores.summary["n_spots"]
    lines = []
    if n_spots == 1:
        lines.append(f"{method}: one spot alone: correlations and variances are undefined")
    elif (constant := table.index[table["pcc"].isna()]).size:
        lines.append(
            f"{method}: PCC of {len(constant)} of {len(table)} genes is undefined, prediction or truth being constant "
            f"({first_names(constant)}); pcc_fixed counts them 0"
        )
    undefined = [name for name, value in scores.summary.items() if np.isnan(value) and "_mean_" not in name]
    if undefined:
        lines.append(f"{method}: undefined and null in metrics.json: {', '.join(undefined)}")
    return lines


def _intervals(aligned: Mapping[str, Aligned], section: str, resamples: int):
    """Intervals of every method, and of the differences between the prediction and its rival."""
    if not resamples:
        return {}, {}
    pairs = []
    if "against" in aligned:
        best = [kind + MEAN_SUFFIX if kind + MEAN_SUFFIX in aligned else kind for kind in ("prediction", "against")]
        pairs = list(dict.fromkeys([("prediction", "against"), (best[0], best[1])]))
    return intervals.compare(aligned, pairs, section, resamples)


def _write_tables(out: Path, aligned, section: str, found, differences, resamples: int) -> dict[str, Path]:
    """``intervals.csv`` and ``intervals.json``; ``zero_reliability.csv`` for methods with a probability of zero."""
    outputs: dict[str, Path] = {}
    for name, beginning in _OF_SCORES.items():
        drop_own(out / name, beginning)
    if found:
        outputs = write_intervals(out, {section: (found, differences)}, resamples)
    bins = [
        pd.DataFrame(zero_reliability(one.layers[contract.P_ZERO], one.truth)).assign(section=section, method=method)
        for method, one in aligned.items()
        if contract.P_ZERO in one.layers
    ]
    if bins:
        table = pd.concat(bins)[["section", "method", "low", "high", "n", "predicted", "observed"]]
        write_text(out / "zero_reliability.csv", table.to_csv(index=False, float_format="%.6g"))
        outputs["zero reliability"] = out / "zero_reliability.csv"
    return outputs


def write_intervals(
    out: Path, sections: Mapping[str, tuple[Mapping[str, dict], Mapping[str, dict]]], resamples: int
) -> dict[str, Path]:
    """Write ``intervals.csv`` and ``intervals.json``: of each section, the intervals of the methods and of the
    differences, as ``evaluation.intervals.compare`` finds them."""
    rows = [
        {"section": section, "method": method, "metric": metric, "value": value, "low": low, "high": high}
        for section, parts in sections.items()
        for part in parts
        for method, values in part.items()
        for metric, (value, low, high) in values.items()
    ]
    table = pd.DataFrame(rows).assign(share=0.95, resamples=resamples)
    write_text(out / "intervals.csv", table.to_csv(index=False, float_format="%.6g"))
    facts = {
        section: {"share": 0.95, "resamples": resamples, "methods": found, "differences": differences}
        for section, (found, differences) in sections.items()
    }
    write_text(out / "intervals.json", json.dumps(json_ready(facts), indent=1) + "\n")
    return {"intervals": out / "intervals.csv", "intervals (json)": out / "intervals.json"}
