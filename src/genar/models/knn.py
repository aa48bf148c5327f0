"""The average of the 50 training spots whose features are nearest: what a model learns beyond looking up."""

import torch
from torch import Tensor

from genar.models._base import Batch, Card, ClosedForm, Counts, Spots, log2p1
from genar.models._blocks import in_blocks
from genar.models._decoding import DEFAULT, Decoding
from genar.models._training_spots import mean_and_scale

N_NEAREST = 50


class KNN(ClosedForm):
    """Predicts the mean log2(1 + count) of the 50 nearest training spots (Euclid, standardised features)."""

    card = Card(
        title="The 50 nearest training spots: what a model learns beyond looking up",
        target="log2(1 + count), as here",
        kept="standardised features (the mean of the views), Euclidean distance, a plain mean; the checkpoint holds "
        "all training spots",
        lost="what could be learned: no feature weighs more than another",
    )
    features: Tensor
    log2_counts: Tensor
    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, n_features: int, n_genes: int, n_spots: int = 0):
        super().__init__(n_features, n_genes)
        self.n_spots = n_spots
        for name, shape in (
            ("features", (n_spots, n_features)),
            ("log2_counts", (n_spots, n_genes)),
            ("feature_mean", (n_features,)),
            ("feature_scale", (n_features,)),
        ):
            self.register_buffer(name, torch.zeros(shape))

    @classmethod
    def create(cls, n_features: int, spots: Spots, preset: str, settings) -> "KNN":
        """Sized for these spots, which it will hold."""
        assert spots.counts is not None
        return cls(n_features, spots.counts.shape[1], len(spots))

    def prepare(self, spots: Spots) -> None:
        """Keep the training spots, each with the mean of its views."""
        assert spots.counts is not None
        x = spots.features.mean(dim=1)
        for buffer, value in zip((self.feature_mean, self.feature_scale), mean_and_scale(x), strict=True):
            buffer.copy_(value)
        self.features.copy_((x - self.feature_mean) / self.feature_scale)
        self.log2_counts.copy_(log2p1(spots.counts))

    def predict(self, batch: Batch, how: Decoding = DEFAULT) -> Counts:
        """The mean of the nearest."""
        return in_blocks(self._predict_block, batch)

    def _predict_block(self, batch: Batch) -> Counts:
        """Of a short list by matrix products, which round, the nearest by differences, which hardly do."""
        x = (batch.features - self.feature_mean) / self.feature_scale
        rough = self.features.square().sum(dim=1) - 2 * x @ self.features.T  # but for a constant of the spot
        short = rough.topk(min(4 * N_NEAREST, self.n_spots), dim=1, largest=False).indices
        pairs = zip(short, x, strict=True)
        distances = torch.stack([(self.features[places] - spot).square().sum(dim=1) for places, spot in pairs])
        nearest = distances.topk(min(N_NEAREST, self.n_spots), dim=1, largest=False).indices
        return Counts.from_log2(self.log2_counts[short.gather(1, nearest)].mean(dim=1))

    def facts(self) -> dict:
        """Its three sizes."""
        return {**super().facts(), "n_spots": self.n_spots}

    @classmethod
    def from_facts(cls, facts: dict) -> "KNN":
        """Inverse of :meth:`facts`."""
        return cls(facts["n_features"], facts["n_genes"], facts["n_spots"])


MODEL = KNN
