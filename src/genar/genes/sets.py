"""Gene sets: read from a GMT file, as an order of the panel, and as what the groups of a hierarchy are enriched in."""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from genar.data.door import door
from genar.errors import InputError
from genar.genes.scales import ORDERS, Scales


def read_gene_sets(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Gene sets of a GMT file: a line each, name, description and genes between tabs.

    Raises ``InputError`` naming the line where one is not of that form.
    """
    path = Path(path)
    with door(path, "GMT file", "expected name, description and genes between tabs"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    sets: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *rest = line.split("\t")
        genes = tuple(gene.strip() for gene in rest[1:] if gene.strip())
        if not genes:
            raise InputError(f"{path}, line {number}: expected name, description and genes between tabs")
        if name in sets:
            raise InputError(f"{path}, line {number}: gene set {name!r} stands twice; each name may stand once")
        sets[name] = genes
    if not sets:
        raise InputError(f"{path}: holds no gene set")
    return sets


def gene_sets_of(settings: Mapping) -> tuple[dict, dict[str, tuple[str, ...]] | None]:
    """A model's settings without an ``order`` that names a GMT file, and the gene sets of that file; or all of them,
    and ``None``. Raises ``InputError`` as :func:`read_gene_sets` does."""
    order = settings.get("order")
    if not isinstance(order, str) or order in ORDERS:
        return dict(settings), None
    return {name: value for name, value in settings.items() if name != "order"}, read_gene_sets(order)


def order_by_sets(genes: Sequence[str], sets: dict[str, tuple[str, ...]]) -> tuple[int, ...]:
    """Panel indices in the order of the sets; a gene of several stands in the first, genes of none come last.

    Raises ``InputError`` where no gene of the panel is in any set.
    """
    place = {gene: i for i, gene in enumerate(genes)}
    named = [place[gene] for members in sets.values() for gene in members if gene in place]
    if not named:
        raise InputError(f"none of the panel's {len(genes)} genes is in the {len(sets)} gene sets; same kind of name?")
    return tuple(dict.fromkeys([*named, *range(len(genes))]))


def group_names(scales: Scales, genes: Sequence[str], scale: int | None = None) -> list[tuple[str, ...]]:
    """The genes of each group, as the paper's appendix C prints them: of one scale (0 the coarsest), or the clusters
    that the order was made of.

    Raises ``InputError`` where there is no such scale, or the order was not found by clustering.
    """
    ordered = [genes[i] for i in scales.order]
    if scale is None:
        if not scales.clusters:
            raise InputError("the order of the genes was given, not found by clusters; name a scale")
        cluster = np.asarray(scales.clusters)
        return [tuple(ordered[i] for i in np.flatnonzero(cluster == c)) for c in dict.fromkeys(scales.clusters)]
    if not 0 <= scale < scales.n_scales:
        raise InputError(f"scale {scale} is not there; expected 0 to {scales.n_scales - 1} for sizes {scales.sizes}")
    edges = scales.edges(scale)
    return [tuple(ordered[a:b]) for a, b in pairwise(edges)]


def over_representation(
    groups: Sequence[Sequence[str]], sets: Mapping[str, Sequence[str]], background: Sequence[str]
) -> pd.DataFrame:
    """A row for each pair of a group and a gene set that share a gene, the least p first.

    p is the hypergeometric probability of at least so many genes of the set in a group of that size, drawn from
    ``background`` (the panel: genes that were never candidates would make any group look special); q is p after
    Benjamini and Hochberg over all pairs of a group and a set that has a gene in the background, those without overlap
    included. Columns: group (int), set, n_group, n_set, n_shared, expected (of n_shared), p, q, genes (shared, by
    name). Raises ``InputError`` where no set has a gene of the background.
    """
    from scipy.stats import false_discovery_control, hypergeom

    known = set(background)
    inside = {name: known & set(members) for name, members in sets.items()}
    inside = {name: members for name, members in inside.items() if members}
    if not inside:
        raise InputError(f"none of the {len(known)} genes is in the {len(sets)} gene sets; same kind of name?")
    n_group, n_set = np.array([len(group) for group in groups]), np.array([len(members) for members in inside.values()])
    place = {gene: i for i, gene in enumerate(known)}
    n_shared = (_membership(groups, place) @ _membership(list(inside.values()), place).T).toarray()  # [groups, sets]
    p = hypergeom.sf(n_shared - 1, len(known), n_set, n_group[:, None])
    q = false_discovery_control(p.ravel()).reshape(p.shape)
    rows, names = [], list(inside)
    for g, s in zip(*np.nonzero(n_shared), strict=True):
        shared = sorted(inside[names[s]] & set(groups[g]))
        expected = n_set[s] * n_group[g] / len(known)
        rows.append((g, names[s], n_group[g], n_set[s], len(shared), expected, p[g, s], q[g, s], ", ".join(shared)))
    columns = ["group", "set", "n_group", "n_set", "n_shared", "expected", "p", "q", "genes"]
    found = pd.DataFrame.from_records(rows, columns=columns)
    return found.sort_values(by=["p", "group", "set"], kind="stable").reset_index(drop=True)


def _membership(lists: Sequence[Collection[str]], place: Mapping[str, int]) -> sparse.csr_matrix:
    """int32 [lists, genes]: 1 where a list has the gene."""
    pairs = [(i, place[gene]) for i, genes in enumerate(lists) for gene in set(genes) if gene in place]
    rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return sparse.csr_matrix((np.ones(len(rows), np.int32), (rows, columns)), shape=(len(lists), len(place)))
