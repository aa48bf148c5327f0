"""The training mean of each gene, in log2(1 + count): the floor that any method must leave."""

import torch
from torch import Tensor

from genar.models._base import Batch, Card, ClosedForm, Counts, Spots, log2p1
from genar.models._decoding import DEFAULT, Decoding


class Mean(ClosedForm):
    """Predicts for every spot the mean over the training spots, gene by gene."""

    can_stream = True
    card = Card(
        title="Training mean: the floor that any method must leave",
        target="log2(1 + count), as here",
        kept="each gene's mean over the training spots, the same for every spot",
        lost="the image: all spots are predicted alike, so that PCC is undefined",
    )
    gene_mean: Tensor

    def __init__(self, n_features: int, n_genes: int):
        super().__init__(n_features, n_genes)
        self.register_buffer("gene_mean", torch.zeros(n_genes))

    def prepare(self, spots: Spots) -> None:
        """Take the mean of the training spots."""
        assert spots.counts is not None
        if spots.sample_of is None:
            self.gene_mean.copy_(log2p1(spots.counts).mean(dim=0))
        else:
            sums = [(log2p1(counts).double().sum(dim=0), len(counts)) for counts in spots.counts_by_part()]
            self.gene_mean.copy_(torch.stack([total for total, _ in sums]).sum(dim=0) / sum(n for _, n in sums))

    def predict(self, batch: Batch, how: Decoding = DEFAULT) -> Counts:
        """The same counts for every spot."""
        return Counts.from_log2(self.gene_mean.expand(len(batch.features), -1))


MODEL = Mean
