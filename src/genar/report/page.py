"""One self-contained page of a prediction: maps, genes, groups, scores, calibration, provenance."""

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from bokeh.embed import components
from bokeh.resources import Resources
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

import genar
from genar.data import contract
from genar.data.door import door
from genar.data.files import MARK, json_ready, refuse_foreign, write_text
from genar.report import figures
from genar.report.matrices import pack
from genar.report.subject import Subject

_SHOWN_METRICS = {
    "pcc_10": "PCC-10", "pcc_50": "PCC-50", "pcc_200": "PCC-200", "n_undefined": "n undefined",
    "pcc_fixed": "PCC, undefined as 0", "mse": "MSE",
    "mae": "MAE", "rvd": "RVD",
}  # fmt: skip
_UNITS = {"mse": "log2(1 + count)", "mae": "log2(1 + count)"}
_VERSIONS = ("python", "torch", "anndata", "numpy")
_DRAWN = {"samples": "{} trajectories", "seed": "seed {}"}
_LARGE_BYTES = 15 << 20


GENERATOR = f'name="generator" content="{MARK}"'


def write_page(subject: Subject, path: Path, *, gene: str = "", say: Callable[[str], None] = print) -> Path:
    """Write the page of a prediction: one HTML file that asks nothing of the network. It shows ``gene`` first, else the
    gene of the highest PCC.

    A page beyond 15 MB is written, and said to be large.
    """
    refuse_foreign(path, GENERATOR)
    with door(f"section {subject.section}", "prediction or run", "a record of it is malformed: predict or train again"):
        text = page_html(subject, gene)
    write_text(path, text)
    if len(text) > _LARGE_BYTES:
        n = subject.predicted.shape
        say(f"note: {path} takes {len(text) / 2**20:.0f} MB ({n[0]} spots x {n[1]} genes); a browser may be slow")
    return path


def page_html(subject: Subject, gene: str = "") -> str:
    """The page as text."""
    shown = [panel for panel in figures.PANELS if _has(subject, panel)]
    plots = figures.spot_maps(subject.predicted, shown) | _calibration(subject)
    history = subject.checkpoint.get("training", {}).get("history") or []
    training = figures.training_figures(history, subject.checkpoint["training"]["best_epoch"]) if history else {}
    script, places = components({**plots, **training}, wrap_script=False)  # pyright: ignore
    payload = _script_safe(_payload(subject) | {"first": gene})
    return render(
        "page.html",
        payload,
        bokeh_scripts=Resources(mode="inline", components=["bokeh"]).js_raw,
        figures_script=script,
        title=f"Section {subject.section}, predicted by {subject.model}",
        subtitle=_subtitle(subject),
        notes=subject.notes,
        maps=[Markup(places[f"map_{panel}"]) for panel in shown],
        calibration=[Markup(places[name]) for name in ("coverage", "zeros") if name in places],
        training=[Markup(places[name]) for name in training],
        palettes=list(figures.PALETTES),
        expected=contract.has_expectation(subject.predicted),
        uncertain=_uncertainties(subject),
        genes=list(subject.predicted.var_names),
        metrics=_SHOWN_METRICS,
        units=_UNITS,
        scores=subject.methods,
        differences=subject.differences,
        calibrated=_calibration_words(subject),
        provenance=_provenance(subject),
        groups=subject.scales is not None,
    )


def render(template: str, payload: str, **values: Any) -> str:
    """A template of this folder with the page's own style and script; names from files are escaped.

    Scripts carry a number made of the payload, and the page forbids all others.
    """
    here = files("genar.report")
    environment = Environment(
        loader=FunctionLoader(lambda name: (here / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    nonce = hashlib.sha256(payload.encode()).hexdigest()[:24]
    return environment.get_template(template).render(
        nonce=nonce,
        payload=Markup(payload),
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        script=Markup((here / "page.js").read_text(encoding="utf-8")),
        version=genar.__version__,
        **values,
    )


def _script_safe(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(json_ready(value), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _has(subject: Subject, panel: str) -> bool:
    if panel == "predicted":
        return True
    return bool(_uncertainties(subject)) if panel == "uncertainty" else subject.truth is not None


def _uncertainties(subject: Subject) -> dict[str, str]:
    layers = subject.predicted.layers
    found = {"width": "width of the 90 % interval"} if "q05" in layers and "q95" in layers else {}
    return found | ({"zero": "probability of zero"} if contract.P_ZERO in layers else {})


def _payload(subject: Subject) -> dict:
    """What the page's script works on."""
    predicted, genes = subject.predicted, list(subject.predicted.var_names)
    matrices = {"counts": pack(contract.values(predicted, genes))}
    expected = contract.expected_counts(predicted)
    if contract.has_expectation(predicted):
        matrices["mean"] = pack(expected)
    named = {"low": "q05", "high": "q95", "zero": contract.P_ZERO}
    matrices |= {
        name: pack(contract.layer(predicted, layer)) for name, layer in named.items() if layer in predicted.layers
    }
    if subject.truth is not None:
        matrices["measured"] = pack(contract.counts(subject.truth, genes))
    scales = subject.scales
    groups = []
    if scales is not None:
        for k in range(scales.n_scales):
            edges = scales.edges(k).tolist()
            groups.append([list(scales.order[a:b]) for a, b in pairwise(edges)])
    return {
        "section": subject.section,
        "n_spots": predicted.n_obs,
        "genes": genes,
        "barcodes": list(map(str, predicted.obs_names)),
        "matrices": matrices,
        "groups": groups,
        "table": _table(subject, expected),
        "scored": "mean" if contract.LOG1P_MEAN in predicted.layers else "counts",
        "palettes": figures.PALETTES,
        "span_um": contract.mpp(predicted),
    }


def _table(subject: Subject, expected: np.ndarray) -> dict[str, list]:
    """A column a figure of the genes, whose ``expected`` counts are [N, G], in the panel's order; NaN where it is
    undefined."""
    genes = list(subject.predicted.var_names)
    columns: dict[str, np.ndarray] = {}
    if subject.truth is not None and subject.per_gene is not None:
        names = {"pcc": "PCC", "mse": "MSE", "coverage_90": "in 90 %"}
        columns |= {title: subject.per_gene[c].to_numpy() for c, title in names.items() if c in subject.per_gene}
        columns["mean measured"] = contract.counts(subject.truth, genes).mean(axis=0)
    columns["mean predicted"] = expected.mean(axis=0)
    return {title: [None if v != v else float(f"{v:.4g}") for v in values] for title, values in columns.items()}


def _calibration(subject: Subject) -> dict:
    if subject.truth is None:
        return {}
    made = {}
    coverage = figures.coverage_figure(subject.scores)
    if coverage is not None:
        made["coverage"] = coverage
    layers, genes = subject.predicted.layers, list(subject.predicted.var_names)
    if contract.P_ZERO in layers:
        p_zero = contract.layer(subject.predicted, contract.P_ZERO)
        made["zeros"] = figures.zero_figure(p_zero, contract.counts(subject.truth, genes))
    return made


def _calibration_words(subject: Subject) -> str:
    found = subject.scores.get("coverage_90")
    if found is None:
        return ""
    return f"90 % intervals hold {found:.1%} of the true counts, and are {subject.scores['width_90']:.1f} counts wide."


def _subtitle(subject: Subject) -> str:
    n_spots, n_genes = subject.predicted.shape
    source = _simulated(subject.predicted)
    truth = "beside the measured counts" if subject.truth is not None else "no measured counts"
    return f"{n_spots:,} spots, {n_genes} genes, {truth}{source}"


def _simulated(predicted: AnnData) -> str:
    if contract.of_simulation(predicted):
        return ", SIMULATED tissue"
    return ", by a model of SIMULATED tissue" if contract.simulated(predicted) else ""


def _provenance(subject: Subject) -> dict[str, str]:
    facts = subject.predicted.uns[contract.GENAR]
    made: Mapping = facts.get(contract.PREDICTION, {})
    training = subject.checkpoint.get("training", {})
    versions = {name: text for name, text in subject.run.get("environment", {}).items() if name in _VERSIONS}
    told = {
        "section": subject.section,
        "patient": facts.get(contract.PATIENT, ""),
        "slide": Path(str(facts.get(contract.SLIDE, ""))).name,
        "pixel size": f"{contract.mpp(subject.predicted):.4g} um",
        "model": subject.model,
        "weights": _short(made.get("checkpoint_sha256", "")),
        "preset": training.get("preset", ""),
        "trained on": ", ".join(training.get("sections", ())),
        "spots trained on": training.get("n_spots", ""),
        "encoder": made.get("encoder", ""),
        "panel": f"{subject.predicted.n_vars} genes"
        + (f", recipe {subject.checkpoint['panel'].get('recipe', '')}" if subject.checkpoint else ""),
        "panel hash": _short(made.get("panel_sha256", "")),
        "decoding": _decoding(made),
        "GenAR": made.get("genar_version", ""),
        "versions": ", ".join(f"{name} {text}" for name, text in versions.items()),
        "command": subject.run.get("command", ""),
    }
    return {name: str(value) for name, value in told.items() if str(value)}


def _decoding(made: Mapping) -> str:
    """How the counts were drawn, as far as the model draws any.

    >>> _decoding({"decode": "greedy", "samples": 16, "seed": 0}), _decoding({"decode": "mean"})
    ('greedy, 16 trajectories, seed 0', 'mean')
    """
    parts = [str(made.get("decode", ""))]
    parts += [words.format(made[name]) for name, words in _DRAWN.items() if str(made.get(name, ""))]
    return ", ".join(filter(None, parts))


def _short(sha256: str) -> str:
    return f"sha256 {sha256[:16]}…" if sha256 else ""
