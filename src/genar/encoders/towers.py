"""The vision towers of CONCH and CONCH v1.5: a timm transformer whose tokens one learned query sums up by attention.

Their loaders come with the weights' own packages; the towers are small enough to be built here on timm and torch, under
the tensor names of the published files. What those files hold beside (text tower, caption pooler, projection to the
space shared with text) has no part in a patch's feature.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

_TOWER, _HEADS = "visual.", 8
_GRID_OFFSET = 0.1
"""added to the new grid when v1.5 stretches its positions, as in DINO"""


class JointPooler(nn.Module):
    """CONCH: torch's multi-head attention, with biases."""

    def __init__(self, width: int, token_width: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, width))
        self.attn = nn.MultiheadAttention(width, _HEADS, kdim=token_width, vdim=token_width, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(width), nn.LayerNorm(token_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L, token_width] -> [B, width]."""
        query, tokens = self.ln_q(self.query).expand(len(tokens), 1, -1), self.ln_k(tokens)
        return self.attn(query, tokens, tokens, need_weights=False)[0][:, 0]


class PlainPooler(nn.Module):
    """CONCH v1.5: the same with plain projections, without biases."""

    def __init__(self, width: int, token_width: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, width))
        self.ln_q, self.ln_k = nn.LayerNorm(width), nn.LayerNorm(token_width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(token_width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L, token_width] -> [B, width]."""
        n, width = len(tokens), self.query.shape[1]
        query = self.to_q(self.ln_q(self.query)).expand(n, 1, width)
        key, value = self.to_kv(self.ln_k(tokens)).chunk(2, dim=2)
        heads = (
            x.unflatten(2, (_HEADS, -1)).transpose(1, 2) for x in (query, key, value)
        )  # [B, heads, L, width/heads]
        return self.to_out(fn.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(n, width))


POOLERS = {"joint": JointPooler, "plain": PlainPooler}


class VisionTower(nn.Module):
    """Patches [B, 3, px, px] -> features [B, width]: trunk, pooler, layer norm."""

    def __init__(self, trunk: nn.Module, pooler: str, width: int):
        super().__init__()
        self.trunk = trunk
        self.attn_pool_contrast = POOLERS[pooler](width, trunk.embed_dim)
        self.ln_contrast = nn.LayerNorm(width)

    @property
    def pretrained_cfg(self) -> dict:
        """timm's facts of the trunk."""
        return self.trunk.pretrained_cfg  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        """The feature."""
        return self.ln_contrast(self.attn_pool_contrast(self.trunk.forward_features(x)))  # pyright: ignore


def tower_state(state: dict[str, Tensor], tower: VisionTower) -> dict[str, Tensor]:
    """The tensors of a published file that a tower is made of, the positions stretched to its grid."""
    inner = {name.removeprefix(_TOWER): t for name, t in state.items() if name.startswith(_TOWER)} or state
    parts = tuple(f"{name}." for name, _ in tower.named_children())
    mine = {name: tensor for name, tensor in inner.items() if name.startswith(parts)}
    positions = "trunk.pos_embed"
    if positions in mine:
        mine[positions] = _stretch(mine[positions], tower.trunk.pos_embed.shape[1] - 1)  # pyright: ignore
    return mine


def _stretch(positions: Tensor, n_patches: int) -> Tensor:
    """Positions [1, 1 + old^2, W] -> [1, 1 + new^2, W], bicubic; the class token's stays."""
    old, new = round((positions.shape[1] - 1) ** 0.5), round(n_patches**0.5)
    if old == new:
        return positions
    grid = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    scale = (new + _GRID_OFFSET) / old
    grid = fn.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
