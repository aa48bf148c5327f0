"""Hist2ST: a transformer over the spots, a graph of their neighbours, and an LSTM that reads the graph's layers.

What is unusual: the LSTM's sequence is not time but depth, the four outputs of the graph layers, averaged at the end.
Beside the squared error the trunk learns from the counts' likelihood (zero-inflated negative binomial), whose heads no
prediction uses, and from itself: what it says of five altered copies of the section, weighted by a score of its own,
must agree with what it says of the section.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from genar.errors import InputError
from genar.models._attention import Block
from genar.models._base import Batch, Card, LossOutput, Spots, log2p1
from genar.models._lattice import Lattice, Places
from genar.models._rival import check_input
from genar.models._section import SectionRival, randomly_turned

_GRAY_SHARE = 0.1
"""of the altered copies' patches that lose their colour"""
_EPS = 1e-10


@dataclass(frozen=True)
class Hist2STConfig:
    """Sizes of the network and weights of its losses."""

    width: int = 128
    """D of a spot; from patches of 112 px it is 32 channels, which give 1024 (official)"""
    depth: int = 2
    """blocks of the transformer"""
    heads: int = 4
    head_width: int = 32
    hidden: int = 128
    """of an MLP"""
    dropout: float = 0.2
    graph_layers: int = 4
    neighbours: int = 0
    """of a spot in the graph; 0 takes 4 on a square array and 6 on a hexagonal one"""
    radius: float = 0.0
    """pitches beyond which there is no edge; 0 takes 2 on a square array and 1.3 on a hexagonal one (published: 2 in
    steps of its files, which there mixes true neighbours with others)"""
    n_positions: int = 128
    """rows of each table of places. Published: 64"""
    copies: int = 2
    """altered copies of the section for the self-distillation. Published: 5, each as dear as the section"""
    zinb_weight: float = 0.25
    distil_weight: float = 0.5
    input: str = "features"
    """``features``, or ``patches`` of 112 px through convolutions of their own"""

    def __post_init__(self):
        check_input("hist2st", self.input)
        if self.radius and self.radius < 1:
            raise InputError(f"model hist2st: radius must be 0 or at least 1 pitch, found {self.radius}")


class Mixer(nn.Module):
    """Two depthwise convolutions with a residual, then one over channels without."""

    def __init__(self, channels: int):
        super().__init__()
        self.spatial = nn.Sequential(*(layer for _ in range(2) for layer in _depthwise(channels)))
        self.channels = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU(), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w], all spots of a section: the norms run over them."""
        return self.channels(x + self.spatial(x))


def _depthwise(channels: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, channels, 5, padding=2, groups=channels), nn.BatchNorm2d(channels), nn.GELU()


class Pixels(nn.Module):
    """A patch of 112 px to a vector of 16 x 16 x 4 = 1024."""

    width = 1024

    def __init__(self, channels: int = 32, depth: int = 2):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 7, stride=7)
        self.mixers = nn.Sequential(*(Mixer(channels) for _ in range(depth)))
        self.narrow = nn.Conv2d(channels, channels // 8, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """[N, 3, 112, 112] -> [N, 1024]."""
        return self.narrow(self.mixers(self.stem(patches))).flatten(1)


class GraphLayer(nn.Module):
    """The mean of the neighbours through a linear layer, on the unit sphere; a spot without neighbours is its own."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, index: Tensor, found: Tensor) -> Tensor:
        """x [N, D], neighbours ``index`` int64 [N, k] where ``found`` [N, k] -> [N, D]."""
        weight = found.float()
        weight[:, 0] += ~found.any(dim=1)  # the spot itself stands there
        weight = weight / weight.sum(dim=1, keepdim=True)
        near = torch.einsum("nk,nkd->nd", weight, x[index])
        return fn.normalize(self.linear(near).relu(), dim=1)


class Trunk(nn.Module):
    """Spots of a section to h [N, D]: transformer, graph, LSTM over the graph's layers."""

    def __init__(self, config: Hist2STConfig, width: int):
        super().__init__()
        self.places, self.drop = Places(config.n_positions, width), nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.hidden, head_width=config.head_width, dropout=config.dropout)
            for _ in range(config.depth)
        )
        self.graph = nn.ModuleList(GraphLayer(width) for _ in range(config.graph_layers))
        self.read = nn.LSTM(width, width, 2)

    def forward(self, x: Tensor, coords_um: Tensor, index: Tensor, found: Tensor) -> Tensor:
        """x [N, D] at ``coords_um`` [N, 2] -> h [N, D]."""
        x = self.drop(x + self.places(coords_um))[None]
        for block in self.blocks:
            x = block(x)
        x, layers = x[0], []
        for layer in self.graph:
            x = layer(x, index, found)
            layers.append(x)
        return self.read(torch.stack(layers))[0].mean(dim=0)


class _Bank:
    """The training spots with all their views; no copy of a model copies them."""

    def __init__(self, spots: Spots):
        self.spots = spots
        self.row = {int(spot): row for row, spot in enumerate(spots.spot_ids.tolist())}

    def __deepcopy__(self, memo) -> "_Bank":
        return self

    def rows(self, batch: Batch) -> Tensor | None:
        """The batch's spots here, ``None`` where one is not known."""
        rows = [self.row.get(spot) for spot in batch.spot_ids.tolist()]
        return None if None in rows else torch.tensor(rows)


class Hist2ST(SectionRival):
    """Transformer, neighbour graph and LSTM over a section, trained on counts and on its own altered copies."""

    config = Hist2STConfig
    may_be_none = ("copies", "neighbours", "radius")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {},
        "official": {
            "width": 1024, "depth": 8, "heads": 16, "head_width": 64, "hidden": 1024, "n_positions": 64, "copies": 5,
        },
    }  # fmt: skip
    # published: Adam 1e-5, one section a step, 350 epochs, the rate times 0.9 every 50. A smaller network on three
    # sections takes fewer epochs at a hundredfold rate, which falls
    train_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 80, "lr": 1e-3, "optimizer": "adam", "weight_decay": 0.0, "warmup_steps": 20, "ema_decay": 0.0,
    }  # fmt: skip
    inputs = ("features", "patches")
    crop_px = 112
    card = Card(
        title="Hist2ST (Zeng et al., Briefings in Bioinformatics 2022)",
        target="Originally log10(1 + counts per 10,000 of the selected genes), and raw counts for the likelihood. "
        "Here log2(1 + count), not divided by the library, as a difference from the training mean; raw counts as "
        "there.",
        kept="Transformer, directed graph of the nearest spots, LSTM over its layers, likelihood and "
        "self-distillation with their weights; both sides of the distillation learn.",
        lost="Features stand for the convolutions over patches (input=patches has them); the altered copies are other "
        "views of the same spots (where there is one view alone, dropout alters them), in preset small 2 of them, not "
        "5.",
        mended="A spot without a neighbour is its own neighbour, where the official mean is 0 / 0 and turns the whole "
        "section to NaN; on a hexagonal array the six true neighbours count.",
    )

    def __init__(self, n_features: int, n_genes: int, config: Hist2STConfig):
        super().__init__(n_features, n_genes, config)
        width = Pixels.width if self.takes_patches else config.width
        self.token = Pixels() if self.takes_patches else nn.Linear(n_features, width)
        self.trunk = Trunk(config, width)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_genes))
        self.zinb = nn.ModuleDict({name: nn.Linear(width, n_genes) for name in ("mean", "disp", "pi")})
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self._bank: _Bank | None = None

    @classmethod
    def idle_settings(cls, preset: str, settings: Mapping) -> dict[str, str]:
        """The convolutions' width is given."""
        return {"width": "patches"} if settings.get("input") == "patches" and "width" in settings else {}

    def prepare(self, spots: Spots) -> None:
        """Constants as all have them; the views of the training spots, for their altered copies, by reference."""
        super().prepare(spots)
        self.trunk.places.prepare(spots)
        self._bank = _Bank(spots)

    def edges(self, coords_um: Tensor) -> tuple[Tensor, Tensor]:
        """The graph: at most k neighbours of each spot, int64 and bool [N, k]. Directed, without the spot itself."""
        lattice = Lattice.of(coords_um)
        radius = self.settings.radius or (2.0 if lattice.fold == 4 else 1.3)
        index, found = lattice.nearest(self.settings.neighbours or lattice.fold, radius)
        return index.to(coords_um.device), found.to(coords_um.device)

    def hidden(self, batch: Batch, edges: tuple[Tensor, Tensor]) -> Tensor:
        """h [N, D] of the spots of a section."""
        x = self.pixels(batch)[:, 0] if self.takes_patches else self.standardised(batch.features)
        return self.trunk(self.token(x), batch.coords_um, *edges)

    def forward(self, batch: Batch) -> Tensor:
        """The plain head for every spot."""
        return self.gene_mean + self.head(self.hidden(batch, self.edges(batch.coords_um)))

    def loss(self, batch: Batch) -> LossOutput:
        """Squared error, likelihood and self-distillation, weighted."""
        assert batch.counts is not None
        edges = self.edges(batch.coords_um)
        h = self.hidden(batch, edges)
        predicted = self.gene_mean + self.head(h)
        terms = torch.stack([
            fn.mse_loss(predicted, log2p1(batch.counts)),
            self.settings.zinb_weight * self._likelihood(h, batch.counts),
            self.settings.distil_weight * self._distillation(batch, edges, predicted),
        ])  # fmt: skip
        return LossOutput(terms.sum(), terms.detach())

    def _likelihood(self, h: Tensor, counts: Tensor) -> Tensor:
        size = counts.sum(dim=1).float()
        size = (size / size.median().clamp(min=1)).clamp(min=1e-3)  # a spot without counts has a size all the same
        mean = self.zinb["mean"](h).exp().clamp(1e-5, 1e6)
        dispersion = fn.softplus(self.zinb["disp"](h)).clamp(1e-4, 1e4)
        return zinb_loss(counts.float(), mean * size[:, None], dispersion, self.zinb["pi"](h).sigmoid())

    def _distillation(self, batch: Batch, edges: tuple[Tensor, Tensor], predicted: Tensor) -> Tensor:
        if not self.settings.copies:
            return predicted.new_zeros(())
        hs = torch.stack([self.hidden(self._altered(batch), edges) for _ in range(self.settings.copies)])
        weight = self.score(hs).softmax(dim=0)  # [copies, N, 1]
        return fn.mse_loss((weight * (self.gene_mean + self.head(hs))).sum(dim=0), predicted)

    def _altered(self, batch: Batch) -> Batch:
        """The section with every spot turned: in another view, or its patch turned, mirrored, some without colour. Of
        spots that are not of the training, the same section (dropout alters it)."""
        if self.takes_patches:
            assert batch.patches is not None
            x = randomly_turned(batch.patches)
            gray = torch.rand(len(x), 1, 1, 1, 1, device=x.device) < _GRAY_SHARE
            return replace(batch, patches=torch.where(gray, x.float().mean(dim=2, keepdim=True).to(x.dtype), x))
        rows = None if self._bank is None else self._bank.rows(batch)
        if self._bank is None or rows is None:
            return batch
        views = self._bank.spots.features
        features = views[rows, torch.randint(views.shape[1], (len(rows),))]
        return replace(batch, features=features.to(batch.features))


def zinb_loss(counts: Tensor, mean: Tensor, dispersion: Tensor, pi: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats an entry) of counts [N, G] under zero-inflated negative binomials: zero with
    probability ``pi``, else of that mean and inverse dispersion."""
    log_ratio = torch.log1p(mean / dispersion)
    nb = (
        torch.lgamma(dispersion) + torch.lgamma(counts + 1) - torch.lgamma(counts + dispersion)
        + (dispersion + counts) * log_ratio + counts * (dispersion.log() - mean.log())
    )  # fmt: skip
    at_zero = -torch.log(pi + (1 - pi) * torch.exp(-dispersion * log_ratio) + _EPS)
    return torch.where(counts > 0, nb - torch.log(1 - pi + _EPS), at_zero).mean()


MODEL = Hist2ST
