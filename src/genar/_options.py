"""What the commands share: their options, and how a flag and a wrong word are shown."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from genar import _console, defaults
from genar.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, last on standard output.")]
Mpp = Annotated[float | None, typer.Option(help="Pixel size in um per px; overrides the metadata.")]
Image = Annotated[
    Path | None, typer.Option(help="Full-resolution image of the section, or a folder of them called <id>.tif.")
]
BinUm = Annotated[float | None, typer.Option(help="Visium HD: width of the pooled spots, um (default: 56).")]
SpacingUm = Annotated[
    float | None,
    typer.Option(help="Bare slides: distance between spots, um (default: as in the model's training, else 100)."),
]
Hexagonal = Annotated[
    bool | None,
    typer.Option("--hexagonal/--square", help="Bare slides: array of the spots (default: the model's, else square)."),
]
Store = Annotated[
    Path | None,
    typer.Option("--features", help="Folder of the feature stores (default: $GENAR_FEATURES, or your cache)."),
]
Weights = Annotated[Path | None, typer.Option(help="Encoder weights, a file or a folder, instead of the hub's.")]
Patch = Annotated[str, typer.Option(help="Patch convention: hest, genar or stem.")]
Views = Annotated[int, typer.Option(help="1 or 8 flips and turns; 0 for the encoder's default.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes.")]
SectionDir = Annotated[str, typer.Argument(help="Folder of sections; the format is told from what it holds.")]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Trajectories averaged in the expectation (default: 16; stem: 5).")
]
Device = Annotated[str, typer.Option(help="Of encoder and model: auto, cpu, cuda, cuda:1, mps.")]
OneSection = Annotated[str, typer.Argument(help="One section: its own file or folder, or FOLDER:ID.")]

_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])  # typer carries a click of its own, or not


class Command(TyperCommand):
    """Shows a flag as one: typer gives it the type of a value."""

    def get_params(self, ctx: Any) -> list:
        """Its options, flags without a type."""
        return _plain(super().get_params(ctx))


class Group(TyperGroup):
    """All commands; what none of them understands is told as JSON, too, where that was asked for."""

    def get_params(self, ctx: Any) -> list:
        """Its options, flags without a type."""
        return _plain(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            if "--json" in sys.argv:
                _console.tell_wrong(error.format_message())  # pyright: ignore
            raise


def refuse_beside(what: str, options: Mapping[str, object]) -> None:
    """``InputError`` where options are given that mean nothing beside ``what``."""
    if unused := [name for name, value in options.items() if value not in (None, "")]:
        raise InputError(f"{what}: {', '.join(unused)} would do nothing here; leave it out")


def refuse_beside_patches(**options) -> None:
    """``InputError`` where options of features are given beside ``--input patches``, and are not their defaults."""
    usual = {"encoder": defaults.ENCODER, "views": defaults.VIEWS, "encoder_precision": defaults.PRECISION}
    given = {f"--{name.replace('_', '-')}": (value, usual.get(name)) for name, value in options.items()}
    refuse_beside("--input patches (no encoder looks at them)", changed(given))


def changed(options: Mapping[str, tuple[object, object]]) -> dict[str, object]:
    """The options, each a value and its default, whose value is another than that."""
    return {name: value for name, (value, usual) in options.items() if value != usual}


def given(**options) -> dict:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def numbers(text: str, option: str) -> list[float]:
    """Numbers of a list with commas. Raises ``InputError`` naming the ``option``."""
    try:
        return [float(part) for part in ids(text)]
    except ValueError as error:
        raise InputError(f"{option}: expected numbers such as 112,309, found {text!r}") from error


def ids(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _plain(params: list) -> list:
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params
