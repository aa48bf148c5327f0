"""ST-Net: one patch through a DenseNet-121, and a linear layer that starts at the genes' means.

What is unusual about it. The last layer starts with weights zero and the mean of the targets as bias: before the first
step every spot gets the mean. And the loss is a *sum* over the batch's spots. With features in place of pixels what
remains is a linear probe under its recipe; ridge regression is the same thing solved at once.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from genar.errors import InputError
from genar.models._base import Batch, Card, Counts, LossOutput, Spots, log2p1, turned
from genar.models._decoding import Decoding
from genar.models._rival import INPUTS, check_input
from genar.models._spot import SpotRival

# Patches of which the colours are measured: as many as 12 batches of 32.
_N_COLOURED = 384
_FEW_GENES = 200
_PATCHES_AT_ONCE = 8


@dataclass(frozen=True)
class STNetConfig:
    """It has no sizes of its own: DenseNet-121, or none."""

    input: str = "features"
    """``features``: a linear layer on them; ``patches``: the network end to end on pixels"""

    def __post_init__(self):
        check_input("st_net", self.input)


class PatchNet(nn.Module):
    """DenseNet-121 without its classifier: patches [B, 3, 224, 224] -> [B, 1024]; its weights start at random."""

    n_outputs = 1024

    def __init__(self):
        super().__init__()
        from torchvision.models import densenet121

        self.network = densenet121(weights=None)
        self.network.classifier = nn.Identity()  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features."""
        return self.network(x)


class STNet(SpotRival):
    """One patch, one vector of expression: a linear layer on features, or DenseNet-121 end to end on patches."""

    config = STNetConfig
    can_stream = True
    sums = True
    inputs = INPUTS
    presets: ClassVar = {"small": {}, "official": {"input": "patches"}}
    # Published: SGD with momentum 0.9, rate 1e-6 on the whole network, no decay, batch 32, 50 epochs, no schedule. A
    # linear layer alone bears a higher rate; for patches take lr=1e-6.
    train_defaults: ClassVar = {
        "max_epochs": 50, "batch_size": 32, "lr": 1e-4, "optimizer": "sgd", "weight_decay": 0.0,
        "schedule": "constant", "warmup_steps": 0, "clip": 0.0, "ema_decay": 0.0,
    }  # fmt: skip
    card = Card(
        title="ST-Net (He et al. 2020, Integrating spatial gene expression and breast tumour morphology via deep "
        "learning)",
        target="the original predicts ln((1 + count) / (genes + library size)); here log2(1 + count)",
        kept="the last layer and its start at the genes' means, the loss, the mean over 8 views; with input=patches "
        "the network end to end, with its flips, turns and measured colours",
        lost="with features: the trained DenseNet, which is the essence (this is a linear probe, and ridge its "
        "optimum); with patches: its ImageNet start, the network begins at random",
        mended="genes are chosen on training sections alone",
    )
    pixel_mean: Tensor
    pixel_scale: Tensor

    def __init__(self, n_features: int, n_genes: int, config: STNetConfig):
        super().__init__(n_features, n_genes, config)
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1))
        self.register_buffer("pixel_scale", torch.ones(3, 1, 1))
        self.patch_net = PatchNet() if config.input == "patches" else None
        self.block = _PATCHES_AT_ONCE if self.patch_net else self.block
        self.head = nn.Linear(PatchNet.n_outputs if self.patch_net else n_features, n_genes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def spot_bytes(self) -> int:
        """About what DenseNet-121 keeps of one patch for the backward pass."""
        return 100 * 2**20 if self.patch_net else 0

    @torch.no_grad()
    def prepare(self, spots: Spots) -> None:
        """Set the features' scale, the patches' colours, and the last layer's bias to the mean of log2(1 + count)."""
        assert spots.counts is not None
        super().prepare(spots)
        self.head.bias.copy_(log2p1(spots.counts).mean(dim=0))
        if self.patch_net:
            if spots.patches is None:
                raise InputError("model st_net: input=patches needs patches, and the sections came without")
            step = max(1, len(spots) // _N_COLOURED)
            some = spots.batch(slice(None, None, step)).patches
            assert some is not None
            pixels = some[:, 0].transpose(0, 1).flatten(1).float() / 255
            self.pixel_mean.copy_(pixels.mean(dim=1)[:, None, None])
            self.pixel_scale.copy_(pixels.std(dim=1).clamp(min=1e-3)[:, None, None])

    def pixels(self, batch: Batch) -> Tensor:
        """Patches [B, 3, px, px] in the colours of the training patches."""
        if batch.patches is None:
            raise InputError("model st_net: expected patches, found features alone")
        x = (batch.patches[:, 0].float() / 255 - self.pixel_mean) / self.pixel_scale
        same = x.shape[-1] == self.crop_px
        return x if same else fn.interpolate(x, (self.crop_px, self.crop_px), mode="bilinear", antialias=True)

    def forward(self, batch: Batch) -> Tensor:
        """log2(1 + count) [B, G], unbounded: of the view that was drawn in training, the mean of eight else."""
        if self.patch_net is None:
            return self.head(self.standardised(batch.features))
        x = self.pixels(batch)
        if self.training:
            return self.head(self.patch_net(x))
        net = self.patch_net
        return torch.stack([self.head(net(turned(x, view))) for view in range(8)]).mean(dim=0)

    def loss(self, batch: Batch) -> LossOutput:
        """Squared error, mean over genes, summed over the batch's spots; of few genes as if they were ``_FEW_GENES``,
        or each one's step would grow until the training diverges."""
        assert batch.counts is not None
        total = (self(batch) - log2p1(batch.counts)).square().sum() / max(self.n_genes, _FEW_GENES)
        return LossOutput(total, total.detach()[None])

    def predict_block(self, batch: Batch, how: Decoding) -> Counts:
        """The mean over the views."""
        return Counts.from_log2(self(batch))


MODEL = STNet
