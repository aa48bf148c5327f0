"""HisToGene: a vision transformer whose tokens are the spots of one section.

What is unusual: a section is one sample. Every spot attends to every other one, so what is predicted for a spot changes
with the spots that are given beside it; where a spot lies enters as learned tables of its column and row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from genar.models._attention import Block
from genar.models._base import Batch, Card, Spots
from genar.models._lattice import Places
from genar.models._rival import check_input
from genar.models._section import SectionRival


@dataclass(frozen=True)
class HisToGeneConfig:
    """Sizes of the network."""

    width: int = 256
    """D of a token"""
    depth: int = 2
    heads: int = 4
    head_width: int = 64
    hidden: int = 512
    """of an MLP"""
    dropout: float = 0.1
    """of tokens, outputs and MLPs; the weights of the attention are not dropped"""
    n_positions: int = 128
    """rows of each table of places; further columns and rows share the last. Published: 64, too few for Visium"""
    input: str = "features"
    """``features``, or ``patches`` of 112 px whose pixels enter a linear layer"""

    def __post_init__(self):
        check_input("histogene", self.input)


class HisToGene(SectionRival):
    """A transformer over all spots of a section, with tables of their columns and rows."""

    config = HisToGeneConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "official": {"width": 1024, "depth": 8, "heads": 16, "hidden": 2048, "n_positions": 64},
    }
    # published: Adam 1e-5, one section a step, 100 epochs of 31 sections, a constant rate. With three sections these
    # would be 300 steps: a smaller network takes a hundredfold rate, which falls
    train_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 80, "lr": 1e-3, "optimizer": "adam", "weight_decay": 0.0, "warmup_steps": 20, "ema_decay": 0.0,
    }  # fmt: skip
    inputs = ("features", "patches")
    crop_px = 112
    card = Card(
        title="HisToGene (Pang et al., bioRxiv 2021)",
        target="Originally log10(1 + counts per 10,000 of the selected genes). Here log2(1 + count), not divided by "
        "the library, as a difference from the training mean.",
        kept="Everything behind the first layer: spots as tokens, tables of columns and rows, pre-norm blocks, mean "
        "squared error, one section a step.",
        lost="The first layer takes features instead of 37,632 raw pixels of a patch of 112 px (input=patches has "
        "them).",
        mended="Pixels are scaled to -1..1 before they enter a linear layer; columns and rows come from the "
        "coordinates and stop at the last that was trained (a square array is numbered in pitches, a hexagonal one in "
        "half: predict on the kind that it learned from); whole patients can be held out, not single sections of "
        "them.",
    )

    def __init__(self, n_features: int, n_genes: int, config: HisToGeneConfig):
        super().__init__(n_features, n_genes, config)
        width = config.width
        self.token = nn.Linear(3 * self.crop_px**2 if self.takes_patches else n_features, width)
        self.places = Places(config.n_positions, width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.hidden, head_width=config.head_width, dropout=config.dropout)
            for _ in range(config.depth)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_genes))

    def prepare(self, spots: Spots) -> None:
        """Constants as all have them; how far the training sections go."""
        super().prepare(spots)
        self.places.prepare(spots)

    def forward(self, batch: Batch) -> Tensor:
        """All spots of a section at once."""
        inputs = self.pixels(batch)[:, 0].flatten(1) if self.takes_patches else self.standardised(batch.features)
        x = self.drop(self.token(inputs) + self.places(batch.coords_um))[None]
        for block in self.blocks:
            x = block(x)
        return self.gene_mean + self.head(x[0])


MODEL = HisToGene
