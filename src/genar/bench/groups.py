"""The paper's appendix C: the panel of each data set and the groups of its genes, beside the printed ones."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from genar.bench.plan import Plan, folds
from genar.bench.recipe import Cohort, find_beside
from genar.data import Sections, contract
from genar.data.door import read_json
from genar.data.files import write_text
from genar.errors import InputError
from genar.genes import cluster_order, read_panel, select_panel


def write_groups(plan: Plan, home: Path) -> dict[str, Path]:
    """For each cohort ``panel_<data>.txt`` (all genes of recipe ``paper``, else the modelled), ``groups_<data>`` as
    CSV and JSON; and ``groups.csv``, how they agree with the paper's. What it is called -> where it lies."""
    outputs, rows = {}, {}
    # before anything is written
    printed = {cohort.name: _printed_groups(plan, cohort) for cohort in plan.recipe.cohorts}
    for cohort in plan.recipe.cohorts:
        name = cohort.name or "sections"
        listed, groups = _panel_and_groups(plan, cohort)
        for path, text in (
            (home / f"panel_{name}.txt", "\n".join(listed) + "\n"),
            (home / f"groups_{name}.json", json.dumps(groups, indent=1) + "\n"),
            (home / f"groups_{name}.csv", _table(groups).to_csv(index=False)),
        ):
            write_text(path, text)
            outputs[path.stem.replace("_", " ") + ("" if path.suffix == ".txt" else f" ({path.suffix[1:]})")] = path
        rows[name] = _compare(plan, cohort, listed, groups, printed[cohort.name])
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("data")
    write_text(home / "groups.csv", frame.to_csv(float_format="%.6g"))
    return {"groups beside the paper's": home / "groups.csv", **outputs}


def _panel_and_groups(plan: Plan, cohort: Cohort) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """The panel as it would be printed, and group -> genes of the modelled ones on the training sections."""

    def read(names: Iterable[str]) -> Sections:
        return Sections([plan.refs[cohort.name][name] for name in names], plan.options)

    paper = (cohort.paper,) if cohort.paper else ()
    held = folds(plan.recipe.protocol, cohort.sections, held_out=plan.recipe.held_out, paper=paper, k=plan.recipe.k)[0]
    training = read(name for name in cohort.sections if name not in held.test)
    if Path(cohort.panel).is_file():
        listed = read_panel(cohort.panel).genes
    elif cohort.panel == "paper":  # over all sections, as the paper did
        listed = select_panel(read(cohort.sections), n_genes=None, recipe="paper").genes
    else:
        listed = select_panel(training, n_genes=plan.recipe.n_genes, recipe=cohort.panel).genes
    genes = listed if Path(cohort.panel).is_file() else listed[: plan.recipe.n_genes]
    order, clusters = cluster_order(np.concatenate([contract.counts(section, list(genes)) for section in training]))
    groups: dict[str, list[str]] = {}
    for place, cluster in zip(order.tolist(), clusters.tolist(), strict=True):
        groups.setdefault(str(cluster), []).append(genes[place])
    return listed, groups


def _table(groups: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    rows = [{"group": group, "n_genes": len(genes), "genes": " ".join(genes)} for group, genes in groups.items()]
    return pd.DataFrame(rows)


def _printed_groups(plan: Plan, cohort: Cohort) -> dict[str, list[str]]:
    """The paper's groups, where the recipe names a file of them; else none. Raises ``InputError`` where it is none."""
    asked = plan.recipe.groups
    if asked is None or not asked.groups:
        return {}
    path, what = _file(asked.groups, cohort), "JSON of groups, each a list of genes"
    groups = read_json(path, what)
    lists = [one for one in groups.values() if isinstance(one, list) and all(isinstance(gene, str) for gene in one)]
    if not groups or len(lists) < len(groups):
        raise InputError(f"{path}: expected {what}, found {str(groups)[:80]}")
    return groups


def _compare(
    plan: Plan,
    cohort: Cohort,
    listed: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    theirs: Mapping[str, Sequence[str]],
) -> dict:
    """How panel and groups agree with the paper's, where the recipe names those."""
    asked = plan.recipe.groups
    assert asked is not None
    row: dict = {"n_genes": len(listed), "n_groups": len(groups), "largest_group": max(map(len, groups.values()))}
    if asked.genes:
        printed = read_panel(_file(asked.genes, cohort)).genes
        row |= {"paper_n_genes": len(printed), "n_shared": len(set(printed) & set(listed))}
    if theirs:
        row |= {"paper_n_groups": len(theirs), "paper_largest_group": max(map(len, theirs.values()))}
        row["adjusted_rand_index"] = _agreement(groups, theirs)
    return row


def _file(name: str, cohort: Cohort) -> Path:
    name = name.replace("{dataset}", cohort.name)
    if (path := find_beside(Path(), name)) is None:
        raise InputError(f"groups: no file {name!r} in the working folder or among those of the package")
    return path


def _agreement(ours: Mapping[str, Sequence[str]], theirs: Mapping[str, Sequence[str]]) -> float:
    """Adjusted Rand index over the genes of both; NaN where there are fewer than two."""
    from sklearn.metrics import adjusted_rand_score

    one, other = ({gene: group for group, genes in part.items() for gene in genes} for part in (ours, theirs))
    shared = sorted(set(one) & set(other))
    if len(shared) < 2:
        return float("nan")
    return float(adjusted_rand_score([other[gene] for gene in shared], [one[gene] for gene in shared]))
