"""Two AnnData, aligned by spot and gene name, to scores: one number a metric and a row a gene."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from genar.data import contract
from genar.data.files import json_ready, write_text
from genar.errors import InputError, first_names
from genar.evaluation import metrics
from genar.evaluation.calibration import calibration
from genar.evaluation.structure import structure

MEAN_SUFFIX = "_mean"  # of a method's name: its layer log1p_mean is scored, not its X
_OF_THE_DISTRIBUTION = (contract.MEAN, contract.P_ZERO, contract.SD, "q05", "q25", "q50", "q75", "q95")


@dataclass(frozen=True)
class Scores:
    """``summary``: metric -> value (log2(1 + count) space; ``count_``, ``zero_``, depth and calibration metrics in
    counts); ``per_gene``: a row a gene."""

    summary: dict[str, float]
    per_gene: pd.DataFrame


@dataclass(frozen=True)
class Aligned:
    """Prediction and truth as arrays [N, G], a row a spot of the truth, a column a gene of the prediction."""

    genes: list[str]
    log2: np.ndarray
    """the prediction in log2(1 + count) space"""
    counts: np.ndarray
    """the prediction in counts"""
    truth: np.ndarray
    """true counts, int32"""
    layers: dict[str, np.ndarray]
    """what the prediction says of its distribution"""
    coords: np.ndarray | None
    """spot centres [N, 2]"""
    training: dict[str, np.ndarray]
    """``mean`` and ``variance`` [G] of each gene's counts in the training sections, where the prediction has them"""

    @property
    def truth_log2(self) -> np.ndarray:
        """The truth in log2(1 + count) space."""
        return metrics.log2p1(self.truth)


def align(predicted: AnnData, truth: AnnData, *, use: str = "X") -> Aligned:
    """The prediction's genes at all spots of ``truth``.

    ``use`` says what of the prediction is compared: ``X``, its counts, or ``log1p_mean``, the layer with the
    expectation of ln(1 + count). Raises ``InputError`` where spots or genes of the one are missing in the other,
    either is empty or names one twice, the prediction lacks the layer, NaN or negative values are found, or the truth
    holds other things than raw counts.
    """
    if use not in ("X", contract.LOG1P_MEAN):
        raise InputError(f"cannot score {use!r} of a prediction; expected X or {contract.LOG1P_MEAN}")
    if predicted.X is None:
        raise InputError("the prediction has no X; expected its counts there")
    contract.check_names(truth, "the truth")
    if all(
        contract.MPP in one.uns.get(contract.GENAR, {}) and contract.SPATIAL in one.obsm for one in (predicted, truth)
    ):
        contract.check_same_places(predicted, truth, "the truth")
    ordered = _ordered(predicted, truth)
    genes = list(predicted.var_names)
    contract.check_counts(truth[:, genes], "the truth")
    if use == "X":
        counts = _dense(ordered.X, "the prediction's X")
        log2 = metrics.log2p1(counts)
    else:
        if use not in ordered.layers:
            raise InputError(f"the prediction has no layer {use!r}; score its X, or predict again")
        log1p = _dense(ordered.layers[use], f"the prediction's layers[{use!r}]")
        log2, counts = log1p / np.log(2), np.expm1(log1p)
    layers = {}
    if use != "X" or contract.LOG1P_MEAN not in ordered.layers:  # once, beside the best that the prediction has
        known = [name for name in _OF_THE_DISTRIBUTION if name in ordered.layers]
        layers = {name: _dense(ordered.layers[name], f"the prediction's layers[{name!r}]") for name in known}
    coords = contract.coords_px(truth) if contract.SPATIAL in truth.obsm else None
    columns = {"mean": contract.TRAINING_MEAN, "variance": contract.TRAINING_VARIANCE}
    training = {name: np.asarray(ordered.var[c], dtype=np.float64) for name, c in columns.items() if c in ordered.var}
    return Aligned(genes, log2, counts, contract.counts(truth, genes), layers, coords, training)


def align_both(method: str, predicted: AnnData, truth: AnnData) -> dict[str, Aligned]:
    """``method``: its X; and ``method_mean``, where the prediction has it: the expectation of log2(1 + count).

    Raises as :func:`align`.
    """
    made = {method: align(predicted, truth)}
    if contract.LOG1P_MEAN in predicted.layers:
        made[method + MEAN_SUFFIX] = align(predicted, truth, use=contract.LOG1P_MEAN)
    return made


def score(predicted: AnnData, truth: AnnData, *, use: str = "X") -> Scores:
    """Score ``predicted`` on its genes and on all spots of ``truth``: every metric that the prediction's layers allow.

    ``use`` and the errors raised are those of :func:`align`. Metrics of the distribution stand beside
    ``log1p_mean``, or beside ``X`` where the prediction has no such layer.

    >>> truth = genar.read_section("tissue:SIM2")
    >>> predicted = genar.predict(truth, "run", progress=False)
    >>> scores = genar.score(predicted, truth, use="log1p_mean")
    >>> len(scores.per_gene), scores.summary["mse"] > 0
    (20, True)
    """
    return score_aligned(align(predicted, truth, use=use))


def score_aligned(aligned: Aligned) -> Scores:
    """As :func:`score`, of what was aligned already."""
    per_gene = metrics.score_genes(aligned.log2, aligned.truth)
    summary = metrics.summarise(per_gene, aligned.counts, aligned.truth)
    for name, by in aligned.training.items():
        summary[f"pcc_top{metrics.N_LISTED}_{name}"] = metrics.listed_mean(per_gene["pcc"], by)
    for more, of_genes in (
        structure(aligned.log2, aligned.truth_log2, aligned.coords),
        calibration(aligned.layers, aligned.truth),
    ):
        summary |= more
        per_gene |= of_genes
    return Scores(summary, pd.DataFrame(per_gene, index=pd.Index(aligned.genes, name="gene")))


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


def _ordered(predicted: AnnData, truth: AnnData) -> AnnData:
    """The prediction with its spots in the truth's order."""
    for kind, whose, names in (
        ("spots", "prediction", predicted.obs_names),
        ("genes", "prediction", predicted.var_names),
        ("spots", "truth", truth.obs_names),
    ):
        if not len(names):
            raise InputError(f"the {whose} has no {kind}; expected at least one")
    for kind, theirs, ours in (
        ("spots", predicted.obs_names, truth.obs_names),
        ("genes", predicted.var_names, truth.var_names),
    ):
        if not theirs.is_unique:
            twice = theirs[theirs.duplicated()][0]
            raise InputError(f"the prediction's {kind} name {twice!r} more than once; expected each once")
        missing = theirs[~theirs.isin(ours)]
        if len(missing):
            advice = "are both of the same section?" if kind == "spots" else "cut both to the genes that they share"
            raise InputError(
                f"{len(missing)} of the prediction's {len(theirs)} {kind} are not in the truth "
                f"({first_names(missing)}), whose {len(ours)} are {first_names(ours)}; {advice}"
            )
    unpredicted = truth.obs_names[~truth.obs_names.isin(predicted.obs_names)]
    if len(unpredicted):
        raise InputError(
            f"{len(unpredicted)} of the truth's {truth.n_obs} spots have no prediction (first: {unpredicted[0]}); "
            "predict the whole section, or score a truth cut to the same spots"
        )
    if predicted.obs_names.equals(truth.obs_names):
        return predicted  # a view would copy each layer once more
    return predicted[truth.obs_names]


def _dense(values, where: str) -> np.ndarray:
    # row by row in memory, wherever they come from: sums in another order differ in their last digits
    values = np.asarray(contract.dense(values), dtype=np.float64, order="C")
    if not np.isfinite(values).all() or (values < 0).any():
        raise InputError(f"{where} holds NaN, infinite or negative values; expected counts >= 0")
    return values
