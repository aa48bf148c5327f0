"""Looking up training spots: which of them a query may see, and the mean of those that lie nearest.

A spot never sees its own section: sister spots of the same slide look and count alike, and a training spot would find
itself. Where all keys are of the query's section (training on a single one), it is cut into vertical strips and a spot
sees the other strips alone. A query to which nothing is left gets the mean of all keys.
"""

import abc

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from genar.models._base import Batch, Counts, Spots, log2p1
from genar.models._decoding import Decoding
from genar.models._spot import SpotRival
from genar.models._training_spots import strips

# Keys embedded at a time.
_KEYS_AT_ONCE = 1024


class Keys(nn.Module):
    """The K training spots that are looked up, with their sections."""

    log2_counts: Tensor
    """float32 [K, G]"""
    features: Tensor
    """float32 [K, F], the mean of each spot's views; F = 0 where they are not asked for"""
    section: Tensor
    """int64 [K]"""
    strip: Tensor
    """int64 [K]: the strip of a single section"""
    x_um: Tensor
    """float32 [K]"""

    def __init__(self, n_keys: int, n_genes: int, n_features: int = 0):
        super().__init__()
        self.register_buffer("log2_counts", torch.zeros(n_keys, n_genes))
        self.register_buffer("features", torch.zeros(n_keys, n_features))
        self.register_buffer("section", torch.zeros(n_keys, dtype=torch.long))
        self.register_buffer("strip", torch.zeros(n_keys, dtype=torch.long))
        self.register_buffer("x_um", torch.zeros(n_keys))

    def __len__(self) -> int:
        return len(self.section)

    def hold(self, spots: Spots) -> None:
        """Take these spots as keys."""
        assert spots.counts is not None
        device = self.section.device
        if self.features.shape[1]:
            self.features = spots.features.mean(dim=1).to(device)
        else:
            self.features = torch.zeros(len(spots), 0, device=device)
        self.log2_counts = log2p1(spots.counts).to(device)
        self.section, self.x_um = spots.section.to(device), spots.coords_um[:, 0].contiguous().to(device)
        single = len(spots.section.unique()) == 1
        self.strip = (strips(spots.coords_um) if single else torch.zeros(len(spots), dtype=torch.long)).to(device)

    def visible(self, batch: Batch) -> Tensor:
        """bool [B, K]: which keys each spot of a batch may see; a batch without sections sees all."""
        if batch.section is None:
            return self.section.new_ones(len(batch.features), len(self), dtype=torch.bool)
        seen = batch.section[:, None] != self.section
        inside = ~seen.any(dim=1)
        if inside.any():
            seen[inside] = self._other_strips(batch.coords_um[inside, 0])
        return seen

    def _other_strips(self, x_um: Tensor) -> Tensor:
        """bool [B, K]: keys outside the strip that holds x [B]; where strips touch, outside both."""
        strips = range(int(self.strip.max()) + 1)
        first = torch.stack([self.x_um[self.strip == s].min() for s in strips])
        last = torch.stack([self.x_um[self.strip == s].max() for s in strips])
        away = (first - x_um[:, None]).clamp(min=0) + (x_um[:, None] - last).clamp(min=0)  # [B, strips]
        own = away == away.min(dim=1, keepdim=True).values
        return ~own[:, self.strip]

    def nearest(self, similarity: Tensor, visible: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Places of the ``k`` most similar visible keys int64 [B, k], and which of them are there bool [B, k].

        ``similarity`` and ``visible`` [B, K]; fewer than k keys give fewer columns.
        """
        top = similarity.masked_fill(~visible, -torch.inf).topk(min(k, len(self)), dim=1)
        return top.indices, top.values > -torch.inf

    def mean(self, places: Tensor, weight: Tensor) -> Tensor:
        """log2(1 + count) [B, G]: mean of the keys at ``places`` [B, k] with ``weight`` [B, k]; of all keys where all
        weights are zero."""
        total = weight.sum(dim=1, keepdim=True)
        nearest = (self.log2_counts[places] * weight[:, :, None]).sum(dim=1) / total.clamp(min=1e-30)
        return torch.where(total > 0, nearest, self.log2_counts.mean(dim=0))


class RetrievalRival(SpotRival):
    """A method with one space for images and expression: it predicts the mean of the training spots whose expression
    lies nearest to the query's image (cosine). Its configuration has a ``neighbours``."""

    compares = True

    def __init__(self, n_features: int, n_genes: int, config, *, n_keys: int = 0):
        super().__init__(n_features, n_genes, config, n_keys=n_keys)
        self.keys = Keys(n_keys, n_genes)
        self._embedded: Tensor | None = None

    @classmethod
    def sizes(cls, spots: Spots, config) -> dict[str, int]:
        """It holds the training spots."""
        return {"n_keys": len(spots)}

    @torch.no_grad()
    def prepare(self, spots: Spots) -> None:
        """Keep the training spots as keys."""
        super().prepare(spots)
        self.keys.hold(spots)
        self.own_sizes["n_keys"] = len(spots)

    @abc.abstractmethod
    def embed_image(self, features: Tensor) -> Tensor:
        """Features [B, F] -> [B, D]."""

    @abc.abstractmethod
    def embed_expression(self, log2_counts: Tensor) -> Tensor:
        """log2(1 + count) [B, G] -> [B, D]."""

    def key_embeddings(self) -> Tensor:
        """[K, D], not normalised; computed once for as long as the weights stay."""
        if self._embedded is None or self._embedded.device != self.keys.section.device:
            parts = self.keys.log2_counts.split(_KEYS_AT_ONCE)
            self._embedded = torch.cat([self.embed_expression(part) for part in parts])
        return self._embedded

    def train(self, mode: bool = True):
        """Weights may change from here on: forget the embedded keys."""
        self._embedded = None
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs):
        self._embedded = None
        super()._load_from_state_dict(*args, **kwargs)

    def retrieve(self, queries: Tensor, visible: Tensor) -> Tensor:
        """log2(1 + count) [B, G] of queries [B, D] that may see the keys ``visible`` [B, K]."""
        keys = self.key_embeddings()
        similarity = fn.normalize(queries, dim=1) @ fn.normalize(keys, dim=1).T
        places, there = self.keys.nearest(similarity, visible, self.settings.neighbours)
        return self.keys.mean(places, self.weights(queries, keys[places], there) * there)

    def weights(self, queries: Tensor, nearest: Tensor, there: Tensor) -> Tensor:
        """Weight [B, k] of each of the nearest keys [B, k, D], as far as they are ``there`` bool [B, k]: all alike."""
        return nearest.new_ones(nearest.shape[:2])

    def predict_block(self, batch: Batch, how: Decoding) -> Counts:
        """The mean of the nearest keys."""
        queries = self.embed_image(self.standardised(batch.features))
        return Counts.from_log2(self.retrieve(queries, self.keys.visible(batch)))
