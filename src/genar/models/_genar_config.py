"""Size and options of GenAR, and the published presets."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from genar.errors import InputError

FINAL_LOSSES = {
    "counts": ("gaussian", "gaussian_nll", "cross_entropy"),
    "continuous": ("squared_error", "gaussian_nll"),
}
"""For each output, how a gene's loss may be had."""


_MOST = 1_000_000


@dataclass(frozen=True)
class GenARConfig:
    """Size and options of the network. ``paper()`` and ``released()`` are the published ones, ``small()`` the
    default."""

    n_features: int = 1280
    """F, width of all feature blocks together"""
    n_blocks: int = 1
    """equal feature blocks: patch widths and neighbours' means, each through a histology block of its own"""
    width: int = 128
    """D of a token"""
    depth: int = 4
    """blocks of the transformer"""
    heads: int = 4
    """of a block's attention; ``width`` is a multiple of them"""
    mlp_ratio: float = 3.0
    """width of the layer within a block's MLP, in ``width``"""
    dropout: float = 0.3
    """in the condition and the gene-identity projection"""
    drop_path: float = 0.1
    """of the last block; rises linearly from 0"""
    max_count: int = 0
    """C: larger counts are capped in training; 0 takes the largest training count, rounded up to a power of two less
    one, and 16,383 at most"""
    history: str = "queries"
    """``tokens`` (eq. 3) or ``queries``: coarser scales are seen through their interpolated positions alone"""
    within: str = "full"
    """attention among the positions of one scale: ``causal`` (paper) or ``full``"""
    coords: str = "none"
    """position code: ``unit`` ([0, 1] over the section, released code), ``pitch`` (100 um) or ``none``"""
    gene_identity: bool = True
    """FiLM and mixing with learned embeddings of the genes"""
    output: str = "counts"
    """``counts``: a softmax over count classes (paper); ``continuous``: regression of ln(1 + count)"""
    final_loss: str = "gaussian"
    """of the genes: ``gaussian`` (KL to a discretised Gaussian, eq. 5), ``gaussian_nll`` (of the softmax's expectation)
    or ``cross_entropy``; with continuous output, of every scale: ``squared_error`` or ``gaussian_nll``"""
    scale_weights: tuple[float, ...] = ()
    """weight of each scale's loss, coarse to fine; empty: equal (each a sum over its positions)"""
    recompute: bool = False
    """the blocks' activations are computed again in the backward pass: less memory, more time"""
    group_temperature: float = 0.0
    """widens the target of a group to this standard deviation (counts); 0 shares it between two neighbouring counts"""
    sigma_base: float = 0.5
    """standard deviation of a gene's target at count 0"""
    sigma_slope: float = 0.1
    """standard deviation of a gene's target: sigma_slope * count + sigma_base (eq. 5)"""
    components: int = 128
    """> 0: features are standardised and reduced to so many components, weighted as ridge weights them (see
    ``Condition``); 0 feeds the features themselves through a layer norm (paper)"""
    feature_dropout: float = 0.3
    """share of the features (or components) hidden in each training step"""
    token_noise: float = 0.0
    """standard deviation, in ln(1 + count), of noise that a spot's coarser tokens share in training; each group adds
    half as much"""
    count_basis: int = 32
    """> 0: count classes are embedded and read out through so many smooth bumps over ln(1 + count); 0 gives each its
    own weights"""
    start_at_frequencies: bool = True
    """a bias per position and count, started at the frequency of each count in training"""
    linear_start: bool = True
    """the logits start at a log-linear model of each group, fitted to components and parent in closed form (see
    ``LinearStart``); needs ``components`` and ``start_at_frequencies``"""

    def __post_init__(self):
        for name, allowed in (
            ("history", ("tokens", "queries")),
            ("within", ("causal", "full")),
            ("coords", ("unit", "pitch", "none")),
            ("output", tuple(FINAL_LOSSES)),
            ("final_loss", FINAL_LOSSES.get(self.output, ())),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"model: {name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        for name in ("n_features", "n_blocks", "width", "depth", "heads"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise InputError(f"model: {name} must be at least 1 (at most {_MOST}), found {getattr(self, name)}")
        for name in ("dropout", "drop_path", "feature_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"model: {name} must be in [0, 1), found {getattr(self, name)}")
        if self.width % self.heads:
            raise InputError(f"model: width {self.width} must be a multiple of heads {self.heads}")
        if self.n_features % self.n_blocks:
            raise InputError(f"model: {self.n_features} features are not {self.n_blocks} equal blocks")
        if self.linear_start and not (self.components and self.start_at_frequencies):
            raise InputError("model: linear_start needs components > 0 and start_at_frequencies; set it to false")
        if not self.sigma_base > 0:
            raise InputError(f"model: sigma_base must be > 0, found {self.sigma_base}")
        if not 1 <= (inner := self.mlp_ratio * self.width) <= _MOST:
            raise InputError(f"model: mlp_ratio times width must be 1 to {_MOST}, found {inner:g}")
        for name in ("max_count", "token_noise", "count_basis", "components", "sigma_slope", "group_temperature"):
            if not 0 <= getattr(self, name) <= _MOST:
                raise InputError(f"model: {name} must be at least 0 (at most {_MOST}), found {getattr(self, name)}")
        if self.count_basis == 1:
            raise InputError("model: count_basis must be 0 or at least 2, found 1: one bump tells no counts apart")
        if self.scale_weights and not (min(self.scale_weights) >= 0 and sum(self.scale_weights) > 0):
            raise InputError("model: scale_weights must not be negative, and not all zero")

    @property
    def histology_inputs(self) -> list[int]:
        """Width of what each histology block reads."""
        return [self.components] if self.components else [self.n_features // self.n_blocks] * self.n_blocks


def small(**changes) -> GenARConfig:
    """The default: trains on a CPU."""
    return GenARConfig(**changes)


def paper(**changes) -> GenARConfig:
    """The paper's network (appendix D) without anything that the paper does not have."""
    config = GenARConfig(
        width=768, depth=8, heads=8, max_count=2000, history="tokens", within="causal", coords="unit",
        components=0, dropout=0.1, feature_dropout=0.0, token_noise=0.0, count_basis=0, sigma_base=1.0,
        sigma_slope=0.01, start_at_frequencies=False, linear_start=False,
    )  # fmt: skip
    return replace(config, **changes)


def released(**changes) -> GenARConfig:
    """The size that the authors' released code trains: 512 wide."""
    return replace(paper(width=512), **changes)


PRESETS = {"small": small, "paper": paper, "released": released}


def config_from_dict(facts: Mapping, preset: str = "small") -> GenARConfig:
    """A configuration from plain values over a preset; ``InputError`` naming what is not known."""
    if preset not in PRESETS:
        raise InputError(f"model: preset {preset!r} is not known; expected one of {', '.join(PRESETS)}")
    known = {f.name for f in fields(GenARConfig)}
    if unknown := sorted(set(facts) - known):
        raise InputError(f"model: unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return PRESETS[preset](**facts)


def idle_fields(config: GenARConfig, n_scales: int) -> dict[str, str]:
    """Fields that change nothing, and beside what, in a network of ``n_scales`` scales (0: not known)."""
    idle, targets = {}, ("sigma_base", "sigma_slope")
    if config.final_loss == "cross_entropy":
        idle |= dict.fromkeys(targets, "final_loss cross_entropy")
    if config.output == "continuous":
        idle |= dict.fromkeys((*targets, "group_temperature"), "output continuous")
    if n_scales == 1:
        idle |= dict.fromkeys(("token_noise", "group_temperature", "scale_weights"), "a single scale")
    if config.depth == 1:
        idle["drop_path"] = "a single block"
    return idle
