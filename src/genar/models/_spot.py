"""What the methods that see one spot at a time share: standardised features, and blocks of one shape."""

import abc

import torch
from torch import Tensor

from genar.models._base import Batch, Counts, Spots
from genar.models._blocks import BLOCK, in_blocks
from genar.models._decoding import DEFAULT, Decoding
from genar.models._rival import Rival
from genar.models.ridge import mean_and_scale


class SpotRival(Rival):
    """A method whose spots know nothing of each other. Features come in with mean 0 and standard deviation 1 over the
    training spots."""

    block: int = BLOCK
    """spots that go through at a time in a prediction"""
    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, n_features: int, n_genes: int, config, **sizes: int):
        super().__init__(n_features, n_genes, config, **sizes)
        self.register_buffer("feature_mean", torch.zeros(n_features))
        self.register_buffer("feature_scale", torch.ones(n_features))

    @torch.no_grad()
    def prepare(self, spots: Spots) -> None:
        """Set the features' mean and scale."""
        for buffer, value in zip(
            (self.feature_mean, self.feature_scale), mean_and_scale(spots.features.mean(dim=1)), strict=True
        ):
            buffer.copy_(value)

    def standardised(self, features: Tensor) -> Tensor:
        """Features [B, F] with the training spots' mean 0 and standard deviation 1."""
        return (features - self.feature_mean) / self.feature_scale

    @torch.no_grad()
    def predict(self, batch: Batch, how: Decoding = DEFAULT) -> Counts:
        """See :meth:`predict_block`; spots go through in blocks of one shape."""
        return in_blocks(lambda part: self.predict_block(part, how), batch, self.block)

    @abc.abstractmethod
    def predict_block(self, batch: Batch, how: Decoding) -> Counts:
        """Counts of a block of spots."""
