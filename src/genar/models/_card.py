"""The model card of a checkpoint: what it was made of, how well it did, what it is for."""

from collections.abc import Mapping, Sequence
from typing import Any

import genar
from genar.encoders import ENCODERS

_METRICS = {"pcc_200": "PCC-200", "mse": "MSE", "mae": "MAE", "coverage_90": "90 % coverage"}


def card_markdown(facts: Mapping, n_weights: int, scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The card as Markdown with the hub's header.

    ``facts`` are those of ``config.json``; ``scores``: section -> method -> metric -> value, or (value, low, high),
    empty where nothing was held out, or it is not known here.
    """
    training, features, panel = facts["training"], facts["features"], facts["panel"]
    name = _plain(facts["name"])
    lines = [
        "---", "library_name: genar", "license: unknown", "tags:", "- spatial-transcriptomics", "- histology",
        "- gene-expression", "---", "", f"# {name}: gene counts from H&E", "",
        "Predicts raw gene counts of every spot of a tissue slide from its H&E image.", "",
        "```bash", "genar predict SECTION_OR_SLIDE --model THIS --out pred.h5ad", "```", "", "## Made of", "",
    ]  # fmt: skip
    rows = {
        "model": f"{name}, {n_weights:,} weights, GenAR {facts['genar_version']}",
        "genes": f"{len(panel['genes'])}, recipe {_plain(panel['recipe'])}, sha256 {panel['sha256'][:16]}…",
        "trained on": f"{_names(training.get('sections', ()))}; {training.get('n_spots', '?')} spots",
        "patients in training": _names(training.get("patients", ())),
        "held out": _names(training.get("held_out", ())),
        "input": _input(features),
        "recipe": f"preset {_plain(training.get('preset', '?'))}, seed {training.get('config', {}).get('seed', '?')}",
    }
    lines += [f"- **{what}**: {value}" for what, value in rows.items()]
    lines += ["", "## Scores", "", *_scores(scores, training.get("held_out", ())), "", "## Use", ""]
    lines += [
        "For research on tissue like that of the training sections, stained and scanned alike, with the same encoder. "
        "Score it on sections of your own before you rely on it (`genar evaluate`).",
        "",
        "**Not for clinical decisions.** Predicted counts are estimates: read them with their intervals. A section of "
        "a patient who is in training says nothing of new patients.",
        "",
        "## Licence",
        "",
        "Not stated: who publishes the model names one. It must suit the licence of the training data and that of the "
        f"encoder ({_licence(features)}).",
        "",
        f"Written by GenAR {genar.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def _scores(scores: Mapping[str, Mapping[str, Mapping[str, Any]]], held_out: Sequence[str]) -> list[str]:
    if not scores and held_out:
        return [f"Held out were {_names(held_out)}; the scores on them are not recorded here, but in the training run."]
    if not scores:
        return ["No section was held out: nothing is known of how well it does."]
    known = [m for m in _METRICS if any(m in values for methods in scores.values() for values in methods.values())]
    lines = [
        "On held-out sections, in log2(1 + count) space; 95 % intervals by bootstrap over the spots. A name ending in "
        "_mean stands for the expectation, `mean` for the training mean.",
        "",
        "| section | method | " + " | ".join(_METRICS[m] for m in known) + " |",
        "| --- | --- |" + " --- |" * len(known),
    ]
    for section, methods in scores.items():
        for method, values in methods.items():
            told = " | ".join(_value(values.get(metric)) for metric in known)
            lines.append(f"| {_plain(section)} | {_plain(method)} | {told} |")
    return lines


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        known = value[0] is not None and value[0] == value[0]
        ends = value[1] is not None and value[1] == value[1]
        interval = f" ({value[1]:.3f} to {value[2]:.3f})" if ends else ""
        return f"{value[0]:.3f}{interval}" if known else "undefined"
    return f"{value:.3f}" if value is not None and value == value else "–"


def _input(features: Mapping) -> str:
    if features.get("input") == "patches":
        return f"patches of {features.get('crop_px')} px, end to end; convention {_plain(features.get('patch', '?'))}"
    encoder = _plain(features.get("encoder", "?"))
    views = f"{features.get('views', '?')} views, patch convention {_plain(features.get('patch', '?'))}"
    return f"features of {encoder} ({_licence(features)}), {views}"


def _licence(features: Mapping) -> str:
    if features.get("input") == "patches":
        return "none is used"
    row = ENCODERS.get(str(features.get("encoder", "")))
    if row is None:
        return "licence not known here"
    return f"licence {row.licence}" + (", access must be asked for" if row.gated else "")


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(_plain, names)) or "not recorded"


def _plain(text: Any) -> str:
    """Text from a file that cannot become markup."""
    return "".join(c if c.isalnum() or c in " ._-+/:,()" else "?" for c in str(text))
