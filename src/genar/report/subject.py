"""What a report is of: a prediction, alone or of a training run, and the truth where it is known."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from genar.data import ReadOptions, contract, find_sections, open_slide, options_for, pick, reading
from genar.data.door import door, read_json
from genar.data.formats import used_by
from genar.data.truth import read_truth
from genar.errors import InputError
from genar.evaluation import align, align_both, intervals, metrics, score_aligned
from genar.genes import Scales


@dataclass
class Subject:
    """A prediction [N, G] and what is known of it."""

    predicted: AnnData
    truth: AnnData | None = None
    """the section, its spots in the prediction's order"""
    run: dict = field(default_factory=dict)
    """``run.json`` of the training run, empty where there is none"""
    checkpoint: dict = field(default_factory=dict)
    """``config.json`` of its checkpoint"""
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    """method -> metric -> value, or (value, low, high)"""
    differences: dict[str, dict[str, Any]] = field(default_factory=dict)
    """"method minus rival" -> metric -> (value, low, high)"""
    scores: dict[str, float] = field(default_factory=dict)
    """of the expectation where the prediction has it, else of X"""
    per_gene: pd.DataFrame | None = None
    """a row a gene, of the same"""
    notes: tuple[str, ...] = ()

    @property
    def section(self) -> str:
        """The section's id."""
        return contract.name(self.predicted)

    @property
    def model(self) -> str:
        """Name of the model that predicted."""
        return str(self.predicted.uns[contract.GENAR].get(contract.PREDICTION, {}).get("model", "not recorded"))

    @property
    def scales(self) -> Scales | None:
        """The hierarchy of the genes, where the model has one and the checkpoint is known."""
        facts = self.checkpoint.get("model", {}).get("scales")
        if facts is None or self.checkpoint["panel"]["genes"] != list(self.predicted.var_names):
            return None
        return Scales(tuple(facts["order"]), tuple(facts["sizes"]), tuple(facts.get("clusters", ())))


def subjects(
    source: str | Path, truth: str | Path | None = None, read: Mapping[str, Any] | None = None
) -> list[Subject]:
    """What lies at ``source``: a prediction ``.h5ad``, or a training run, one subject a held-out section.

    The truth of a run is looked for where the run found it; of a prediction it is ``truth`` (a section, or
    ``FOLDER:ID``), or the run's where the file lies in one. It is read as ``read`` says (``image``, ``mpp``,
    ``bin_um``), else as the prediction was made; ``image`` also takes the place of the prediction's. Raises
    ``InputError`` where nothing is found there, the prediction is not one, ``truth`` is of other spots or lacks its
    genes, or one image is named for several predictions.
    """
    source, read = Path(source), dict(read or {})
    if is_run(source):
        files = sorted((source / "predictions").glob("*.h5ad"), key=lambda path: contract.section_key(path.stem))
        if not files:
            raise InputError(f"{source}: a run without predictions; train with --test ID, or report on a prediction")
        if truth is not None and len(files) > 1:
            raise InputError(
                f"--truth names one section, {source} holds {len(files)} predictions: report on one of "
                f"{source / 'predictions'}"
            )
        if len(files) > 1 and "image" in read and Path(read["image"]).is_file():
            raise InputError(
                f"{read['image']}: one image for {len(files)} predictions of {source}; name a folder of images called "
                "<id>.tif"
            )
        return [_subject(path, truth, source, read) for path in files]
    if not source.is_file():
        raise InputError(f"{source}: expected a prediction (.h5ad), a training run or a folder of runs, found none")
    home = source.parent.parent
    return [_subject(source, truth, home if source.parent.name == "predictions" and is_run(home) else None, read)]


def is_run(path: Path) -> bool:
    """Whether ``path`` is the folder of a finished training run."""
    return (path / "run.json").is_file()


def _subject(path: Path, truth: str | Path | None, home: Path | None, read: Mapping[str, Any]) -> Subject:
    with door(path, "prediction of a run", "a record of it is malformed: predict or train again"):
        return _made_of(path, truth, home, read)


def _made_of(path: Path, truth: str | Path | None, home: Path | None, read: Mapping[str, Any]) -> Subject:
    predicted = _read(path)
    if "image" in read:
        _take_image(predicted, ReadOptions(image=read["image"]))
    subject = Subject(predicted)
    if home is not None:
        subject.run = read_json(home / "run.json", "record of a run")
        config = home / "checkpoint" / "config.json"
        subject.checkpoint = read_json(config, "checkpoint's configuration") if config.is_file() else {}
    if note := contract.trained_on_note(predicted):
        subject.notes += (note,)
    if truth is None and not subject.run and (unused := sorted({*read} - {"image"})):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise InputError(f"{names}: how a truth is read; name it with --truth")
    section = read_truth(str(truth), predicted, **read) if truth is not None else _truth_of_run(subject, read)
    if section is None:
        return subject
    contract.check_same_places(predicted, section, "--truth")
    aligned = align_both("prediction", predicted, section)
    scores = score_aligned(list(aligned.values())[-1])
    if contract.name(section) != subject.section:
        subject.notes += (f"the truth is of section {contract.name(section)}, the prediction of {subject.section}",)
    subject.truth, subject.scores, subject.per_gene = section[predicted.obs_names], scores.summary, scores.per_gene
    scored = subject.run.get("data", {}).get(subject.section)
    if scored in (None, contract.digest(section)):
        subject.methods, subject.differences = _scores_of_run(home, subject.section)
    else:
        subject.notes += ("the truth is not the one that the run scored: the scores are of the one shown here",)
    if not subject.methods:
        found, _ = intervals.compare(aligned, [], subject.section)
        n_undefined = {m: int(np.isnan(metrics.pcc(one.log2, one.truth_log2)).sum()) for m, one in aligned.items()}
        subject.methods = {method: {**values, "n_undefined": n_undefined[method]} for method, values in found.items()}
        subject.notes += ("the baselines mean and ridge are scored by a training run, not by a prediction alone",)
    return subject


def _take_image(predicted: AnnData, options: ReadOptions) -> None:
    """Put the image that is named in the place of the prediction's; ``InputError`` where spots lie outside of it."""
    path = reading.named_image(contract.name(predicted), options)
    assert path is not None
    with contextlib.closing(open_slide(path)) as slide:
        contract.check_inside(predicted, slide.size_px)
    predicted.uns[contract.GENAR][contract.SLIDE] = str(path)


def _read(path: Path) -> AnnData:
    predicted = reading.read_adata(path)
    if contract.GENAR not in predicted.uns or contract.SPATIAL not in predicted.obsm:
        raise InputError(f"{path}: not a prediction of GenAR: no obsm['spatial'] or uns['genar']")
    if contract.PREDICTION not in predicted.uns[contract.GENAR]:
        raise InputError(
            f"{path}: expected a prediction, found no 'prediction' in its uns['genar']: a measured section is named by "
            "--truth, and another method's prediction needs a dict there, as {'model': its name}"
        )
    if not predicted.n_obs or not predicted.n_vars:
        raise InputError(f"{path}: {predicted.n_obs} spots and {predicted.n_vars} genes; expected at least one of each")
    contract.check_prediction(predicted, str(path))
    for part, values in contract.matrices(predicted):
        if (contract.stored(values) < 0).any():
            raise InputError(f"{path}: {part} holds values below 0; expected counts: predict again, or set them to 0")
    return predicted


def _truth_of_run(subject: Subject, read: Mapping[str, Any]) -> AnnData | None:
    """The section where the run found it; a note and ``None`` where it is no more, or is of other spots."""
    plan = subject.run.get("plan")
    if plan is None:
        return None
    folder = Path(plan["sections"])
    try:
        refs = pick(find_sections(folder), [subject.section])
        planned = used_by(refs, {name: plan[name] for name in ("mpp", "image", "bin_um")})
        options = options_for(refs, **{**planned, **read})
        section = refs[0].read(options)
        align(subject.predicted, section)
    except InputError as error:
        subject.notes += (f"without the truth, which the run read from {folder} ({error}); name it with --truth",)
        return None
    return section


def _scores_of_run(home: Path | None, section: str) -> tuple[dict, dict]:
    """Scores that the run wrote: with their intervals, or without them where it is an older one."""
    if home is None:
        return {}, {}
    names = ("metrics", "intervals")
    found = {name: home / f"{name}.json" for name in names if (home / f"{name}.json").is_file()}
    told = {name: read_json(path, "JSON of scores").get(section, {}) for name, path in found.items()}
    summary: Mapping = told.get("metrics", {})
    if not (facts := told.get("intervals")):
        return dict(summary), {}
    n_undefined = {method: values.get("n_undefined") for method, values in summary.items()}  # it has no interval
    methods = {name: {**values, "n_undefined": n_undefined.get(name)} for name, values in facts["methods"].items()}
    return methods, facts["differences"]


def log2_of(subject: Subject) -> dict[str, np.ndarray]:
    """``predicted`` and, where it is known, ``measured`` [N, G] in log2(1 + count) space."""
    values = {"predicted": contract.expected_log2(subject.predicted)}
    if subject.truth is not None:
        values["measured"] = np.log2(1 + contract.counts(subject.truth, list(subject.predicted.var_names)))
    return values
