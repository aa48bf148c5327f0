"""What the methods that see a whole section at once share: standardised features or pixels in, log2(1 + count) out."""

import abc

import torch
from torch import Tensor
from torch.nn import functional as fn

from genar.errors import InputError
from genar.models._base import Batch, Counts, LossOutput, Spots, log2p1, turned_each
from genar.models._decoding import DEFAULT, Decoding
from genar.models._rival import Rival


def randomly_turned(x: Tensor) -> Tensor:
    """Each of x [N, ..., px, px] in one of its eight positions, drawn at random."""
    return turned_each(x, torch.randint(8, (len(x),), device=x.device))


class SectionRival(Rival):
    """A method whose spots see each other: ``forward`` takes all spots of one section.

    Features come in standardised and outputs go out as differences from the genes' means, both of the training spots.
    """

    unit = "section"

    gene_mean: Tensor

    def __init__(self, n_features: int, n_genes: int, config, **sizes: int):
        super().__init__(n_features, n_genes, config, **sizes)
        self.register_buffer("gene_mean", torch.zeros(n_genes))

    def prepare(self, spots: Spots) -> None:
        """Set the training spots' means and scales. Raises ``InputError`` where patches are asked for and missing."""
        assert spots.counts is not None
        if self.takes_patches and spots.patches is None:
            raise InputError(f"model {self._name()}: input=patches needs patches, and the sections came without")
        super().prepare(spots)
        self.gene_mean.copy_(log2p1(spots.counts).mean(dim=0))

    def section_steps(self, n_spots: int) -> int:
        """So many that about each spot is looked at once, where a step draws some (``spots_per_step``)."""
        return max(1, round(n_spots / getattr(self.settings, "spots_per_step", n_spots)))

    @property
    def takes_patches(self) -> bool:
        """Whether it was set up for pixels."""
        return getattr(self.settings, "input", "features") == "patches"

    def pixels(self, batch: Batch, rows: Tensor | slice = slice(None)) -> Tensor:
        """Patches float32 [n, crops, 3, px, px] in -1..1, of the size that the method takes, others resized. In
        training they come turned and mirrored already. Raises ``InputError`` where crops are missing."""
        n_crops, px = len(self.crops), self.crop_px
        if batch.patches is None or batch.patches.shape[1] < n_crops:
            found = "none" if batch.patches is None else str(batch.patches.shape[1])
            raise InputError(f"model {self._name()}: expected {n_crops} patches a spot, found {found}")
        x = batch.patches[rows, :n_crops].float() / 127.5 - 1
        if x.shape[-1] == px:
            return x
        sized = fn.interpolate(x.flatten(0, 1), (px, px), mode="bilinear", antialias=True)
        return sized.unflatten(0, x.shape[:2])

    @abc.abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """log2(1 + count) [N, G] of the spots of one section, unbounded."""

    def loss(self, batch: Batch) -> LossOutput:
        """Mean squared error in log2(1 + count)."""
        assert batch.counts is not None
        total = fn.mse_loss(self(batch), log2p1(batch.counts))
        return LossOutput(total, total.detach()[None])

    def predict(self, batch: Batch, how: Decoding = DEFAULT) -> Counts:
        """One pass over the section; below zero is raised to zero here and nowhere before."""
        return Counts.from_log2(self(batch))
