"""The hierarchy over a panel: genes clustered into ever finer groups (section 3, "Gene Clustering")."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from genar.data.contract import dense
from genar.errors import InputError

ORDERS = ("kmeans", "random")


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

    Raises ``InputError`` where the order does not name every gene once, or the sizes do not grow up to G.
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

    ``counts`` may be sparse. ``order`` is ``kmeans`` (:func:`cluster_order`), ``random``, or the panel's indices in
    their order. Raises ``InputError`` where ``counts`` are empty or no counts, or ``sizes`` or ``order`` do not fit the
    genes.

    >>> section = genar.read_section("tissue:SIM1")
    >>> scales = genar.fit_scales(section.X[:, :20], (1, 4, 20))
    >>> scales.n_scales, scales.n_genes
    (3, 20)
    """
    counts = dense(counts)
    if counts.ndim != 2 or not counts.size:
        raise InputError(f"scales: expected training counts [N, G], found shape {list(counts.shape)}")
    if not np.isfinite(counts).all() or (counts < 0).any() or (counts != np.rint(counts)).any():
        raise InputError(
            "scales: expected raw counts, whole numbers >= 0; found others: take them before normalisation"
        )
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


def _k_means(z: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    n_clusters = min(n_clusters, len(np.unique(z, axis=0)))
    return KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(z)  # pyright: ignore[reportArgumentType]
