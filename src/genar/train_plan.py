"""What a training run was asked for, and whether what an earlier start left of it may be gone on with."""

import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from genar import defaults, encoders
from genar.data.door import door, read_json
from genar.data.files import json_ready, write_text
from genar.errors import InputError
from genar.features import FeatureRecipe, Inputs
from genar.genes import RECIPES, refuse_number
from genar.models import model_class
from genar.settings import Settings
from genar.training_config import RESUME_FILE

BASELINES = ("mean", "ridge")


@dataclass(frozen=True)
class TrainPlan:
    """What ``genar train`` was asked for.

    Raises ``InputError`` where an encoder, a precision, a panel or a combination of them is not known.
    """

    sections: Path
    """folder of the sections"""
    test: tuple[str, ...]
    """those held out"""
    out: Path
    """folder of the run"""
    model: str = defaults.MODEL
    _: KW_ONLY
    preset: str = defaults.PRESET
    recipe: str = defaults.RECIPE
    """training recipe: ``default`` or ``paper``"""
    panel: str = defaults.PANEL
    """a panel recipe or a file"""
    n_genes: int | None = None
    """of a selected panel, 200 where not given; a file is taken whole"""
    encoder: str = defaults.ENCODER
    weights: Path | None = None
    """file or folder of the encoder's, where not the published ones are meant"""
    patch: str = defaults.PATCH
    views: int = defaults.VIEWS
    """1 or 8 flips and turns of a patch; 0 for the encoder's default"""
    features: Path | None = None
    """folder of the feature stores; ``$GENAR_FEATURES`` or the user's cache where not given"""
    mpp: float | None = None
    """pixel size, um per px, where the sections do not state the right one"""
    device: str = "cpu"
    """of the encoder, the training and the prediction, as ``machine.device`` gives it"""
    settings: Settings = field(default_factory=Settings)
    beside: tuple[str, ...] = BASELINES
    """methods fitted and scored on the same spots and features"""
    maps: bool = True
    """whether pictures of the held-out sections are drawn"""
    only: tuple[str, ...] = ()
    """sections that take part; empty: all of the folder"""
    image: Path | None = None
    """folder of full-resolution images called ``<id>.tif``, for formats that come without"""
    bin_um: float | None = None
    """width of the spots of Visium HD, um"""
    input: str = defaults.INPUT
    """``features`` of an encoder, or ``patches``: the model end to end on pixels, without one"""
    encoder_precision: str = defaults.PRECISION
    """of the encoder's arithmetic: features of another precision are another store"""
    devices: int | None = None
    """processes of a machine that share the training; as torchrun or srun started them, else 1"""
    num_nodes: int | None = None
    """machines"""

    def __post_init__(self):
        for name in ("n_genes", "views", "devices", "num_nodes"):
            if (value := getattr(self, name)) is not None and not isinstance(value, Integral):
                raise InputError(f"{name} must be a whole number, found {value!r}")
        encoders.check_name(self.encoder)
        encoders.check_precision(self.encoder_precision)
        for name in self.beside:
            model_class(name)
        if self.panel not in RECIPES and not Path(self.panel).is_file():
            raise InputError(f"--panel {self.panel}: no such file, and none of the recipes {', '.join(RECIPES)}")
        if Path(self.panel).is_file():
            refuse_number(self.n_genes, self.panel)
        elif self.n_genes is None:
            object.__setattr__(self, "n_genes", defaults.N_GENES)
        self.inputs.recipes(FeatureRecipe(self.encoder, "", self.patch, views=self.views or 1))

    @property
    def inputs(self) -> Inputs:
        """What the model sees of a spot: as the settings say, else its own default where patches of any width can be
        shown to the encoder."""
        shown = self.input == "features" and self.patch == "hest" and not self.encoder.startswith(encoders.IMPORTED)
        own = model_class(self.model).input_defaults.get(self.preset, {}) if shown else {}
        return Inputs(**{**own, **self.settings.inputs})


_PLACES = ("sections", "features", "weights", "image")  # the same from whatever folder the command is started


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What two plans of one run have in common, a value each: not where it lies, which of the GPUs a process has, nor
    the name of its panel, whose genes are compared."""
    plan = {**plan, "device": str(plan.get("device", "")).partition(":")[0]}
    parts = plan["settings"].items()
    settings = {f"{part}.{name}": value for part, values in parts for name, value in values.items()}
    return {name: value for name, value in plan.items() if name not in ("out", "panel", "settings")} | settings


def _unfinished(mark: Path) -> tuple[dict, dict[str, Any]]:
    """What a run found so far, and its plan."""
    what = ("record of the unfinished run", "delete its folder, or choose another --out")
    facts = read_json(mark, *what)
    with door(mark, *what):
        return dict(facts.pop("found", {})), _flat(facts)


def claim_resume(plan: TrainPlan, **found) -> Path:
    """Folder of the resume file. The plan and what it ``found`` so far are left there, so that no other goes on from
    it."""
    folder = plan.out / "resume"
    facts = asdict(plan) | {name: path.resolve() for name in _PLACES if (path := getattr(plan, name))}
    mine, found = json.loads(json.dumps(json_ready([facts, found])))
    mark, kept = folder / "plan.json", {}
    if (folder / RESUME_FILE).exists():
        kept, there = _unfinished(mark)
        if other := [name for name in found if found[name] != kept.get(name)]:
            raise InputError(
                f"{plan.out}: holds an unfinished run with other {' and '.join(other)}; repeat it as it was, or choose "
                "another --out"
            )
        here = _flat(mine)
        if other := [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]:
            told = "; ".join(
                f"{name} {json.dumps(there.get(name))} there, {json.dumps(here.get(name))} here" for name in other[:3]
            )
            raise InputError(
                f"{plan.out}: holds an unfinished run with other settings ({told}{'; …' if len(other) > 3 else ''}); "
                "repeat those, or choose another --out"
            )
    write_text(mark, json.dumps({**mine, "found": {**kept, **found}}, sort_keys=True, indent=1) + "\n")
    return folder
