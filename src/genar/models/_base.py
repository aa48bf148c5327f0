"""What every model shares: the batch it sees, the prediction it returns, the interface.

Shape letters of the package: B spots in a batch, N spots of a section, G genes, K scales, M groups at one scale, L
sequence length, D width, F feature width, V count classes, S sampled trajectories.
"""

import abc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from genar.errors import InputError
from genar.models._decoding import DEFAULT, Decoding

if TYPE_CHECKING:
    from genar.models.checkpoint import Checkpoint

LN2 = math.log(2.0)
_MOST_LOG2 = 31.0 - 1e-3  # of a count that an int32 holds
PREPARED_SPOTS = 20_000
"""of more training spots, a model that says so is prepared on a sample of this size"""
_PART = 4096  # spots in a part of all


@dataclass
class Batch:
    """B spots as a model sees them."""

    features: Tensor
    """float32 [B, F]"""
    coords_um: Tensor
    """float32 [B, 2], (x, y) from the image's corner"""
    coords_unit: Tensor
    """float32 [B, 2], (x, y) scaled to [0, 1] over the spots of the section"""
    spot_ids: Tensor
    """int64 [B]; decoding draws the random numbers of a spot from its id, so that they depend on no other spot"""
    counts: Tensor | None = None
    """int64 [B, G] in panel order; ``None`` at prediction"""
    section: Tensor | None = None
    """int64 [B]: the section of each spot, as a hash of its name"""
    patches: Tensor | None = None
    """uint8 [B, crops, 3, px, px], for models that take pixels"""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on another device."""
        return replace(self, **{name: t.to(device) for name, t in vars(self).items() if t is not None})

    def rows(self, rows: Tensor | slice) -> "Batch":
        """Those spots alone, in the order of ``rows``: places int64 [n], a mask bool [B] or a slice."""
        return replace(self, **{name: t[rows] for name, t in vars(self).items() if t is not None})

    def sections(self) -> "list[Batch]":
        """The batch cut where the section changes."""
        assert self.section is not None
        sizes = self.section.unique_consecutive(return_counts=True)[1].tolist()
        return [self.rows(rows) for rows in torch.arange(len(self.section)).split(sizes)]


class AllSpots(Protocol):
    """Training spots that may be more than memory holds."""

    def parts(self) -> "Iterator[Spots]":
        """All, one after the other, in parts that memory can hold."""
        ...

    def counts_by_part(self) -> Iterator[Tensor]:
        """Their counts alone, int [n, G] each."""
        ...


@dataclass
class Spots:
    """The spots of one or more sections in memory, all views kept."""

    features: Tensor
    """float32 [N, views, F]"""
    coords_um: Tensor
    """float32 [N, 2], as in :class:`Batch`, like the next two"""
    coords_unit: Tensor
    spot_ids: Tensor
    section: Tensor
    """int64 [N]: which section a spot belongs to, as a hash of its name; the spots of one lie together"""
    counts: Tensor | None = None
    """int64 [N, G] in panel order; ``None`` where they are not known"""
    n_blocks: int = 1
    """equal blocks in F: patch widths and neighbours' means"""
    patches: Tensor | None = None
    """uint8 [P, crops, 3, px, px], upright, for models that take pixels; may lie in a file, so it is cut by no row"""
    patch_rows: Tensor | None = None
    """int64 [N]: where in ``patches`` a spot's lie; ``None``: in the order of the spots"""
    sample_of: AllSpots | None = None
    """all the training spots, where these are a sample of them"""

    def __len__(self) -> int:
        return len(self.features)

    @property
    def n_features(self) -> int:
        """F"""
        return self.features.shape[2]

    def rows(self, rows: Tensor) -> "Spots":
        """Those spots alone, in the order of ``rows``: places int64 [n] or a mask bool [N]; the patches stay where they
        are."""
        own = {name: t for name, t in vars(self).items() if isinstance(t, Tensor) and name != "patches"}
        if self.patches is not None and self.patch_rows is None:
            own["patch_rows"] = torch.arange(len(self))
        kept: dict[str, Any] = {name: t[rows] for name, t in own.items()}
        return replace(self, **kept, sample_of=None)

    def sample(self, n: int) -> "Spots":
        """``n`` of the spots, the same every time, spread over all sections alike; themselves where they are no
        more."""
        return self if len(self) <= n else replace(self.rows(spread(len(self), n)), sample_of=self)

    def parts(self) -> "Iterator[Spots]":
        """All training spots, part by part: of a sample, those that it was drawn from."""
        if self.sample_of is not None:
            yield from self.sample_of.parts()
        else:
            yield from (self.rows(rows) for rows in torch.arange(len(self)).split(_PART))

    def counts_by_part(self) -> Iterator[Tensor]:
        """Counts alone [n, G] of all training spots, part by part."""
        assert self.counts is not None
        yield from self.counts.split(_PART) if self.sample_of is None else self.sample_of.counts_by_part()

    def largest_counts(self) -> Tensor:
        """[G]: of each gene over all training spots."""
        return torch.stack([counts.amax(dim=0) for counts in self.counts_by_part()]).amax(dim=0)

    def batch(self, rows: Tensor | slice = slice(None), view: Tensor | None = None) -> Batch:
        """Spots as a batch: the mean of their views and the upright patches, or the given ``view`` [B] of each
        (training draws one)."""
        views = self.features[rows]
        # added view by view: a reduction may round differently in another batch
        features = (
            sum(views.unbind(1)[1:], views[:, 0]) / views.shape[1]
            if view is None
            else views[torch.arange(len(views)), view]
        )
        counts = None if self.counts is None else self.counts[rows]
        patches = self.patches
        if patches is not None:
            patches = patches[rows if self.patch_rows is None else self.patch_rows[rows]]
            patches = patches if view is None else turned_each(patches, view)
        where = self.coords_um[rows], self.coords_unit[rows], self.spot_ids[rows]
        return Batch(features, *where, counts, self.section[rows], patches)

    @staticmethod
    def join(parts: Sequence["Spots"]) -> "Spots":
        """Spots of several sections, one after the other, without their patches."""
        columns = {n: [getattr(part, n) for part in parts] for n in vars(parts[0]) if "patch" not in n}
        joined: dict[str, Any] = {n: torch.cat(c) for n, c in columns.items() if all(isinstance(t, Tensor) for t in c)}
        return Spots(**joined, n_blocks=parts[0].n_blocks)


@dataclass
class LossOutput:
    """``total`` [] is what training descends; ``per_scale`` [K] its parts (nats per spot)."""

    total: Tensor
    per_scale: Tensor


@dataclass
class Counts:
    """A prediction for B spots."""

    point: Tensor
    """int64 [B, G]: integer counts"""
    decode: str
    """how ``point`` was made"""
    layers: dict[str, Tensor] = field(default_factory=dict)
    """float32 [B, G] each: those of ``Decoding.layers`` that the model has"""

    def to(self, device: torch.device | str) -> "Counts":
        """The prediction on another device."""
        return Counts(self.point.to(device), self.decode, {name: v.to(device) for name, v in self.layers.items()})

    def first(self, n: int) -> "Counts":
        """The first ``n`` spots alone."""
        return Counts(self.point[:n], self.decode, {name: values[:n] for name, values in self.layers.items()})

    @staticmethod
    def join(parts: Sequence["Counts"]) -> "Counts":
        """Batches of one prediction, one after the other."""
        layers = {name: torch.cat([part.layers[name] for part in parts]) for name in parts[0].layers}
        return Counts(torch.cat([part.point for part in parts]), parts[0].decode, layers)

    @staticmethod
    def from_log2(values: Tensor) -> "Counts":
        """Of a method that predicts log2(1 + count) [B, G]; what is below zero is raised to it, and what is beyond any
        count of 31 bits lowered."""
        log1p = values.clamp(min=0, max=_MOST_LOG2) * LN2
        return Counts(torch.expm1(log1p).round().long(), "mean", {"log1p_mean": log1p})


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a method is, beside its original: printed by ``genar models NAME``."""

    title: str
    """name, authors, year, paper"""
    target: str
    """what the original predicts, and how that became log2(1 + count) here"""
    kept: str
    """what is kept of the original"""
    lost: str = ""
    """what is lost when features stand in for pixels"""
    mended: str = ""
    """faults of the official code that were not repeated"""


class Model(nn.Module, abc.ABC):
    """A method that predicts counts from features.

    ``prepare`` sees the training spots once: closed-form methods are fitted there and have ``gradient`` false; for
    the others it sets constants, and training descends ``loss``. Everything learned is in the state dict.
    """

    gradient: ClassVar[bool] = True
    decodings: ClassVar[tuple[str, ...]] = ("mean",)
    can_stream: ClassVar[bool] = False
    """whether it can be trained on more spots than memory holds: of more than ``PREPARED_SPOTS``, ``create`` and
    ``prepare`` then see a sample, whose ``parts`` are all"""
    sums: ClassVar[bool] = False
    """whether its loss is the sum over a batch's spots, and a larger batch a longer step; else it is the mean"""
    compares: ClassVar[bool] = False
    """whether its loss compares the spots of a batch, so that shares of it, one a process, are another thing"""
    unit: ClassVar[str] = "spot"
    """what a batch holds: any ``spot``, or all spots of one ``section``, which may then attend to each other"""
    inputs: ClassVar[tuple[str, ...]] = ("features",)
    """what it can be trained on: ``features``, ``patches``"""
    crops: ClassVar[tuple[float, ...]] = (1.0,)
    """the patches of a spot that it takes, as multiples of the patch's width"""
    crop_px: ClassVar[int] = 224
    """side of each"""
    patch_settings: ClassVar[Mapping[str, Any]] = {}
    """settings of preset ``small`` that differ where it is trained on patches: pixels take more memory"""
    train_defaults: ClassVar[Mapping[str, Any]] = {}
    """its own training recipe: fields of ``TrainConfig`` that differ from the default"""
    input_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """by preset, what it sees of a spot beyond one patch: fields of ``features.Inputs``"""
    decoding_defaults: ClassVar[Mapping[str, Any]] = {}
    """fields of ``Decoding`` that differ from the default of a prediction"""
    decodes_by: ClassVar[tuple[str, ...]] = ()
    """fields of ``Decoding`` that it looks at beside ``decode`` and ``layers``: how it draws"""
    card: ClassVar[Card | None] = None
    n_features: int
    """F of the features that it takes; 0 where it reads pixels"""

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(chain(self.parameters(), self.buffers())).device

    @classmethod
    def settings_types(cls) -> dict[str, Any]:
        """Name and type of each setting that a user may give."""
        return {}

    @classmethod
    def check_decoding(cls, preset: str, settings: Mapping, how: Decoding) -> None:
        """Refuse, before it is trained, what a model of these settings cannot decode. Raises ``InputError``."""
        if how.decode not in cls.decodings:
            raise InputError(f"the model decodes by {', '.join(cls.decodings)}, not by {how.decode!r}")

    def decodes_by_of(self, how: Decoding) -> tuple[str, ...]:
        """Those of ``decodes_by`` that change something beside the others of ``how``."""
        return self.decodes_by

    def cost(self, n_spots: int, how: Decoding) -> str:
        """A line to tell before a prediction that will take long; empty for all others."""
        return ""

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> "Checkpoint":
        """The checkpoint at a folder, in a training run, or of ``organisation/name`` on the Hugging Face hub.

        It holds the model, and the panel and the encoder's recipe that a prediction needs. Raises ``InputError`` as
        ``checkpoint.load_checkpoint`` does, and where it is another kind of model.
        """
        from genar.models.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(source, revision=revision)
        if not isinstance(checkpoint.model, cls):
            raise InputError(
                f"{source}: holds a model {checkpoint.name}, not {cls.__name__}; genar.load_checkpoint reads any"
            )
        return checkpoint

    def upgraded(self, state: dict[str, Tensor], version: int) -> dict[str, Tensor]:
        """Tensors of a checkpoint of format ``version`` as this release names and shapes them."""
        return state

    @property
    def mask_bytes(self) -> int:
        """About how much memory the masks of a model's attention take, by its configuration alone; 0 without any."""
        return 0

    @property
    def spot_bytes(self) -> int:
        """About how much memory the activations of one spot take in training; 0 where it is next to nothing."""
        return 0

    @abc.abstractmethod
    def prepare(self, spots: Spots) -> None:
        """Fit, or set constants, on the training spots (with counts)."""

    @abc.abstractmethod
    def predict(self, batch: Batch, how: Decoding = DEFAULT) -> Counts:
        """Counts of the batch's spots, decoded as ``how`` says (``how.decode`` is one of ``decodings``).

        Where ``unit`` is ``spot``, the result for a spot depends on no other spot of the batch; where it is
        ``section``, the batch holds all spots of one section.
        """

    def predict_sections(self, batch: Batch, how: Decoding = DEFAULT) -> Counts:
        """Counts of spots of one or more sections, each section by itself where that is the model's unit."""
        if self.unit == "spot":
            return self.predict(batch, how)
        return Counts.join([self.predict(section, how) for section in batch.sections()])

    def section_steps(self, n_spots: int) -> int:
        """Training steps an epoch of a section of so many spots, where ``unit`` is ``section``."""
        return 1

    def loss(self, batch: Batch) -> LossOutput:
        """Training loss; closed-form methods have none."""
        raise NotImplementedError

    @classmethod
    @abc.abstractmethod
    def check_settings(cls, preset: str, settings: Mapping, n_genes: int | None = None) -> None:
        """Refuse a preset or settings that the model does not know, or that do not suit ``n_genes`` (once known).

        Raises ``InputError``; called before any long work.
        """

    @classmethod
    def idle_settings(cls, preset: str, settings: Mapping) -> dict[str, str]:
        """Those of ``settings`` that do nothing, and beside what; they were checked."""
        return {}

    @classmethod
    @abc.abstractmethod
    def create(cls, n_features: int, spots: Spots, preset: str, settings: Mapping) -> "Model":
        """A model with fresh weights for these training spots."""

    @abc.abstractmethod
    def facts(self) -> dict:
        """Configuration and structure, as written to a checkpoint; :meth:`from_facts` is its inverse."""

    @classmethod
    @abc.abstractmethod
    def from_facts(cls, facts: dict) -> "Model":
        """A model of this structure with fresh weights. Raises ``InputError`` where ``facts`` do not fit."""


class ClosedForm(Model):
    """A model that :meth:`prepare` fits at once: linear in the features or blind to them, without settings."""

    gradient = False

    def __init__(self, n_features: int, n_genes: int):
        super().__init__()
        self.n_features, self.n_genes = n_features, n_genes

    @classmethod
    def check_settings(cls, preset: str, settings: Mapping, n_genes: int | None = None) -> None:
        """It has none, and one preset."""
        name = cls.__name__.lower()
        if preset != "small":
            raise InputError(f"model {name}: preset {preset!r} is not known; expected small")
        if settings:
            raise InputError(f"model {name} has no settings, found {', '.join(settings)}")

    @classmethod
    def create(cls, n_features: int, spots: Spots, preset: str, settings: Mapping) -> "ClosedForm":
        """Sized for these spots."""
        assert spots.counts is not None
        return cls(n_features, spots.counts.shape[1])

    def facts(self) -> dict:
        """Its two sizes."""
        return {"n_features": self.n_features, "n_genes": self.n_genes}

    @classmethod
    def from_facts(cls, facts: dict) -> "ClosedForm":
        """Inverse of :meth:`facts`."""
        return cls(facts["n_features"], facts["n_genes"])


def spread(n_all: int, n: int) -> Tensor:
    """int64 [n], rising: one of each of ``n`` equal runs of ``n_all`` rows, the same every time."""
    edges = torch.arange(n + 1) * n_all // n
    place = torch.rand(n, generator=torch.Generator().manual_seed(n_all), dtype=torch.float64)
    return edges[:-1] + (place * (edges[1:] - edges[:-1])).long()


def turned(x: Tensor, view: int) -> Tensor:
    """One of the 8 flips and turns of [..., H, W], in the order of the stored features' views: ``view`` % 4 quarter
    turns, mirrored from 4 on."""
    x = torch.rot90(x, view % 4, dims=(-2, -1))
    return x.flip(-1) if view >= 4 else x


def turned_each(x: Tensor, views: Tensor) -> Tensor:
    """Each of x [B, ..., px, px] in its own of the 8 ``views`` int64 [B]."""
    out = torch.empty_like(x)
    for view in views.unique().tolist():
        rows = views == view
        out[rows] = turned(x[rows], view)
    return out


def log2p1(counts: Tensor) -> Tensor:
    """log2(1 + count), the space in which the paper scores."""
    return torch.log2(1 + counts.float())


def duration(seconds: float) -> str:
    """For a line that tells how long something takes.

    >>> duration(80), duration(600), duration(9000)
    ('80 seconds', '10 minutes', '2.5 hours')
    """
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def uniforms(spot_ids: Tensor, seed: int, samples: int, n: int) -> Tensor:
    """float32 [B, S, n] in (0, 1), from seed and spot alone, so that a batch's make-up changes no draw.

    A Latin hypercube over the S samples: each column has one value in each of S equal slices, which makes averages over
    few trajectories steadier. Each value by itself is uniform.
    """
    draws = np.empty((len(spot_ids), samples, n), np.float32)
    for i, spot in enumerate(spot_ids.tolist()):
        random = np.random.Generator(np.random.Philox(key=[seed, spot]))
        slices = random.random((samples, n)).argsort(axis=0)
        draws[i] = (slices + random.random((samples, n))) / samples
    return torch.from_numpy(draws)
