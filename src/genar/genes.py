"""The gene panel and the hierarchy of scales over it. numpy only; nothing here knows of tensors or images.

Selection follows the recipes of the paper's released lists; clustering section 3, "Gene Clustering".
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from anndata import AnnData

from genar.data import contract
from genar.data.files import write_text
from genar.errors import InputError

# Mitochondrial and ribosomal genes; case-sensitive, so that mouse Rps genes stay, as in the paper's lists.
DROPPED_PREFIXES = ("MT", "mt", "RPS", "RPL")
PAPER_N_TOP = 241  # gives the 208 genes of the paper's HER2ST list
_N_HVG = 2000
RECIPES = ("paper", "clean")
ORDERS = ("kmeans", "random")


@dataclass(frozen=True)
class Panel:
    """The genes that are modelled, in order, and where they came from."""

    genes: tuple[str, ...]
    recipe: str
    sections: tuple[str, ...] = ()
    """Sections the selection has seen."""
    n_top: int = 0
    """Rank cut by mean and by standard deviation; 0 for a given list."""

    def __post_init__(self):
        if not self.genes:
            raise InputError("a panel needs at least one gene, found none")
        if len(set(self.genes)) != len(self.genes):
            twice = next(gene for gene in self.genes if self.genes.count(gene) > 1)
            raise InputError(f"the panel names {twice!r} more than once; a gene may stand in it once")

    @property
    def sha256(self) -> str:
        """Hash of the ordered gene names."""
        return hashlib.sha256("\n".join(self.genes).encode()).hexdigest()

    def to_dict(self) -> dict:
        """The panel as it is written to ``panel.json``."""
        return {
            "genes": list(self.genes),
            "recipe": self.recipe,
            "sections": list(self.sections),
            "n_top": self.n_top,
            "sha256": self.sha256,
        }

    @classmethod
    def from_dict(cls, facts: dict) -> "Panel":
        """Inverse of :meth:`to_dict`; ``InputError`` where genes are missing or do not match the hash."""
        try:
            genes = facts["genes"]
            if isinstance(genes, str) or not all(isinstance(gene, str) for gene in genes):
                raise TypeError("genes must be a list of names")
            panel = cls(tuple(genes), facts["recipe"], tuple(facts.get("sections", ())), facts.get("n_top", 0))
        except (KeyError, TypeError) as error:
            raise InputError(f"not a panel: expected the keys genes and recipe ({error!r})") from error
        if facts.get("sha256", panel.sha256) != panel.sha256:
            raise InputError(
                "the panel's genes do not match its sha256; it was altered by hand: remove the hash to keep it"
            )
        return panel

    def write(self, path: Path) -> None:
        """Write ``panel.json``."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")


def read_panel(path: str | Path) -> Panel:
    """A panel from ``panel.json`` or from a text file with one gene a line (# begins a comment).

    Raises ``InputError`` naming the file where it is missing, empty or not a panel.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable panel ({error}); expected panel.json or one gene a line") from error
    try:
        if path.suffix == ".json":
            facts = json.loads(text)
            return Panel.from_dict(facts if isinstance(facts, dict) else {"genes": facts, "recipe": path.stem})
        genes = (line.split("#")[0].strip() for line in text.splitlines())
        return Panel(tuple(gene for gene in genes if gene), recipe=path.name)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def select_panel(
    sections: Sequence[AnnData], *, n_genes: int | None = 200, recipe: str = "clean", n_top: int = PAPER_N_TOP
) -> Panel:
    """Select a panel from ``sections``: give it the training sections only, unless the recipe is meant to see all.

    Both recipes take the highly variable genes of each section (scanpy's default flavour, 2000 a section), drop
    mitochondrial and ribosomal names, and rank the union by mean and by standard deviation of the raw counts over all
    spots. ``paper`` intersects the top ``n_top`` of both and takes the first ``n_genes`` by alphabet (all where
    ``None``), as the released code does. ``clean`` takes the least rank cut whose intersection holds ``n_genes``, and
    cuts the surplus by the rank of the mean. Genes come in alphabetical order.

    Raises ``InputError`` where the recipe is unknown or fewer genes are left than asked for.
    """
    if recipe not in RECIPES:
        raise InputError(f"panel recipe {recipe!r} is not known; expected one of {', '.join(RECIPES)}, or a file")
    if n_genes is not None and n_genes < 1:
        raise InputError(f"a panel needs at least one gene, {n_genes} asked for")
    names, counts = _candidates(sections)
    by_mean = _ranks(counts.mean(axis=0))
    worst = np.maximum(by_mean, _ranks(counts.std(axis=0, ddof=1)))  # in both tops of n where below n
    n_available = len(names)
    if n_genes is not None and n_genes > n_available:
        raise InputError(
            f"panel: {n_genes} genes asked for, only {n_available} are variable and common to the {len(sections)} "
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
    genes = tuple(names[i] for i in chosen)
    return Panel(genes, recipe, tuple(contract.name(section) for section in sections), n_top)


def _candidates(sections: Sequence[AnnData]) -> tuple[list[str], np.ndarray]:
    """Sorted names of the variable genes that every section measures, and their counts [spots of all sections, n]."""
    if not sections:
        raise InputError("panel: no section to select from; name at least one training section")
    common = sorted(set.intersection(*(set(section.var_names) for section in sections)))
    if not common:
        raise InputError("panel: the sections have no gene in common; do their gene names use the same kind of id?")
    variable = set().union(*(_highly_variable(section[:, common].copy()) for section in sections))
    names = sorted(gene for gene in variable if not gene.startswith(DROPPED_PREFIXES))
    if not names:
        raise InputError("panel: no variable gene is left after mitochondrial and ribosomal genes are dropped")
    return names, np.concatenate([contract.counts(section, names) for section in sections]).astype(np.float64)


def _highly_variable(section: AnnData) -> set[str]:
    import scanpy as sc

    totals, used = (np.asarray(section.X.sum(axis=axis)).ravel() for axis in (1, 0))  # pyright: ignore
    section = section[totals > 0, used > 0].copy()
    if section.n_obs < 2:
        return set(section.var_names)
    sc.pp.normalize_total(section)  # to the median total
    sc.pp.log1p(section)
    sc.pp.highly_variable_genes(section, n_top_genes=min(_N_HVG, section.n_vars))
    return set(section.var_names[section.var["highly_variable"]])


def _ranks(values: np.ndarray) -> np.ndarray:
    """0 for the largest; ties keep the order of the names."""
    ranks = np.empty(len(values), dtype=int)
    ranks[np.argsort(-values, kind="stable")] = np.arange(len(values))
    return ranks


def default_sizes(n_genes: int) -> tuple[int, ...]:
    """Groups at each scale, coarse to fine; the paper's for 200 genes, in the same proportions for others.

    >>> default_sizes(200)
    (1, 4, 8, 40, 100, 200)
    >>> default_sizes(50)
    (1, 2, 4, 10, 25, 50)
    """
    wanted = {1, 4, n_genes // 25, n_genes // 5, n_genes // 2, n_genes}
    return tuple(sorted(size for size in wanted if 1 <= size <= n_genes))


@dataclass(frozen=True)
class Scales:
    """The hierarchy: genes in cluster order, pooled into ever finer groups of consecutive genes.

    ``order[i]`` is the panel index of the gene at place i; ``sizes[k]`` the number of groups of scale k (the last:
    G). Group t of a scale of M groups holds places floor(t G / M) to floor((t + 1) G / M): every gene is in one
    group, and for sizes that divide G these are the blocks of adaptive average pooling.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    clusters: tuple[int, ...] = field(default=())
    """Cluster of the gene at each place, as k-means found them; empty for an order that was given."""

    def __post_init__(self):
        if sorted(self.order) != list(range(self.n_genes)):
            raise InputError("scales: the order must name every gene of the panel once")
        if list(self.sizes) != sorted(set(self.sizes)) or not self.sizes or self.sizes[0] < 1:
            raise InputError(f"scales: sizes must grow from coarse to fine, found {self.sizes}")
        if self.sizes[-1] != self.n_genes:
            raise InputError(f"scales: the last must hold the {self.n_genes} genes themselves, found {self.sizes[-1]}")

    @property
    def n_genes(self) -> int:
        """G."""
        return len(self.order)

    @property
    def n_scales(self) -> int:
        """K."""
        return len(self.sizes)

    @cached_property
    def inverse(self) -> np.ndarray:
        """int [G]: the place of each gene of the panel."""
        return np.argsort(self.order)

    def edges(self, k: int) -> np.ndarray:
        """int [M_k + 1]: group t of scale k holds places edges[t] to edges[t + 1]."""
        return np.arange(self.sizes[k] + 1) * self.n_genes // self.sizes[k]

    def parent(self, k: int) -> np.ndarray:
        """int [M_k]: the group of scale k - 1 that each group of scale k continues: floor(t M_{k-1} / M_k)."""
        if k == 0:
            raise InputError("scale 0 has no coarser scale")
        return np.arange(self.sizes[k]) * self.sizes[k - 1] // self.sizes[k]

    def pool(self, counts: np.ndarray, k: int) -> np.ndarray:
        """Mean count of each group: counts [B, G] in panel order -> float64 [B, M_k]."""
        edges = self.edges(k)
        ordered = np.asarray(counts, dtype=np.float64)[:, list(self.order)]
        return np.add.reduceat(ordered, edges[:-1], axis=1) / np.diff(edges)

    def to_dict(self) -> dict:
        """The scales as written to a checkpoint."""
        return {"order": list(self.order), "sizes": list(self.sizes), "clusters": list(self.clusters)}

    @classmethod
    def from_dict(cls, facts: dict) -> "Scales":
        """Inverse of :meth:`to_dict`."""
        return cls(tuple(facts["order"]), tuple(facts["sizes"]), tuple(facts.get("clusters", ())))


def fit_scales(
    counts: np.ndarray, sizes: Sequence[int] | None = None, *, order: str | Sequence[int] = "kmeans", seed: int = 42
) -> Scales:
    """The hierarchy over the genes of the training counts [N, G]; ``sizes`` as in ``Scales``, ``default_sizes`` if
    ``None``.

    ``order`` is ``kmeans`` (:func:`cluster_order`), ``random``, or the panel's indices in their order.
    """
    n_genes = counts.shape[1]
    sizes = default_sizes(n_genes) if sizes is None else tuple(sizes)
    if order == "kmeans":
        found, clusters = cluster_order(counts, seed=seed)
        return Scales(tuple(found.tolist()), sizes, tuple(clusters.tolist()))
    if order == "random":
        return Scales(tuple(np.random.default_rng(seed).permutation(n_genes).tolist()), sizes)
    return Scales(tuple(int(i) for i in order), sizes)


def cluster_order(counts: np.ndarray, *, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """Panel indices [G] and clusters [G] by k-means on the z-scored counts [N, G] (section 3, "Gene Clustering").

    Four clusters (k-means++ with 10 starts); one of more than 10 genes is divided again into max(2, size // 12), as the
    released code does. Genes come in the order of cluster, then subcluster, then panel.
    """
    counts = np.asarray(counts, dtype=np.float64)
    deviation = counts.std(axis=0)
    z = ((counts - counts.mean(axis=0)) / np.where(deviation > 0, deviation, 1)).T  # [G, N]; a constant gene is zeros
    n_genes = len(z)
    coarse = _k_means(z, 4, seed)
    fine = np.zeros(n_genes, dtype=int)
    for cluster in range(coarse.max() + 1):
        members = np.flatnonzero(coarse == cluster)
        if len(members) > 10:
            fine[members] = _k_means(z[members], max(2, len(members) // 12), seed)
    order = np.lexsort((np.arange(n_genes), fine, coarse))
    _, clusters = np.unique(np.stack([coarse, fine])[:, order], axis=1, return_inverse=True)
    return order, clusters.ravel()


def read_gene_sets(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Gene sets of a GMT file: a line each, name, description and genes between tabs.

    Raises ``InputError`` naming the line where one is not of that form.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable GMT file ({error})") from error
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


def order_by_sets(genes: Sequence[str], sets: dict[str, tuple[str, ...]]) -> tuple[int, ...]:
    """Panel indices in the order of the sets; a gene of several stands in the first, genes of none come last.

    Raises ``InputError`` where no gene of the panel is in any set.
    """
    place = {gene: i for i, gene in enumerate(genes)}
    named = [place[gene] for members in sets.values() for gene in members if gene in place]
    if not named:
        raise InputError(f"none of the panel's {len(genes)} genes is in the {len(sets)} gene sets; same kind of name?")
    return tuple(dict.fromkeys([*named, *range(len(genes))]))


def _k_means(z: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    n_clusters = min(n_clusters, len(np.unique(z, axis=0)))
    return KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(z)  # pyright: ignore[reportArgumentType]
