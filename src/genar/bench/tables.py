"""A recipe's tables as CSV, Markdown and LaTeX: values with 95 % intervals, and the paper's value beside ours."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from genar.bench.recipe import Cohort, Recipe, TableOfRecipe, shipped
from genar.bench.scores import BenchScores
from genar.data.files import write_text
from genar.errors import first_names
from genar.evaluation import intervals
from genar.evaluation.intervals import Interval

PAPER_METRICS = {"PCC-10": "pcc_10", "PCC-50": "pcc_50", "PCC-200": "pcc_200", "MSE": "mse", "MAE": "mae"}
"""The paper's name of a metric -> ours."""
_NAMES = {
    **{ours: theirs for theirs, ours in PAPER_METRICS.items()},
    "pcc_fixed": "PCC fixed",
    "rvd": "RVD",
    "coverage_90": "90 % cov.",
    "n_undefined": "n undef.",
}
_METRICS = ("pcc_10", "pcc_50", "pcc_200", "n_undefined", "pcc_fixed", "mse", "mae", "rvd", "coverage_90")
_FEW = 5  # sections, or patients
_NONE = "–"
_ESCAPES = {
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "µ": r"\textmu{}", "<": r"\textless{}",
    ">": r"\textgreater{}",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A row of a table: value, low and high of each metric, the same across patients and sections where there are
    several, and the paper's value where it has one."""

    data: str
    name: str
    values: Mapping[str, Interval]
    across: Mapping[str, Interval]
    patients: Sequence[str]
    """of the sections that it is of, "" where not known"""
    paper: Mapping[str, float]


@cache
def paper_results() -> dict[tuple[str, str, str], dict[str, float]]:
    """(table, data set, row) -> our name of the metric -> the paper's value."""
    path = next(p for p in shipped() if p.name == "paper_results.csv")
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = row["table"], row["dataset"], row["method"]
            found.setdefault(key, {})[PAPER_METRICS[row["metric"]]] = float(row["value"])
    return found


def table_lines(recipe: Recipe, table: TableOfRecipe, scores: BenchScores) -> list[Line]:
    """The rows of one table of the recipe, data set by data set."""
    only = recipe.shared(table.rows.values())
    lines = []
    for cohort in recipe.cohorts:
        for row, method in table.rows.items():
            key, paper = (cohort.name, method), _paper_row(table, cohort, row)
            patients = scores.patients_of(cohort.name, only or list(scores.sampled[key]))
            lines.append(Line(cohort.name, row, scores.row(key, only), scores.across(key, only), patients, paper))
    return lines


def _paper_row(table: TableOfRecipe, cohort: Cohort, row: str) -> dict[str, float]:
    return paper_results().get((table.paper, table.dataset or cohort.name, row), {})


def gain_lines(recipe: Recipe, scores: BenchScores) -> list[Line]:
    """A row for each pair that the recipe compares."""
    lines = []
    for cohort in recipe.cohorts:
        for pair in recipe.compare:
            patients = scores.patients_of(cohort.name, scores.shared(cohort.name, *pair))
            found = scores.gain(cohort.name, *pair), scores.gain_across(cohort.name, *pair)
            lines.append(Line(cohort.name, " minus ".join(pair), *found, patients, {}))
    return lines


def write_tables(recipe: Recipe, scores: BenchScores, out: Path) -> dict[str, Path]:
    """Write every table, the differences, the values by section and the runs; what it is called -> where it lies."""
    gains = gain_lines(recipe, scores)
    outputs: dict[str, Path] = {}
    for table in recipe.tables:
        lines = table_lines(recipe, table, scores)
        whole = table is recipe.tables[0]
        texts = {
            "md": _markdown(recipe, table, scores.notes, lines, gains if whole else [], scores.runs if whole else None),
            "csv": frame(lines, _per_method(scores.runs, table)).to_csv(float_format="%.6g"),
            "tex": _latex(recipe, table, scores.notes, lines),
        }
        for suffix, text in texts.items():
            write_text(out / f"{table.name}.{suffix}", text)
            outputs[table.name if suffix == "md" else f"{table.name} ({suffix})"] = out / f"{table.name}.{suffix}"
    for name, content in (
        *([("differences", frame(gains))] if gains else []),
        ("by_section", _without_unnamed(scores.by_section())),
        ("runs", _without_unnamed(scores.runs.set_index(["data", "method"]))),
    ):
        write_text(out / f"{name}.csv", content.to_csv(float_format="%.6g"))
        outputs[name.replace("_", " ")] = out / f"{name}.csv"
    return outputs


def frame(lines: Sequence[Line], facts: Mapping[tuple[str, str], Mapping] | None = None) -> pd.DataFrame:
    """Lines as a table with ``<metric>``, ``_low``, ``_high``, with several sections ``_across_low``, ``_across_high``
    and, where the paper has it, ``_paper``; then ``facts`` by (data, row)."""
    rows = {}
    for line in lines:
        row = {f"{m}{end}": v for m, t in line.values.items() for end, v in zip(("", "_low", "_high"), t, strict=True)}
        row = {name: value for name, value in row.items() if not name.startswith("n_undefined_")}
        for metric, (_, low, high) in line.across.items():
            row |= {f"{metric}_across_low": low, f"{metric}_across_high": high}
        row |= {f"{metric}_paper": value for metric, value in line.paper.items()}
        rows[line.data, line.name] = row | dict((facts or {}).get((line.data, line.name), {}))
    index = pd.MultiIndex.from_tuples(list(rows), names=["data", "method"])
    return _without_unnamed(pd.DataFrame(list(rows.values()), index=index))


def nested(table: pd.DataFrame) -> dict:
    """A table of :func:`frame` as method -> column -> value, within data -> where there are data sets."""
    if table.index.nlevels == 1:
        return table.to_dict(orient="index")
    return {data: part.droplevel(0).to_dict(orient="index") for data, part in table.groupby(level=0, sort=False)}


def _without_unnamed(table: pd.DataFrame) -> pd.DataFrame:
    """Without the level ``data`` where the recipe names sections and no data set."""
    return table if any(table.index.get_level_values("data")) else table.droplevel("data")


def _per_method(runs: pd.DataFrame, table: TableOfRecipe) -> dict[tuple[str, str], dict]:
    """(data, row) -> seeds, hashes, mean training seconds, largest memory."""
    facts = {}
    for row, method in table.rows.items():
        for data, of_method in runs[runs["method"] == method].groupby("data", dropna=False):
            joined = {
                f"{column}s" if column == "seed" else column: " ".join(dict.fromkeys(of_method[column].astype(str)))
                for column in ("seed", "encoder", "inputs", "panel_sha256", "features", "checkpoint_sha256", "folder")
            }
            facts[str(data), row] = {
                "seconds_training": of_method["seconds_training"].mean(),
                "peak_rss_mib": of_method["peak_rss_mib"].max(),
                **joined,
            }
    return facts


def _about(recipe: Recipe, table: TableOfRecipe, notes: Sequence[str] = ()) -> str:
    """What a reader must know: what was held out, the panel, where the paper's values are from."""
    only = recipe.shared(table.rows.values()) or recipe.held_out
    how = {
        "section": f"{_join(only)} held out" if only else "each section held out in turn",
        "paper": "the paper's section held out",
        "patient": f"the patients of {_join(only)} held out in turn" if only else "each patient held out in turn",
        "kfold": f"{recipe.k} folds",
    }[recipe.protocol]
    told = [f"Protocol {recipe.protocol}: {how}. Means over held-out sections and seeds ({_join(recipe.seeds)})."]
    told.append("log2(1 + count) space; 95 % intervals by bootstrap over spots.")
    for cohort in recipe.cohorts:
        name = f"{cohort.name or _join(cohort.sections)}: "
        if recipe.protocol == "paper":
            told.append(f"{name}{cohort.paper} held out of {len(cohort.sections)} sections.")
            if cohort.sisters:
                told.append(f"{cohort.sisters} other sections of its donor are in training.")
    if any(Path(cohort.panel) in shipped() for cohort in recipe.cohorts):
        told.append("The panel is the paper's list, which was selected over all sections, those held out included.")
    told += [f"{note[0].upper()}{note[1:]}." for note in notes]
    if table.paper:
        where = f" on {table.dataset}" if table.dataset else ""
        told.append(f"Beside ours, table {table.paper} of the paper{where}.")
    return " ".join(told)


def _join(values) -> str:
    return ", ".join(map(str, values))


def _columns(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """(metric, "" for ours or "paper"): the paper's beside ours where any line has one."""
    columns = []
    for metric in _METRICS:
        if any(metric in line.values for line in lines):
            columns.append((metric, ""))
        if any(metric in line.paper for line in lines):
            columns.append((metric, "paper"))
    return columns


def _grid(lines: Sequence[Line], *, signed: bool = False) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table as text."""
    columns, with_data = _columns(lines), any(line.data for line in lines)
    head = [*(["data"] if with_data else []), "difference" if signed else "method"]
    head += [f"{_NAMES[metric]}{f' ({which})' if which else ''}" for metric, which in columns]
    rows = []
    for line in lines:
        cells = [*([line.data] if with_data else []), line.name]
        for metric, which in columns:
            if which:
                cells.append(f"{line.paper[metric]:.3f}" if metric in line.paper else _NONE)
            else:
                cells.append(_cell(metric, line.values[metric], "+" if signed else ""))
        rows.append(cells)
    return head, rows


def _cell(metric: str, found: Interval, sign: str = "") -> str:
    if np.isnan(found[0]):
        return _NONE
    if found[1] == found[2]:  # constant by definition, as the training mean's PCC
        return f"{found[0]:{sign}.3f}"
    return f"{found[0]:.3g}" if metric == "n_undefined" else intervals.interval_in_words(found, sign)


def _markdown(recipe: Recipe, table: TableOfRecipe, notes, lines, gains, runs: pd.DataFrame | None) -> str:
    title = recipe.title if table is recipe.tables[0] else f"{recipe.title}: {table.name.replace('_', ' ')}"
    parts = [f"# {title}", _about(recipe, table, notes), _pipes(*_grid(lines))]
    if gains:
        parts.append(_pipes(*_grid(gains, signed=True)))
    parts += _across(lines, gains)
    if runs is not None:
        parts.append(
            "What each method saw of a spot, seeds, time (mean training seconds of a run), memory (largest peak of a "
            "run), hashes:"
        )
        parts.append(_pipes(*_runs_grid(runs)))
    return "\n\n".join(parts) + "\n"


def _across(lines: Sequence[Line], gains: Sequence[Line]) -> list[str]:
    """The tables once more with intervals across patients and sections, where several are held out."""
    parts = []
    for of, signed in ((lines, False), (gains, True)):
        wide = [replace(line, values=line.across, paper={}) for line in of if line.across]
        parts += [_pipes(*_grid(wide, signed=signed))] if wide else []
    if not parts:
        return []
    fewest, what, how = min(map(_drawn, (line.patients for line in (*lines, *gains) if line.across)))
    few = f"; from {fewest} {what} they are too narrow" if fewest < _FEW else ""
    return [f"Across {what} ({how}), 95 % intervals{few}:", *parts]


def _drawn(patients: Sequence[str]) -> tuple[int, str, str]:
    """How many of what are drawn for an interval across the sections of these patients, and what it holds for."""
    groups = intervals.sections_of(patients)
    if len(groups) == 1:
        how = "sections are drawn, too: what holds for another section of that patient"
        return len(patients), "sections of one patient", how
    if any(patients):
        how = "patients are drawn, and sections of each: what holds for a new patient"
        how += "" if all(patients) else "; sections of unknown patients are taken for one each"
        return len(groups), "patients", how
    return len(groups), "sections", "sections are drawn, too: what holds for a new section"


def _runs_grid(runs: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    head = ["data", "method", "inputs", "seeds", "encoder", "runs", "training s", "peak MiB", "panel", "features"]
    head.append("checkpoints")
    rows = []
    for key, part in runs.groupby(["data", "method"], sort=False, dropna=False):
        data, method = key  # pyright: ignore
        short = {name: _join(v[:8] for v in dict.fromkeys(part[name])) for name in ("panel_sha256", "features")}
        checkpoints = [v[:8] for v in dict.fromkeys(part["checkpoint_sha256"])]
        rows.append([
            str(data), str(method), _join(dict.fromkeys(part["inputs"])),
            _join(v for v in dict.fromkeys(part["seed"]) if v != "") or _NONE,
            _join(dict.fromkeys(part["encoder"])), str(len(part)), _number(float(np.mean(part["seconds_training"]))),
            _number(float(np.max(part["peak_rss_mib"]))), *short.values(),
            first_names(checkpoints, 4),
        ])  # fmt: skip
    if not any(row[0] for row in rows):
        head, rows = head[1:], [row[1:] for row in rows]
    return head, rows


def _number(value: float) -> str:
    return _NONE if np.isnan(value) else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _pipes(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _latex(recipe: Recipe, table: TableOfRecipe, notes, lines: Sequence[Line]) -> str:
    """A ``table`` environment for ``booktabs``."""
    head, rows = _grid(lines)
    n_text = len(head) - len(_columns(lines))
    body = [" & ".join(map(escape, row)) + r" \\" for row in (head, *rows)]
    label = f"{recipe.title}: {table.name}" if table is not recipe.tables[0] else recipe.title
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{escape(label)}. {escape(_about(recipe, table, notes))}}}",
        rf"\begin{{tabular}}{{{'l' * n_text}{'r' * (len(head) - n_text)}}}", r"\toprule", body[0], r"\midrule",
        *body[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def escape(text: str) -> str:
    r"""Text as LaTeX takes it.

    >>> print(escape("mouse_brain, 95 %"))
    mouse\_brain, 95 \%
    """
    return "".join(_ESCAPES.get(letter, letter) for letter in text)
