"""What the methods that GenAR is compared with share: a frozen configuration, presets, target log2(1 + count)."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from genar.errors import InputError
from genar.models._base import Model, Spots
from genar.models._training_spots import mean_and_scale

INPUTS = ("features", "patches")


def check_input(model: str, value: str) -> None:
    """Refuse what is neither ``features`` nor ``patches``."""
    if value not in INPUTS:
        raise InputError(f"model {model}: input must be one of {', '.join(INPUTS)}, found {value!r}")


def _numbers(value: Any) -> tuple[float, ...]:
    """Of a setting that is a number or some."""
    several = value if isinstance(value, list | tuple) else (value,)
    return tuple(one for one in several if isinstance(one, int | float) and not isinstance(one, bool))


_MOST = 1_000_000  # of anything


class Rival(Model):
    """A published method in this package's harness: sized by a configuration and by the training data.

    A subclass names its ``config`` and, beside ``small`` (the configuration of the tables), its other ``presets``:
    ``official`` is the published size. Where it holds more than a configuration's worth of data (keys of a retrieval,
    say), :meth:`sizes` tells how much.
    """

    config: ClassVar[type]
    """a frozen dataclass, every field with a default"""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"small": {}}
    """what each changes of the configuration"""
    may_be_none: ClassVar[tuple[str, ...]] = ()
    """numbers of things that may be 0, though the default is more"""
    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, n_features: int, n_genes: int, config: Any, **sizes: int):
        super().__init__()
        self.n_features, self.n_genes, self.settings, self.own_sizes = n_features, n_genes, config, sizes
        self.register_buffer("feature_mean", torch.zeros(n_features))
        self.register_buffer("feature_scale", torch.ones(n_features))

    @torch.no_grad()
    def prepare(self, spots: Spots) -> None:
        """Set the features' mean and scale."""
        mean, scale = mean_and_scale(spots.features.mean(dim=1))
        self.feature_mean.copy_(mean)
        self.feature_scale.copy_(scale)

    def standardised(self, features: Tensor) -> Tensor:
        """Features [N, F] with the training spots' mean 0 and standard deviation 1."""
        return (features - self.feature_mean) / self.feature_scale

    @classmethod
    def sizes(cls, spots: Spots, config: Any) -> dict[str, int]:
        """Further sizes that the training spots decide, as keyword arguments of the constructor."""
        return {}

    @classmethod
    def settings_types(cls) -> dict[str, Any]:
        """The fields of its configuration."""
        return {f.name: f.type for f in fields(cls.config)}

    @classmethod
    def configure(cls, preset: str, settings: Mapping) -> Any:
        """Its configuration: ``settings`` over a preset. Raises ``InputError`` naming what is not known."""
        if preset not in cls.presets:
            known = ", ".join(cls.presets)
            raise InputError(f"model {cls._name()}: preset {preset!r} is not known; expected one of {known}")
        if unknown := sorted(set(settings) - set(cls.settings_types())):
            known = ", ".join(cls.settings_types())
            raise InputError(f"model {cls._name()} has no setting {', '.join(unknown)}; it has {known}")
        cls._refuse_sizes(settings)
        return cls.config(**{**cls.presets[preset], **settings})

    @classmethod
    def _refuse_sizes(cls, settings: Mapping) -> None:
        """Numbers of things are above 0 where the default is, other numbers not negative, rates of dropout shares."""
        defaults = {f.name: f.default for f in fields(cls.config)}
        for name, value in settings.items():
            for default, one in zip(_numbers(defaults[name]), _numbers(value), strict=False):
                least = 1 if type(default) is int and default > 0 and name not in cls.may_be_none else 0
                if not least <= one <= _MOST:
                    raise InputError(
                        f"model {cls._name()}: {name} must be at least {least} (at most {_MOST}), found {value}"
                    )
                if "dropout" in name and not one < 1:
                    raise InputError(f"model {cls._name()}: {name} must be in [0, 1), found {value}")

    @classmethod
    def check_settings(cls, preset: str, settings: Mapping, n_genes: int | None = None) -> None:
        """Settings are the fields of its configuration."""
        cls.configure(preset, settings)

    @classmethod
    def create(cls, n_features: int, spots: Spots, preset: str, settings: Mapping) -> Self:
        """Sized for these spots."""
        assert spots.counts is not None
        config = cls.configure(preset, settings)
        return cls(n_features, spots.counts.shape[1], config, **cls.sizes(spots, config))

    def facts(self) -> dict:
        """Sizes and configuration."""
        sizes = {"n_features": self.n_features, "n_genes": self.n_genes, **self.own_sizes}
        return {**sizes, "config": asdict(self.settings)}

    @classmethod
    def from_facts(cls, facts: dict) -> Self:
        """Inverse of :meth:`facts`."""
        sizes = {name: value for name, value in facts.items() if name != "config"}
        known = set(cls.settings_types())
        if unknown := set(facts["config"]) - known:
            raise InputError(f"model {cls._name()}: the checkpoint names unknown settings {', '.join(sorted(unknown))}")
        return cls(config=cls.config(**facts["config"]), **sizes)

    @classmethod
    def _name(cls) -> str:
        return cls.__module__.rpartition(".")[2]
