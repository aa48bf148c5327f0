"""The same plan on simulated sections with tiny models and encoders: a recipe's whole path within seconds."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from genar.bench.recipe import Cohort, FigureOfRecipe, Method, Recipe
from genar.data import find_sections
from genar.data.files import write_text
from genar.data.simulate import TissueConfig, write_tissue
from genar.genes import DROPPED_PREFIXES, default_sizes
from genar.settings import Settings

SECTIONS = {"TOY1": "TOY1", "TOY2": "TOY2"}
"""Simulated section -> patient, called alike, so that folds by section and by patient share their runs; the first
stands for the paper's held-out section."""
N_GENES = 25
TISSUE = TissueConfig(n_rows=4, n_cols=5, n_genes=110, counts_per_nucleus=20.0)  # small counts: few classes
_PAPER_GENES = 200
_ENCODERS = {"resnet18": "narrow_encoder", "import:conch": "middle_encoder"}
_SMALL = {"width": 16, "depth": 1, "heads": 2}
TINY: Mapping[str, Mapping] = {
    "genar": {**_SMALL, "max_count": 31},
    "egn": {**_SMALL, "mlp_width": 16, "bridge_heads": 2, "bridge_width": 8},
    "foundation": {"width": 16, "max_count": 31},
    "hist2st": {**_SMALL, "head_width": 8, "hidden": 16, "graph_layers": 2, "copies": 1},
    "histogene": {**_SMALL, "head_width": 8, "hidden": 16},
    "m2ost": {**_SMALL, "hidden": 16, "gate_hidden": 16},
    "stem": {**_SMALL, "mlp_ratio": 1.0},
    "triplex": {"width": 16, "depths": (1, 1, 1), "heads": (2, 2, 2)},
}
"""Model -> settings that make it tiny; one that is not named keeps those of its preset."""


def make_toy(recipe: Recipe, folder: Path) -> tuple[Recipe, Path, Path]:
    """The toy of a recipe, the folder of its simulated sections and that of their features, all under ``folder``.

    Sections become two simulated ones, the panel 25 of their genes, encoders tiny networks; one seed, one epoch and, of
    protocol ``section``, one fold stay, of a figure one gene. What is not of the size stays: methods, protocol, tables,
    groups.
    """
    tissue = folder / "sections"
    if not all((tissue / "st" / f"{section}.h5ad").is_file() for section in SECTIONS):
        write_tissue(tissue, tuple(SECTIONS), seed=1, config=TISSUE)
    genes = _genes(tissue)
    write_text(folder / "panel.txt", "\n".join(genes) + "\n")
    toy = replace(
        recipe, title=f"{recipe.title} (toy: simulated tissue, not a result)", name=f"{recipe.name}_toy",
        n_genes=N_GENES, seeds=recipe.seeds[:1],
        cohorts=tuple(_cohort(cohort, folder / "panel.txt") for cohort in recipe.cohorts),
        methods=tuple(toy_method(method) for method in recipe.methods), k=2,
        held_out=tuple(SECTIONS)[:1] if recipe.protocol == "section" else (),
        figure=_figure(recipe.figure, genes) if recipe.figure else None,
    )  # fmt: skip
    return toy, tissue, folder / "features"


def _genes(tissue: Path) -> list[str]:
    names = sorted(find_sections(tissue)[0].read().var_names)
    return [name for name in names if not name.startswith(DROPPED_PREFIXES)][:N_GENES]


def _cohort(cohort: Cohort, panel: Path) -> Cohort:
    file = str(panel) if Path(cohort.panel).is_file() else cohort.panel
    return Cohort(cohort.name, SECTIONS, file, next(iter(SECTIONS)) if cohort.paper else "")


def _figure(figure: FigureOfRecipe, genes: list[str]) -> FigureOfRecipe:
    of_cohort = {cohort: tuple(genes[:1]) for cohort in figure.genes}
    return FigureOfRecipe(of_cohort, figure.methods, next(iter(SECTIONS)) if figure.section else "")


def toy_method(method: Method) -> Method:
    """The method with tiny settings over its own; scales become those in proportion, of 25 genes."""
    own = method.settings
    model = {**own.model, **TINY.get(method.model, {})}
    if "scales" in model:
        model["scales"] = _scales(model["scales"])
    if method.model == "genar" and method.preset == "small" and own.model.get("components", 1):
        model["components"] = 4
    n_epochs = min(1, own.train.get("max_epochs", 1))
    train = {**own.train, "max_epochs": n_epochs, "warmup_steps": 0, "validate_every": 1}
    settings = Settings(model, train, {**own.decoding, "samples": 2, "steps": 2}, own.inputs)
    encoder = f"{__name__}:{_ENCODERS.get(method.encoder, 'wide_encoder')}"
    return replace(method, settings=settings, encoder=encoder, held_out=())


def _scales(sizes) -> tuple[int, ...]:
    """(1, 20, 200) -> (1, 2, 25)."""
    if tuple(sizes) == default_sizes(_PAPER_GENES):
        return default_sizes(N_GENES)
    return tuple(sorted({max(1, round(size * N_GENES / max(sizes))) for size in sizes}))


def narrow_encoder():
    """8 features of a patch: a fixed random projection of its 4 x 4 mean colours."""
    return _encoder(8)


def middle_encoder():
    """As :func:`narrow_encoder`, 12 features."""
    return _encoder(12)


def wide_encoder():
    """As :func:`narrow_encoder`, 16 features."""
    return _encoder(16)


def _encoder(width: int) -> tuple[nn.Module, dict]:
    network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, width))
    random = torch.Generator().manual_seed(width)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    return network, {"input_px": 32, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "views": 1}
