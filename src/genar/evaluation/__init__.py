"""Score any prediction against the truth, whoever made it: two AnnData, aligned by spot and gene name."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from genar.data import contract
from genar.data.files import json_ready, write_text
from genar.errors import InputError
from genar.evaluation import metrics

__all__ = ["Scores", "metrics", "score", "write_scores"]


# Layers with the ends of the 90 % interval of every count.
_INTERVAL_90 = ("q05", "q95")


@dataclass(frozen=True)
class Scores:
    """``summary``: metric -> value (log2(1 + count) space, ``count_`` and depth metrics in counts); ``per_gene``: a
    row a gene."""

    summary: dict[str, float]
    per_gene: pd.DataFrame


def score(predicted: AnnData, truth: AnnData, *, use: str = "X") -> Scores:
    """Score ``predicted`` on its genes and on all spots of ``truth``.

    ``use`` says what of the prediction is scored: ``X``, its counts, or ``log1p_mean``, the layer with the
    expectation of ln(1 + count). Raises ``InputError`` where spots or genes of the one are missing in the other, or
    the prediction names one twice, lacks the layer or holds NaN or negative values.
    """
    if use not in ("X", contract.LOG1P_MEAN):
        raise InputError(f"cannot score {use!r} of a prediction; expected X or {contract.LOG1P_MEAN}")
    aligned = _align(predicted, truth)
    genes = list(predicted.var_names)
    true_counts = contract.counts(truth, genes)
    if use == "X":
        counts = _dense(aligned.X, "X")
        log2 = metrics.log2p1(counts)
    else:
        if use not in aligned.layers:
            raise InputError(f"the prediction has no layer {use!r}; score its X, or predict again")
        log1p = _dense(aligned.layers[use], f"layers[{use!r}]")
        log2, counts = log1p / np.log(2), np.expm1(log1p)
    per_gene = metrics.score_genes(log2, true_counts)
    summary = metrics.summarise(per_gene, counts, true_counts)
    if use != "X" and all(name in aligned.layers for name in _INTERVAL_90):
        low, high = (_dense(aligned.layers[name], f"layers[{name!r}]") for name in _INTERVAL_90)
        summary |= metrics.calibration(low, high, true_counts)
        per_gene["coverage_90"] = metrics.coverage(low, high, true_counts)
    return Scores(summary, pd.DataFrame(per_gene, index=pd.Index(genes, name="gene")))


def write_scores(folder: Path, scores: dict[str, dict[str, Scores]]) -> dict[str, Path]:
    """Write ``metrics.json`` (section -> method -> metric -> value) and ``metrics.csv`` (a row per section, method
    and gene)."""
    summary = {section: {method: s.summary for method, s in methods.items()} for section, methods in scores.items()}
    write_text(folder / "metrics.json", json.dumps(json_ready(summary), indent=1) + "\n")
    tables = [
        s.per_gene.reset_index().assign(section=section, method=method)
        for section, methods in scores.items()
        for method, s in methods.items()
    ]
    table = pd.concat(tables)
    first = ["section", "method", "gene"]
    table = table[[*first, *(column for column in table if column not in first)]]
    write_text(folder / "metrics.csv", table.to_csv(index=False, float_format="%.6g"))
    return {"metrics": folder / "metrics.json", "per_gene": folder / "metrics.csv"}


def _align(predicted: AnnData, truth: AnnData) -> AnnData:
    for kind, theirs, ours in (
        ("spots", predicted.obs_names, truth.obs_names),
        ("genes", predicted.var_names, truth.var_names),
    ):
        if not theirs.is_unique:
            twice = theirs[theirs.duplicated()][0]
            raise InputError(f"the prediction's {kind} name {twice!r} more than once; expected each once")
        missing = theirs.difference(ours)
        if len(missing):
            raise InputError(
                f"{len(missing)} of the prediction's {len(theirs)} {kind} are not in the truth "
                f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); are both of the same section?"
            )
    unpredicted = truth.obs_names.difference(predicted.obs_names)
    if len(unpredicted):
        raise InputError(
            f"{len(unpredicted)} of the truth's {truth.n_obs} spots have no prediction (first: {unpredicted[0]}); "
            "predict the whole section, or score a truth cut to the same spots"
        )
    return predicted[truth.obs_names]


def _dense(values, where: str) -> np.ndarray:
    values = np.asarray(values.toarray() if sparse.issparse(values) else values, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise InputError(f"the prediction's {where} holds NaN, infinite or negative values; expected counts >= 0")
    return values
