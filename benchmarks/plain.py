"""A straightforward implementation of the released design, written for the comparison in ``model.py`` alone.

Six separate passes over [start ; history ; interpolated], no cache, the current scale's embedding on every token, dense
targets over all classes, eager float32, a Python loop over source positions when tokens are copied to their children.
"""

import math

import torch
from torch import nn
from torch.nn import functional as fn


class PlainBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.steer = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((heads, 1, 1), math.log(4.0)))
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x, h, mask):
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.steer(h)[:, None].chunk(6, dim=2)
        y = self.norm1(x) * (1 + scale1) + shift1
        n_spots, length, width = y.shape
        q, k, v = self.qkv(y).view(n_spots, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q = fn.normalize(q, dim=-1) * self.scale.clamp(max=math.log(100.0)).exp()
        scores = q @ fn.normalize(k, dim=-1).transpose(2, 3)
        attention = scores.masked_fill(~mask, -torch.inf).softmax(dim=3)
        x = x + gamma1 * self.out((attention @ v).transpose(1, 2).reshape(n_spots, length, width))
        return x + gamma2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Plain(nn.Module):
    """Features [B, F] and counts [B, G] (in cluster order) to a loss, or features to greedy counts."""

    def __init__(self, n_features, width, depth, heads, max_count, sizes):
        super().__init__()
        self.sizes, self.n_classes = sizes, max_count + 1
        self.histology = nn.Sequential(
            nn.LayerNorm(n_features), nn.Linear(n_features, 512), nn.GELU(), nn.Linear(512, 512), nn.LayerNorm(512)
        )
        self.position_code = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256))
        self.fuse = nn.Sequential(nn.Linear(768, width), nn.LayerNorm(width))
        self.embed = nn.Embedding(self.n_classes, width)
        self.start = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.scale_embedding = nn.Embedding(len(sizes), width)
        self.positions = nn.ParameterList(
            torch.randn(1, 1 + sum(sizes[:k]) + sizes[k], width) * 0.02 for k in range(len(sizes))
        )
        self.transition = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.LayerNorm(width))
            for _ in sizes
        )
        self.identity = nn.Parameter(torch.randn(sizes[-1], width) * 0.02)
        self.group_identity = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.film = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 2 * width))
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.head_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head_steer = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, self.n_classes)

    def condition(self, features, code):
        return self.fuse(torch.cat([self.histology(features), self.position_code(code)], dim=1))

    def logits(self, k, tokens, h):
        """Logits [B, M_k, V] of scale k from the tokens of all coarser scales, by a pass of its own."""
        n_spots, size = len(h), self.sizes[k]
        parts = [self.start.expand(n_spots, -1, -1)]
        if k:
            parts.append(self.embed(torch.cat(tokens, dim=1)))
            above = self.embed(tokens[-1])
            copied = torch.zeros(n_spots, size, above.shape[2])
            for source in range(above.shape[1]):
                for target in range(size):
                    if target * above.shape[1] // size == source:
                        copied[:, target] = above[:, source]
            interpolated = self.transition[k](copied)
        else:
            interpolated = torch.zeros(n_spots, size, self.start.shape[2])
        if k == len(self.sizes) - 1:
            interpolated = 0.7 * interpolated + 0.3 * self.identity
        x = torch.cat([*parts, interpolated], dim=1)
        x = x + self.positions[k] + self.scale_embedding.weight[k]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        for block in self.blocks:
            x = block(x, h, mask)
        scale, shift = self.head_steer(h)[:, None].chunk(2, dim=2)
        x = self.head_norm(x[:, -size:]) * (1 + scale) + shift
        genes = self.identity
        if size < len(genes):
            genes = self.group_identity(fn.adaptive_avg_pool1d(genes.T[None], size)[0].T)
        gamma, beta = self.film(genes).chunk(2, dim=1)
        return self.head((1 + gamma) * x + beta)

    def loss(self, features, code, counts):
        h, tokens, total = self.condition(features, code), [], 0.0
        classes = torch.arange(self.n_classes, dtype=torch.float32)
        for k, size in enumerate(self.sizes):
            mean = fn.adaptive_avg_pool1d(counts.float()[:, None], size)[:, 0]
            log_p = self.logits(k, tokens, h).log_softmax(dim=2)
            if k < len(self.sizes) - 1:
                low, target = mean.floor().long(), torch.zeros(*mean.shape, self.n_classes)
                target.scatter_(2, low[..., None], (1 - (mean - low))[..., None])
                high = (low + 1).clamp(max=self.n_classes - 1)
                target.scatter_add_(2, high[..., None], (mean - low)[..., None])
            else:
                sigma = 0.01 * mean + 1.0
                target = torch.exp(-0.5 * ((classes - mean[..., None]) / sigma[..., None]) ** 2)
                target = target / target.sum(dim=2, keepdim=True)
            total = total + fn.kl_div(log_p, target, reduction="none").sum() / len(counts)
            tokens.append(mean.round().long())
        return total / len(self.sizes)

    @torch.no_grad()
    def generate(self, features, code):
        h, tokens = self.condition(features, code), []
        for k in range(len(self.sizes)):
            tokens.append(self.logits(k, tokens, h).argmax(dim=2))
        return tokens[-1]
