"""How counts are made of a predictive distribution, and what of it is kept beside them."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from genar.errors import InputError

DECODINGS = ("greedy", "mean", "median", "quantiles", "sample")
MOMENTS = ("mean", "log1p_mean", "p_zero", "sd")
_COLDEST = 1e-6  # below, logits overflow
_QUANTILE = re.compile(r"q(\d\d)")
_QUANTILE_LAYERS = ("q05", "q25", "q50", "q75", "q95")


@dataclass(frozen=True)
class Decoding:
    """How a prediction is made of the model's distributions. Raises ``InputError`` where a field is out of range."""

    decode: str = "mean"
    """``greedy`` (paper): the most likely class at every scale; ``mean``, ``median``, ``quantiles`` (the median, and
    layers q05, q25, q50, q75, q95): of the predictive distribution; ``sample``: drawn at every scale"""
    samples: int = 1
    """trajectories S: the coarser scales are drawn S times and the S last softmaxes averaged; 1 takes their most likely
    tokens"""
    seed: int = 0
    """of all draws"""
    temperature: float = 1.0
    """of each draw: below 1 sharper, above 1 flatter"""
    top_k: int = 0
    """draws are among the so many likeliest classes; 0 for all"""
    top_p: float = 1.0
    """draws are among the fewest classes that hold this share of the probability"""
    steps: int = 0
    """denoising steps of a model that diffuses; 0: as many as it takes by default"""
    bf16: bool = False
    """GenAR's blocks compute in bfloat16: faster where the processor has it; the head stays float32"""
    layers: tuple[str, ...] = ("mean", "log1p_mean", "p_zero")
    """what is kept: ``mean``, ``log1p_mean`` (expectation of ln(1 + count)), ``p_zero``, ``sd``, and any quantile as
    ``q05``"""

    def __post_init__(self):
        if self.decode not in DECODINGS:
            raise InputError(f"decode must be one of {', '.join(DECODINGS)}, found {self.decode!r}")
        if self.samples < 1:
            raise InputError(f"samples must be at least 1, found {self.samples}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be at least 0 and below 2**32, found {self.seed}")
        if self.steps < 0:
            raise InputError(f"steps must be at least 0, found {self.steps}")
        if not self.temperature >= _COLDEST:
            raise InputError(f"temperature must be at least {_COLDEST}, found {self.temperature}; greedy is colder")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(f"top_k must be >= 0 and top_p in (0, 1], found {self.top_k} and {self.top_p}")
        for name in self.layers:
            if name not in MOMENTS and not (_QUANTILE.fullmatch(name) and name != "q00"):
                raise InputError(f"layer {name!r} is not known; known are {', '.join(MOMENTS)} and quantiles as q05")

    @property
    def trajectories(self) -> int:
        """S: ``greedy`` and ``sample`` follow one."""
        return 1 if self.decode in ("greedy", "sample") else self.samples

    @property
    def kept(self) -> tuple[str, ...]:
        """Layers of the prediction."""
        extra = _QUANTILE_LAYERS if self.decode == "quantiles" else ()
        return (*self.layers, *(name for name in extra if name not in self.layers))


DEFAULT = Decoding()


def refuse_distribution(how: Decoding) -> None:
    """``InputError`` where a model that gives a value is asked for more."""
    if how.decode not in ("greedy", "mean"):
        raise InputError(f"a model of squared error decodes by greedy or mean, not by {how.decode!r}")


def summarise(p: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Layers [B, G] of predictive distributions [B, G, V] over the counts 0..C.

    A quantile q is the least count whose cumulative probability reaches q.
    """
    counts = torch.arange(p.shape[2], device=p.device, dtype=torch.float32)
    layers, cumulative = {}, None
    if "mean" in names or "sd" in names:
        mean = (p * counts).sum(dim=2)  # a sum a row, and no matrix product, for the same bits in any batch
    for name in names:
        if name == "mean":
            layers[name] = mean
        elif name == "log1p_mean":
            layers[name] = (p * torch.log1p(counts)).sum(dim=2)
        elif name == "p_zero":
            layers[name] = p[:, :, 0].clone()
        elif name == "sd":
            layers[name] = (p * (counts - mean[:, :, None]).square()).sum(dim=2).sqrt()
        else:
            cumulative = p.double().cumsum(dim=2) if cumulative is None else cumulative
            layers[name] = _reached(cumulative, int(name[1:]) / 100).float()
    return layers


def quantile(p: Tensor, q: float | Tensor) -> Tensor:
    """int64 [B, G]: the least count whose cumulative probability reaches q (a number, or [B, G])."""
    return _reached(p.double().cumsum(dim=2), q)


def _reached(cumulative: Tensor, q: float | Tensor) -> Tensor:
    at = torch.as_tensor(q, dtype=torch.float64, device=cumulative.device).expand(cumulative.shape[:2])
    reached = at[:, :, None] * cumulative[:, :, -1:]  # the total is one but for rounding
    reached -= (reached / 2).clamp(max=1e-7)  # never down to 0, which a count without any probability reaches
    return torch.searchsorted(cumulative, reached)[:, :, 0].clamp(max=cumulative.shape[2] - 1)


def draw(logits: Tensor, uniform: Tensor, how: Decoding) -> Tensor:
    """Tokens [B, M] from logits [B, M, V], each the quantile of its tempered, cut distribution at ``uniform`` [B,
    M]."""
    logits = logits / how.temperature
    if how.top_k and how.top_k < logits.shape[2]:
        among = logits.topk(how.top_k, dim=2).indices
        logits = torch.full_like(logits, -torch.inf).scatter(2, among, logits.gather(2, among))
    p = logits.double().softmax(dim=2)
    if how.top_p < 1:
        falling, place = p.sort(dim=2, descending=True, stable=True)
        beyond = falling.cumsum(dim=2) - falling >= how.top_p  # the likeliest class always stays
        p = p.masked_fill(beyond.gather(2, place.argsort(dim=2)), 0)
    return quantile(p, uniform.double())
