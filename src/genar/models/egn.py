"""EGN: a transformer over one patch, revised at every other layer by similar training spots and their counts.

What is unusual about it. The exemplars' expression is an *input*: six training spots whose frozen features are nearest
to the query's tell, through a gate, what the tokens should hold. They come from other sections than the query's in
training, too; else a spot would find itself and copy its own answer. Here the frozen feature is the one token and the
query in one (the form "EGN-1"), so that attention and spatial gate have one place each.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from genar.errors import InputError
from genar.models._base import Batch, Card, Counts, LossOutput, Spots, log2p1
from genar.models._decoding import Decoding
from genar.models._retrieval import Keys
from genar.models._spot import SpotRival

_BRIDGE_EVERY = 2
_SHARPNESS = 0.1
_ATTENDED = 0.5


@dataclass(frozen=True)
class EGNConfig:
    """Sizes; the defaults are the published ones."""

    width: int = 1024
    depth: int = 8
    heads: int = 16
    mlp_width: int = 4096
    bridge_heads: int = 8
    bridge_width: int = 64
    """channels of a bridge's head"""
    refinements: int = 2
    """MLPs that refine query and exemplars before the first layer"""
    exemplars: int = 6
    """training spots that are looked up"""
    correlation_weight: float = 0.5
    """of 1 - Pearson's r in the loss"""

    def __post_init__(self):
        sizes = (self.width, self.depth, self.heads, self.mlp_width, self.bridge_heads, self.bridge_width)
        if min(*sizes, self.exemplars) < 1 or self.refinements < 0 or self.correlation_weight < 0:
            raise InputError("model egn: sizes and exemplars must be >= 1, refinements and correlation_weight >= 0")
        if self.width % self.heads:
            raise InputError(f"model egn: width {self.width} is no multiple of heads {self.heads}")


class Attention(nn.Module):
    """Multi-head self-attention [B, L, D] without biases but the last."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(fn.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Refinement(nn.Module):
    """x + MLP(LN x), token by token; the same for query and exemplars."""

    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x + self.branch(x)


class Bridge(nn.Module):
    """Exemplars revise the query, the revised query gates the tokens, and what passes the gate is added to both.

    The page that it was written from does not say which of its layers have a bias; with ``value`` and ``to_query``
    without, the whole has the published number of parameters (less an output layer that nothing read).
    """

    def __init__(self, config: EGNConfig, n_tokens: int):
        super().__init__()
        width, inner = config.width, config.bridge_heads * config.bridge_width
        self.heads, hidden = config.bridge_heads, width // 4
        self.compare = nn.Sequential(nn.Linear(2 * width, hidden), nn.SiLU(), nn.Linear(hidden, 2 * width))
        self.value = nn.Linear(width, width, bias=False)
        self.exemplar_norm = nn.LayerNorm(width)
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.bridge_heads * n_tokens))
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner))
        self.to_tokens = nn.Linear(inner, width)
        self.to_query = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: Tensor, query: Tensor, exemplars: Tensor, values: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, L, D], query [B, D] and exemplars [B, k, D], all revised; ``values`` [B, k, D] are of the
        exemplars' expression, ``share`` [B, k, 1] is each one's share of the mean."""
        both = torch.cat([query[:, None] - exemplars, exemplars], dim=2)
        to_query, to_exemplar = self.compare(both).sigmoid().chunk(2, dim=2)
        value = self.value(values)
        revised = query + (share * to_query * value).sum(dim=1)
        exemplars = self.exemplar_norm(exemplars + to_exemplar * value)
        gate = self.gate(revised).sigmoid().unflatten(1, (self.heads, -1)).transpose(1, 2)  # [B, L, heads]
        passed = (self.read(x).unflatten(2, (self.heads, -1)) * gate[..., None]).flatten(2)
        return x + self.to_tokens(passed), query + self.to_query(passed.mean(dim=1)), exemplars


class Layer(nn.Module):
    """Attention, a bridge where there is one, an MLP; each added to the tokens."""

    def __init__(self, config: EGNConfig, n_tokens: int, bridged: bool):
        super().__init__()
        width = config.width
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, config.heads)
        self.bridge = Bridge(config, n_tokens) if bridged else None
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, config.mlp_width), nn.GELU(), nn.Linear(config.mlp_width, width)
        )

    def forward(
        self, x: Tensor, position: Tensor, query: Tensor, exemplars: Tensor, values: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, query and exemplars, revised."""
        x = x + self.attention(self.norm(x + position))
        if self.bridge is not None:
            x, query, exemplars = self.bridge(x, query, exemplars, values, share)
        return x + self.mlp(x), query, exemplars


class Network(nn.Module):
    """Tokens, query and exemplars in, expression [B, G] out.

    The published one reads 64 tokens of 32 x 32 pixels; EGN-1 one token, the feature.
    """

    def __init__(self, n_token: int, n_tokens: int, n_features: int, n_genes: int, config: EGNConfig):
        super().__init__()
        width = config.width
        self.token = nn.Linear(n_token, width)
        self.position = nn.Parameter(torch.randn(n_tokens, width) * 0.02)
        self.query = nn.Linear(n_features, width)
        self.exemplar = nn.Linear(n_features + n_genes, width)
        self.expression = nn.Linear(n_genes, width)
        self.refine = nn.Sequential(*(Refinement(width) for _ in range(config.refinements)))
        bridged = [i % _BRIDGE_EVERY == 0 for i in range(config.depth)]
        self.layers = nn.ModuleList(Layer(config, n_tokens, b) for b in bridged)
        self.attended = nn.Linear(width, width, bias=False)
        self.head = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, n_genes))

    def forward(self, tokens: Tensor, feature: Tensor, others: Tensor, expression: Tensor, there: Tensor) -> Tensor:
        """Tokens [B, L, T], the query's feature [B, F], exemplars' features [B, k, F] and expression [B, k, G].

        ``there`` [B, k] is false for exemplars that are none; a spot may have none at all.
        """
        x, query = self.token(tokens), self.refine(self.query(feature))
        exemplars = self.refine(self.exemplar(torch.cat([others, expression], dim=2)))
        values = self.expression(expression)
        share = (there / there.sum(dim=1, keepdim=True).clamp(min=1))[:, :, None].to(x.dtype)
        for layer in self.layers:
            x, query, exemplars = layer(x, self.position, query, exemplars, values, share)
        s = self.attended(x)
        attended = ((_SHARPNESS * s).softmax(dim=1) * s).sum(dim=1)
        return self.head(torch.cat([s.mean(dim=1) + _ATTENDED * attended, query], dim=1))


def correlation_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """Mean over genes of 1 - Pearson's r over the batch; a gene that is constant in it counts 1."""
    x, y = predicted - predicted.mean(dim=0), truth - truth.mean(dim=0)
    # under the root, so that a constant gene has a gradient
    spread = ((x.square().sum(dim=0) + 1e-8) * (y.square().sum(dim=0) + 1e-8)).sqrt()
    return (1 - (x * y).sum(dim=0) / spread).mean()


class EGN(SpotRival):
    """Exemplar-guided network: six similar training spots, with their counts, revise what is read from the features."""

    config = EGNConfig
    compares = True
    may_be_none = ("refinements",)
    presets: ClassVar = {
        "small": {"width": 128, "depth": 4, "heads": 4, "mlp_width": 256, "bridge_heads": 4, "bridge_width": 32},
        "official": {},
    }
    # Published: AdamW 5e-4, decay 1e-4, batch 32, 50 epochs, cosine with warm restarts every half epoch after 100 steps
    # of warm-up. A single cosine without restarts here, and fewer epochs: few spots are soon learned by heart.
    train_defaults: ClassVar = {
        "max_epochs": 20, "batch_size": 32, "lr": 5e-4, "weight_decay": 1e-4, "schedule": "cosine",
        "warmup_steps": 100, "clip": 0.0, "ema_decay": 0.0,
    }  # fmt: skip
    card = Card(
        title="EGN (Yang et al. 2023, Exemplar Guided Deep Neural Network for Spatial Transcriptomics Analysis of Gene "
        "Expression Prediction)",
        target="the original predicts log10(1 + count) scaled to 0..1 per gene; here log2(1 + count), scaled by the "
        "training spots' least and greatest, and scaled back",
        kept="the look-up of six exemplars, projector, bridges, attention pooling, loss with correlation",
        lost="the tokens of the patch: the frozen feature is the only one (EGN-1), so that attention and spatial gate "
        "have one place; neighbours are sought among standardised features",
        mended="exemplars are never of the query's own section, in training or prediction (with a single training "
        "section: of its strip); no layers that nothing reads; no epoch chosen on the held-out section",
    )
    target_low: Tensor
    target_range: Tensor

    def __init__(self, n_features: int, n_genes: int, config: EGNConfig, *, n_keys: int = 0):
        super().__init__(n_features, n_genes, config, n_keys=n_keys)
        self.register_buffer("target_low", torch.zeros(n_genes))
        self.register_buffer("target_range", torch.ones(n_genes))
        self.keys = Keys(n_keys, n_genes, n_features)
        self.network = Network(n_features, 1, n_features, n_genes, config)

    @classmethod
    def sizes(cls, spots: Spots, config) -> dict[str, int]:
        """It holds the training spots."""
        return {"n_keys": len(spots)}

    @torch.no_grad()
    def prepare(self, spots: Spots) -> None:
        """Keep the training spots, their features standardised; set the genes' ranges."""
        assert spots.counts is not None
        super().prepare(spots)
        self.keys.hold(spots)
        self.keys.features = self.standardised(self.keys.features)
        self.own_sizes["n_keys"] = len(spots)
        target = log2p1(spots.counts)
        span = target.amax(dim=0) - target.amin(dim=0)
        self.target_low.copy_(target.amin(dim=0))
        self.target_range.copy_(torch.where(span > 0, span, torch.ones_like(span)))

    def scaled(self, log2_counts: Tensor) -> Tensor:
        """log2(1 + count) [..., G] as the network sees it: 0..1 over the training spots."""
        return (log2_counts - self.target_low) / self.target_range

    def exemplars(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Places [B, k] of the nearest keys of standardised features x [B, F], and which are there."""
        with torch.no_grad():
            near = -torch.cdist(x, self.keys.features)
            return self.keys.nearest(near, self.keys.visible(batch), self.settings.exemplars)

    def forward(self, batch: Batch) -> Tensor:
        """Scaled expression [B, G], unbounded."""
        x = self.standardised(batch.features)
        places, there = self.exemplars(x, batch)
        expression = self.scaled(self.keys.log2_counts[places])
        return self.network(x[:, None], x, self.keys.features[places], expression, there)

    def loss(self, batch: Batch) -> LossOutput:
        """Squared error plus the weighted correlation loss; parts: both."""
        assert batch.counts is not None
        predicted, truth = self(batch), self.scaled(log2p1(batch.counts))
        error, correlation = fn.mse_loss(predicted, truth), correlation_loss(predicted, truth)
        total = error + self.settings.correlation_weight * correlation
        return LossOutput(total, torch.stack([error, correlation]).detach())

    def predict_block(self, batch: Batch, how: Decoding) -> Counts:
        """One pass; back to log2(1 + count)."""
        return Counts.from_log2(self(batch) * self.target_range + self.target_low)


MODEL = EGN
