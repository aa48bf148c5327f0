"""The transformer block that the methods of whole sections share: norm first, queries and keys of any two sequences."""

from torch import Tensor, nn
from torch.nn import functional as fn


class Attention(nn.Module):
    """Multi-head attention of x [..., L, D] to itself or to another sequence; queries, keys and values without bias."""

    def __init__(
        self, width: int, heads: int, *, head_width: int = 0, dropout: float = 0.0, weight_dropout: float = 0.0
    ):
        super().__init__()
        inner = heads * (head_width or width // heads)
        self.heads, self.weight_dropout = heads, weight_dropout
        self.q, self.kv = nn.Linear(width, inner, bias=False), nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, L, D], context [B, M, D] -> [B, L, D]; ``mask`` as ``scaled_dot_product_attention`` takes it,
        [B or 1, heads or 1, L or 1, M]."""
        k, v = self.kv(x if context is None else context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        dropped = self.weight_dropout if self.training else 0.0
        seen = fn.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped)
        return self.out(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + Attention(LN x), then x + MLP(LN x); another sequence goes through the same norm as x."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        head_width: int = 0,
        dropout: float = 0.0,
        weight_dropout: float = 0.0,
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, head_width=head_width, dropout=dropout, weight_dropout=weight_dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, L, D], context [B, M, D] -> [B, L, D]."""
        other = None if context is None else self.norm1(context)
        x = x + self.attention(self.norm1(x), other, mask)
        return x + self.mlp(self.norm2(x))
