"""From what lies at a path to pages: one of a prediction, or an index of many with a page for each."""

import base64
import csv
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.figure import Figure

from genar.data import contract, reading
from genar.data.door import door
from genar.data.files import plain, refuse_foreign, write_text
from genar.data.progress import Bar, no_bar
from genar.errors import InputError
from genar.report import maps
from genar.report.page import GENERATOR, render, write_page
from genar.report.subject import Subject, is_run, log2_of, subjects

_DEPTH = 3  # folders below the one that is named in which runs are looked for
_LONGEST = 60  # characters of a page's name, of which one may be four bytes
_METRICS = {"pcc_200": "PCC-200", "mse": "MSE", "mae": "MAE"}


@dataclass
class _Entry:
    """What the index keeps of a prediction once its page is written."""

    run: str
    page: str
    model: str
    section: str
    spots: AnnData
    """no counts: positions and the size of spots"""
    log2: dict[str, np.ndarray]
    genes: list[str]
    pcc: pd.Series | None
    scores: dict[str, str]
    other: str
    """what of the prediction is shown and scored, where that is not its X"""


def write_report(
    source: str | Path,
    out: str | Path,
    *,
    truth: str | Path | None = None,
    gene: str = "",
    read: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
    bar: Bar = no_bar,
) -> dict[str, Path]:
    """Write the page of a prediction or of a run; of several predictions an index with small multiples at ``out`` and
    a page each beside it. Returns name -> path.

    ``gene`` is the one that a page shows first (else that of the highest PCC), or the one of the small multiples: where
    it is not given, that of the highest mean PCC over all predictions of a section. ``read`` says how the truth is
    read, where neither it nor the prediction knows: ``image``, ``mpp`` (um per px), ``bin_um`` (um). Raises
    ``InputError`` as :func:`subject.subjects` does, or where no prediction has the gene.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {out}: expected a name that ends in .html")
    refuse_foreign(out, GENERATOR)
    source = Path(source)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder; expected a run, a folder of runs or a prediction (.h5ad)")
    runs = _runs(source) if source.is_dir() and not is_run(source) else {}
    if source.is_dir() and not runs and not is_run(source):
        raise InputError(f"{source}: no training run in it (no run.json); expected a run, a folder of runs or an .h5ad")
    if runs and truth is not None:
        raise InputError("--truth names one section: give it with one prediction, not with a folder of runs")
    if runs and read:
        raise InputError(
            "--image, --mpp and --bin-um tell how the truth of one run is read: give them with a run or a prediction, "
            "not with a folder of runs"
        )
    found = [] if runs else subjects(source, truth, read)
    if len(found) == 1:
        (subject,) = found
        for note in subject.notes:
            say(f"note: {note}")
        if gene and gene not in subject.predicted.var_names:
            raise InputError(f"--gene {gene}: the prediction of section {subject.section} has it not")
        return {"report": write_page(subject, out, gene=gene, say=say)}
    entries: list[_Entry] = []
    names = runs or {source.name: source}
    if gene:
        _refuse_unknown(gene, names)
    with bar("writing pages", len(names)) as tick:
        for done, (name, path) in enumerate(names.items(), start=1):
            for subject in found or subjects(path):
                page = out.with_name(_page_name(out.stem, name, subject.section, [entry.page for entry in entries]))
                write_page(subject, page, say=say)
                entries.append(_entry(subject, name, page))
            tick(done, len(names))
    _write_index(entries, out, source.name or str(source), gene, _methods(source))
    pages = {f"{entry.run} {entry.section}": out.with_name(entry.page) for entry in entries}
    return {"index": out, **pages}


def _refuse_unknown(gene: str, runs: Mapping[str, Path]) -> None:
    """``InputError``, before any page is written, where no prediction of a section has the gene."""
    known: dict[str, bool] = {}
    for path in (file for run in runs.values() for file in (run / "predictions").glob("*.h5ad")):
        known[path.stem] = known.get(path.stem, False) or gene in reading.read_adata(path).var_names
    if absent := [section for section, has in known.items() if not has]:
        raise InputError(f"--gene {gene}: no prediction of section {absent[0]} has it")


def _runs(folder: Path) -> dict[str, Path]:
    """Runs with predictions below a folder, by their path in it."""
    found = {}
    for depth in range(1, _DEPTH + 1):
        for path in sorted(folder.glob("/".join(["*"] * depth) + "/run.json")):
            if any((path.parent / "predictions").glob("*.h5ad")):
                found[str(path.parent.relative_to(folder))] = path.parent
    return found


def _methods(folder: Path) -> dict[str, str]:
    """The last two folders of a bench's run -> its method, as the bench's tables call it."""
    found: dict[str, str] = {}
    for path in (*folder.glob("runs.csv"), *folder.glob("*/runs.csv"), *folder.parent.glob("runs.csv")):
        with door(path, "table of a bench's runs"), path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if {"folder", "method", "seed"} <= set(row):
                    found.setdefault(row["folder"], row["method"] + (f", seed {row['seed']}" if row["seed"] else ""))
    return found


def _page_name(stem: str, run: str, section: str, taken: Sequence[str]) -> str:
    """Name of a page; with a hash of both names where it is cut, or others, made plain, gave the same."""
    whole = f"{stem}_{plain(run)}_{plain(section)}"
    name = whole[:_LONGEST]
    if len(whole) > _LONGEST or f"{name}.html".lower() in map(str.lower, taken):
        name += "-" + hashlib.sha256(f"{run}/{section}".encode()).hexdigest()[:8]
    return f"{name}.html"


def _entry(subject: Subject, run: str, page: Path) -> _Entry:
    scores = {
        title: f"{subject.scores[key]:.3f}"
        for key, title in _METRICS.items()
        if subject.scores.get(key, np.nan) == subject.scores.get(key, np.nan)
    }
    bare = AnnData(obs=pd.DataFrame(index=subject.predicted.obs_names))
    bare.obsm[contract.SPATIAL] = subject.predicted.obsm[contract.SPATIAL]
    bare.uns[contract.GENAR] = subject.predicted.uns[contract.GENAR]
    pcc = None if subject.per_gene is None else pd.Series(subject.per_gene["pcc"])
    log2 = {name: values.astype(np.float16) for name, values in log2_of(subject).items()}
    genes = list(map(str, subject.predicted.var_names))
    decode = subject.predicted.uns[contract.GENAR][contract.PREDICTION].get("decode", "mean")
    other = "expectation" if decode != "mean" and contract.has_expectation(subject.predicted) else ""
    return _Entry(run, page.name, subject.model, subject.section, bare, log2, genes, pcc, scores, other)


def _write_index(entries: list[_Entry], out: Path, name: str, gene: str, methods: Mapping[str, str]) -> None:
    sections: dict[str, dict] = {}
    for section in sorted({entry.section for entry in entries}, key=contract.section_key):
        here = [entry for entry in entries if entry.section == section]
        chosen, by_pcc = (gene, False) if gene else _gene(here)
        shown = [entry for entry in here if chosen in entry.genes]
        if not shown:
            raise InputError(f"--gene {gene}: no prediction of section {section} has it")
        top = max(1.0, *(float(_column(e, kind, chosen).max()) for e in shown for kind in e.log2))
        measured = next((entry for entry in shown if "measured" in entry.log2), None)
        cards = [
            {
                "run": methods.get("/".join(Path(entry.run).parts[-2:]), entry.run),
                "page": entry.page,
                "model": ", ".join(filter(None, (entry.model, entry.other))),
                "scores": entry.scores,
                "image": _thumbnail(entry, "predicted", chosen, top) if entry in shown else "",
            }
            for entry in here
        ]
        sections[section] = {
            "gene": chosen,
            "by_pcc": by_pcc,
            "top": f"{top:.1f}",
            "cards": cards,
            "measured": _thumbnail(measured, "measured", chosen, top) if measured else "",
        }
    flatters = any(entry["by_pcc"] for entry in sections.values())
    text = render(
        "index.html",
        "",
        title=f"Predictions of {name}",
        subtitle=f"Predictions: {len(entries)}, sections: {len(sections)}; log2(1 + count), one scale a section.",
        notes=("the gene shown is the one predicted best on average: it flatters",) if flatters else (),
        colours=", ".join(maps.colours(9)),
        sections=sections,
    )
    write_text(out, text)


def _gene(entries: list[_Entry]) -> tuple[str, bool]:
    """The gene of a section's small multiples, and whether its PCC chose it."""
    scored = [entry.pcc.fillna(-1) for entry in entries if entry.pcc is not None]
    if scored:
        mean = pd.Series(pd.concat(scored, axis=1).mean(axis=1, skipna=False)).dropna()
        if len(mean):
            return str(mean.idxmax()), True
    return entries[0].genes[0], False


def _column(entry: _Entry, kind: str, gene: str) -> np.ndarray:
    return entry.log2[kind][:, entry.genes.index(gene)].astype(np.float64)


def _thumbnail(entry: _Entry, kind: str, gene: str, top: float) -> str:
    """A small map as a data URL."""
    figure = Figure(figsize=(3.2, 3.0), layout="constrained")
    maps.draw_map(figure.subplots(), entry.spots, _column(entry, kind, gene), (0, top))
    maps.lay_out(figure, 110)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
