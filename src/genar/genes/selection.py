"""Selection of a panel by the recipes of the paper's released lists, by other usual rules, or from a user's list."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from threadpoolctl import threadpool_limits

from genar import defaults
from genar.data import contract
from genar.data.neighbours import nearest_spots
from genar.data.progress import Bar, counted, no_bar
from genar.errors import InputError, first_names
from genar.genes.panel import Panel

# Mitochondrial and ribosomal genes; case-sensitive, so that mouse Rps genes stay, as in the paper's lists.
DROPPED_PREFIXES = ("MT", "mt", "RPS", "RPL")
PAPER_N_TOP = defaults.PAPER_N_TOP
_BY_BOTH_RANKS = ("clean", "paper")
_N_HVG = 2000
_N_NEIGHBOURS = 6


def select_panel(
    sections: Sequence[AnnData],
    *,
    n_genes: int | None = 200,
    recipe: str = "clean",
    n_top: int = PAPER_N_TOP,
    bar: Bar = no_bar,
) -> Panel:
    """Select a panel from ``sections``: give it the training sections only, unless the recipe is meant to see all.

    ``paper`` and ``clean`` take the highly variable genes of each section (scanpy's default flavour, 2000 a section),
    drop mitochondrial and ribosomal names, and rank the union by mean and by standard deviation of the raw counts over
    all spots. ``paper`` intersects the top ``n_top`` of both and takes the first ``n_genes`` by alphabet (all where
    ``None``), as the released code does. ``clean`` takes the least rank cut whose intersection holds ``n_genes``, and
    cuts the surplus by the rank of the mean.

    ``highest_mean`` takes the ``n_genes`` of highest mean raw count, ``hvg`` the most variable by scanpy with the
    section as batch, ``moran`` those of the largest spatial autocorrelation (Moran's I of the normalised, logarithmic
    counts over the six nearest spots, the mean over sections); all three of the genes common to all sections but
    mitochondrial and ribosomal ones. Ties go by name. Genes come in alphabetical order.

    ``sections`` are gone through twice, one at a time, so that they may be read as they are asked for; ``hvg`` alone
    holds the counts of all.

    Raises ``InputError`` where the recipe is unknown, a section holds other things than raw counts or names a gene
    twice, or fewer genes are left than asked for.

    >>> training = genar.read_section("tissue:SIM1")
    >>> panel = genar.select_panel([training], n_genes=20)
    >>> len(panel.genes), panel.sections
    (20, ('SIM1',))
    """
    if recipe not in RECIPES:
        raise InputError(f"panel recipe {recipe!r} is not known; expected one of {', '.join(RECIPES)}, or a file")
    if n_genes is not None and n_genes < 1:
        raise InputError(f"a panel needs at least one gene, {n_genes} asked for")
    if not isinstance(sections, Sequence):
        sections = [sections] if isinstance(sections, AnnData) else list(sections)
    total = 2 * len(sections)
    # numba, under scanpy, would take all cores, and leave them set, also for torch
    with threadpool_limits(), bar("selecting genes", total) as tick:
        names, common = _names_and_common(counted(sections, tick, total))
        genes = common if recipe in _BY_BOTH_RANKS else [g for g in common if not g.startswith(DROPPED_PREFIXES)]
        parts = (_of_genes(section, genes) for section in counted(sections, tick, total, len(sections)))
        if recipe in _SCORES:
            return Panel(_best(parts, genes, n_genes, recipe, len(sections)), recipe, names)
        chosen, n_top = _by_both_ranks(parts, genes, n_genes, recipe, n_top, len(sections))
        return Panel(chosen, recipe, names, n_top)


def _names_and_common(sections: Iterable[AnnData]) -> tuple[tuple[str, ...], list[str]]:
    """Name of each section, and the sorted names of the genes that all of them measure.

    Raises ``InputError`` where one holds other things than raw counts, a gene twice, or where no gene is in all.
    """
    names: list[str] = []
    common: set[str] | None = None
    for section in sections:
        name = contract.name(section)
        contract.check_names(section, f"section {name}")
        contract.check_counts(section, f"section {name}")
        names.append(name)
        common = set(section.var_names) if common is None else common.intersection(section.var_names)
    if common is None:
        raise InputError("panel: no section to select from; name at least one training section")
    if not common:
        raise InputError("panel: the sections have no gene in common; do their gene names use the same kind of id?")
    return tuple(names), sorted(common)


def _of_genes(section: AnnData, genes: list[str]) -> AnnData:
    """The counts of ``genes`` alone, csr, in memory, with what else a recipe looks at."""
    x = contract.in_memory(section.X)
    if not isinstance(x, sparse.csr_matrix) or x.dtype.kind != "f":
        x = sparse.csr_matrix(x, dtype=np.float32)
    x = contract.without_duplicates(x)[:, section.var_names.get_indexer(genes)]
    made = AnnData(x, obs=pd.DataFrame(index=section.obs_names), var=pd.DataFrame(index=pd.Index(genes)))
    made.obsm.update({contract.SPATIAL: section.obsm[contract.SPATIAL]} if contract.SPATIAL in section.obsm else {})
    made.uns[contract.GENAR] = section.uns[contract.GENAR]
    return made


def listed_panel(panel: Panel, sections: Sequence[AnnData], aliases: Mapping[str, str] | None = None) -> Panel:
    """A user's list as a panel of ``sections``: each gene must be measured by all of them.

    A name that some section lacks is replaced by its entry in ``aliases`` where that is given and measured by all.
    Raises ``InputError`` naming the genes that are missing.
    """
    names, found = _names_and_common(sections)
    common, aliases = set(found), aliases or {}
    genes = tuple(g if g in common or aliases.get(g) not in common else aliases[g] for g in panel.genes)
    if missing := [gene for gene in genes if gene not in common]:
        where = f"the {len(names)} sections" if len(names) > 1 else f"section {''.join(names)}"
        raise InputError(
            f"panel {panel.recipe}: {len(missing)} of {len(genes)} genes are not measured in {where} "
            f"({first_names(missing, 5)}{contract.spelling_hint(missing, common)}); take them out of the list, or give "
            "their other names with --aliases"
        )
    return Panel(genes, panel.recipe, panel.sections if panel.recipe in RECIPES else names)  # who chose is kept


def _by_both_ranks(
    sections: Iterable[AnnData], common: list[str], n_genes: int | None, recipe: str, n_top: int, n_sections: int
) -> tuple[tuple[str, ...], int]:
    """Genes in the top of both mean and standard deviation, and the cut."""
    variable, moments = set(), _Moments(len(common))
    for section in sections:
        variable |= _highly_variable(section)
        moments.add(section)
    place = [i for i, gene in enumerate(common) if gene in variable and not gene.startswith(DROPPED_PREFIXES)]
    if not place:
        raise InputError("panel: no variable gene is left after mitochondrial and ribosomal genes are dropped")
    names, mean, variance = [common[i] for i in place], moments.mean[place], moments.variance[place]
    by_mean = _ranks(mean)
    worst = np.maximum(by_mean, _ranks(variance))  # in both tops of n where below n
    n_available = len(names)
    if n_genes is not None and n_genes > n_available:
        raise InputError(
            f"panel: {n_genes} genes asked for, only {n_available} are variable and common to the {n_sections} "
            f"sections; ask for --n-genes {n_available} or fewer"
        )
    if recipe == "paper":
        chosen = np.flatnonzero(worst < n_top)[:n_genes]  # names are sorted already
        if n_genes is not None and len(chosen) < n_genes:
            raise InputError(
                f"panel: recipe paper with --n-top {n_top} leaves {len(chosen)} of {n_genes} genes; raise --n-top"
            )
    else:
        n_genes = n_available if n_genes is None else n_genes
        n_top = int(np.sort(worst)[n_genes - 1]) + 1
        inside = np.flatnonzero(worst < n_top)
        chosen = np.sort(inside[np.argsort(by_mean[inside], kind="stable")][:n_genes])
    return tuple(names[i] for i in chosen), n_top


class _Moments:
    """Mean and variance of the counts of each gene over the spots of all sections, from sums of whole numbers."""

    def __init__(self, n_genes: int):
        self._n, self._total, self._squares = 0, np.zeros(n_genes), np.zeros(n_genes)

    def add(self, section: AnnData) -> None:
        x = sparse.csr_matrix(section.X, dtype=np.float64)
        self._n += section.n_obs
        self._total += np.asarray(x.sum(axis=0)).ravel()
        self._squares += np.asarray(x.power(2).sum(axis=0)).ravel()

    @property
    def mean(self) -> np.ndarray:
        return self._total / self._n

    @property
    def variance(self) -> np.ndarray:
        return (self._n * self._squares - self._total**2) / (self._n * max(self._n - 1, 1))


def _normalised(section: AnnData) -> AnnData:
    """A copy without empty spots and genes, each spot at the median total, ln(1 + x)."""
    import scanpy as sc

    totals, used = (np.asarray(section.X.sum(axis=axis)).ravel() for axis in (1, 0))  # pyright: ignore
    section = section[totals > 0, used > 0].copy()
    section.uns.pop("log1p", None)  # of the file's own X; scanpy would take these counts for logarithms
    if section.n_obs > 1:
        sc.pp.normalize_total(section)  # to the median total
        sc.pp.log1p(section)
    return section


def _highly_variable(section: AnnData) -> set[str]:
    section = _normalised(section)
    if section.n_obs < 2:
        return set(section.var_names)
    if not _varies(section).any():
        return set()
    _mark_variable(section)
    return set(section.var_names[section.var["highly_variable"]])


def _mark_variable(section: AnnData, batch_key: str | None = None) -> None:
    """Write scanpy's columns of the most variable genes into ``var``."""
    import scanpy as sc

    with warnings.catch_warnings():  # of few genes all are taken, as is meant
        warnings.filterwarnings("ignore", "`n_top_genes`")
        sc.pp.highly_variable_genes(section, n_top_genes=min(_N_HVG, section.n_vars), batch_key=batch_key)


def _varies(section: AnnData) -> np.ndarray:
    """Of each gene, whether its values differ between spots."""
    x = sparse.csr_matrix(section.X)
    return np.asarray(x.power(2).mean(axis=0)).ravel() - np.asarray(x.mean(axis=0)).ravel() ** 2 > 1e-12


def _ranks(values: np.ndarray) -> np.ndarray:
    """0 for the largest; ties keep the order of the names."""
    ranks = np.empty(len(values), dtype=int)
    ranks[np.argsort(-values, kind="stable")] = np.arange(len(values))
    return ranks


def _best(
    sections: Iterable[AnnData], genes: list[str], n_genes: int | None, recipe: str, n_sections: int
) -> tuple[str, ...]:
    """The ``n_genes`` of the highest score, by alphabet; all where ``None``."""
    n_genes = len(genes) if n_genes is None else n_genes
    score = _SCORES[recipe](sections, genes)
    defined = np.isfinite(score).sum()
    if not defined:
        raise InputError(f"panel: recipe {recipe} can rank no gene of these sections; do they hold counts?")
    if n_genes > defined:
        raise InputError(
            f"panel: {n_genes} genes asked for, recipe {recipe} can rank {defined} of those common to the "
            f"{n_sections} sections; ask for --n-genes {defined} or fewer"
        )
    first = np.argsort(-np.where(np.isfinite(score), score, -np.inf), kind="stable")[:n_genes]
    return tuple(sorted(genes[i] for i in first))


def _mean_counts(sections: Iterable[AnnData], genes: list[str]) -> np.ndarray:
    moments = _Moments(len(genes))
    for section in sections:
        moments.add(section)
    return np.where(moments.mean > 0, moments.mean, np.nan)


def _variability(sections: Iterable[AnnData], genes: list[str]) -> np.ndarray:
    """Falling with scanpy's rank: by the number of sections in which a gene is variable, then by its dispersion."""
    import anndata

    parts = [_normalised(section) for section in sections]
    parts = [part for part in parts if part.n_obs > 1 and part.X.nnz and _varies(part).any()]  # pyright: ignore
    if not parts:
        return np.full(len(genes), np.nan)
    named = {str(i): part for i, part in enumerate(parts)}
    joined = anndata.concat(named, label="section", index_unique="-", join="outer", fill_value=0)
    _mark_variable(joined, batch_key="section" if len(parts) > 1 else None)
    table = pd.DataFrame(joined.var).assign(gene=joined.var_names)
    if "highly_variable_nbatches" not in table:
        table["highly_variable_nbatches"] = 1
    table["dispersions_norm"] = table["dispersions_norm"].fillna(0)  # as scanpy's own cut takes it
    table = table.sort_values(["highly_variable_nbatches", "dispersions_norm", "gene"], ascending=[False, False, True])
    score = {gene: -place for place, gene in enumerate(table["gene"].tolist())}
    return np.array([score.get(gene, np.nan) for gene in genes], dtype=np.float64)


def _autocorrelation(sections: Iterable[AnnData], genes: list[str]) -> np.ndarray:
    """Moran's I, the mean over the sections in which the gene varies; NaN where it varies in none."""
    import scanpy as sc

    total, seen = np.zeros(len(genes)), np.zeros(len(genes))
    for section in map(_normalised, sections):
        if section.n_obs < 2:
            continue
        near = nearest_spots(contract.coords_px(section), _N_NEIGHBOURS)
        rows = np.repeat(np.arange(len(near)), near.shape[1])
        graph = sparse.csr_matrix((np.ones(near.size), (rows, near.ravel())), shape=(len(near), len(near)))
        values, varies = section.X.T.tocsr(), _varies(section)  # pyright: ignore
        place = pd.Index(genes).get_indexer(section.var_names[varies])
        total[place] += sc.metrics.morans_i(graph, values[varies])
        seen[place] += 1
    return np.divide(total, seen, out=np.full(len(genes), np.nan), where=seen > 0)


_SCORES: dict[str, Callable[[Iterable[AnnData], list[str]], np.ndarray]] = {
    "hvg": _variability,
    "highest_mean": _mean_counts,
    "moran": _autocorrelation,
}
RECIPES = (*_BY_BOTH_RANKS, *_SCORES)


def leak_note(panel: Panel, where: str | Path, held_out: Iterable[str]) -> str:
    """What a reader must know where the panel at ``where`` was selected with sections that are ``held_out``; else
    nothing."""
    if panel.recipe not in RECIPES or not (seen := panel.seen(held_out)):
        return ""
    return (
        f"panel {where} was selected with {', '.join(seen)} among its sections, held out here: the choice of the genes "
        "knows the answers"
    )
