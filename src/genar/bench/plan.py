"""The runs of a recipe: which sections are held out together, what is trained where, and what is missing for it."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from anndata import AnnData

from genar import defaults, encoders
from genar.bench.recipe import Cohort, Method, Recipe
from genar.data import ReadOptions, SectionRef, find_sections, options_for
from genar.data.door import read_json
from genar.data.files import json_ready, stores_of
from genar.data.reading import named_image
from genar.errors import InputError, first_names
from genar.evaluation.protocol import Fold, folds
from genar.features import Inputs, default_store
from genar.genes import ORDERS
from genar.settings import Settings
from genar.train_plan import TrainPlan

_LONGEST = 80  # characters of a fold's name in that of its folder


@dataclass(frozen=True)
class Run:
    """One training: a method on the sections outside of a fold."""

    cohort: Cohort
    method: Method
    fold: Fold
    seed: int
    plan: TrainPlan

    @property
    def done(self) -> bool:
        """Whether it was finished before."""
        return (self.plan.out / "run.json").exists()

    @property
    def label(self) -> str:
        """What is said when it starts."""
        where = f"{self.cohort.name}: " if self.cohort.name else ""
        return f"{where}{self.method.name}, {', '.join(self.fold.test)} held out, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """All runs of a recipe, and where its sections lie."""

    recipe: Recipe
    data: Path | None
    out: Path
    features: Path | None
    runs: tuple[Run, ...]
    refs: Mapping[str, Mapping[str, SectionRef]]
    """cohort -> section -> where it lies, for those that were found"""
    read: Mapping[str, Any] = field(default_factory=dict)
    """how its sections are read, where that is not the default: ``image``, ``mpp``, ``bin_um``"""

    @cached_property
    def options(self) -> ReadOptions:
        """How all sections are read. Raises ``InputError`` where one image is named for several of them."""
        return options_for([ref for refs in self.refs.values() for ref in refs.values()], **self.read)

    def section(self, cohort: str, section: str) -> AnnData:
        """One section, as the runs read it."""
        return self.refs[cohort][section].read(self.options)

    @property
    def waiting(self) -> dict[Path, Run]:
        """Folder -> run, for those that are not finished; methods that differ in their name alone share one."""
        return {run.plan.out: run for run in self.runs if not run.done}

    def missing(self) -> list[str]:
        """A line for each thing without which the runs that wait cannot be made: sections, images, features, weights.

        Nothing is downloaded.
        """
        if not self.waiting and self.recipe.groups is None:
            cohorts = [
                cohort for cohort in self.recipe.cohorts if not set(cohort.sections) <= set(self.refs[cohort.name])
            ]
        else:
            cohorts = list(self.recipe.cohorts)
        lines = [line for cohort in cohorts for line in _missing_sections(cohort, self.refs[cohort.name], self.data)]
        used: dict[str, set[str]] = {}
        for run in self._embedding():
            used.setdefault(run.method.encoder, set()).add(run.cohort.name)
        for encoder, names in used.items():
            refs = [ref for name in names for ref in self.refs[name].values()]
            lines += _missing_features(encoder, refs, self.features or default_store(), self.options)
        return lines

    def _embedding(self) -> list[Run]:
        """Those to come that read features; others read pixels, and need no encoder."""
        return [run for run in self.waiting.values() if run.plan.input == "features"]

    def downloads(self) -> list[str]:
        """Encoders whose weights are not here but open to all."""
        used = dict.fromkeys(run.method.encoder for run in self._embedding())
        return [name for name in used if encoders.weights_state(name) == "open"]


def plan_runs(
    recipe: Recipe,
    data: Path | None,
    out: Path,
    features: Path | None = None,
    device: str = "cpu",
    *,
    read: Mapping[str, Any] | None = None,
) -> Plan:
    """Every run of the recipe: each method on each fold of each cohort, with each seed where a seed changes it.

    ``read`` holds fields of ``ReadOptions``: ``image``, ``mpp`` (um per px), ``bin_um`` (um).
    Raises ``InputError`` where the protocol cannot be followed.
    """
    runs = []
    refs = {cohort.name: _find(cohort, data) for cohort in recipe.cohorts}
    recipe = replace(recipe, cohorts=tuple(_with_patients(cohort, refs[cohort.name]) for cohort in recipe.cohorts))
    read = {name: value for name, value in (read or {}).items() if value not in (None, getattr(ReadOptions, name))}
    for cohort in recipe.cohorts:
        paper = (cohort.paper,) if cohort.paper else ()
        cut = folds(recipe.protocol, cohort.sections, held_out=recipe.held_out, paper=paper, k=recipe.k)
        if len({_leaf(fold) for fold in cut}) < len(cut):
            raise InputError(f"two folds would lie in one folder: {', '.join(fold.name for fold in cut)}; rename one")
        for method in recipe.methods:
            own = [fold for fold in cut if not method.held_out or set(fold.test) <= set(method.held_out)]
            for fold in cut:
                if fold not in own and (some := set(fold.test) & set(method.held_out)):
                    raise InputError(
                        f"method {method.name!r}: its held_out names {', '.join(sorted(some))} alone, and fold "
                        f"{fold.name} holds out {', '.join(fold.test)} together; name all of them, or none"
                    )
            if not own:
                raise InputError(
                    f"method {method.name!r}: its held_out {', '.join(method.held_out)} makes no fold of the recipe's"
                )
            for fold in own:
                for seed in recipe.seeds if method.seeded else recipe.seeds[:1]:
                    plan = _train_plan(recipe, cohort, method, fold, seed, data or Path(), out, features, read)
                    runs.append(Run(cohort, method, fold, seed, replace(plan, device=device)))
    for cohort in recipe.cohorts if recipe.figure else ():
        figure_section(recipe, cohort, runs)
    return Plan(recipe, data, out, features, tuple(runs), refs, read)


def _with_patients(cohort: Cohort, refs: Mapping[str, SectionRef]) -> Cohort:
    """The cohort with the patients that the data know and the recipe does not."""
    known = {s: patient or (refs[s].patient if s in refs else "") for s, patient in cohort.sections.items()}
    return replace(cohort, sections=known)


def figure_section(recipe: Recipe, cohort: Cohort, runs: Sequence[Run]) -> str:
    """The section of a cohort that is drawn. ``InputError`` where it is not held out for each method of the figure."""
    assert recipe.figure is not None
    asked, names = recipe.figure.section, recipe.figure.methods
    held = {name: [] for name in names}
    for run in runs:
        if run.cohort.name == cohort.name and run.method.name in held:
            held[run.method.name] += run.fold.test
    shared = [section for section in held[names[0]] if all(section in sections for sections in held.values())]
    if not shared or (asked and asked not in shared):
        what = f"section {asked!r} is not" if asked else "no section is"
        of_all = f"; held out for all of them: {first_names(list(dict.fromkeys(shared)))}" if shared else ""
        raise InputError(f"figure: {what} held out for each of {', '.join(names)}, which it draws{of_all}")
    return asked or shared[0]


def folder_of(cohort: Cohort, data: Path) -> Path:
    """Where a cohort's sections lie: the folder of its data set in ``data``, whatever the case of its name, or
    ``data`` itself."""
    if cohort.name and data.is_dir():
        for path in sorted(data.iterdir()):
            if path.is_dir() and path.name.lower().replace("-", "_") == cohort.name:
                return path
    return data


def _train_plan(
    recipe: Recipe, cohort: Cohort, method: Method, fold: Fold, seed: int, data: Path, out: Path, features, read
):
    own = method.settings
    settings = Settings(own.model, {**own.train, "seed": seed}, {"decode": "mean", **own.decoding}, own.inputs)
    others = tuple(s for s in cohort.sections if s not in fold.test)
    n_genes = None if Path(cohort.panel).is_file() else recipe.n_genes
    plan = TrainPlan(
        folder_of(cohort, data), fold.test, out, method.model, preset=method.preset, recipe=method.recipe,
        panel=cohort.panel, n_genes=n_genes, encoder=method.encoder, views=method.views, features=features,
        settings=settings, beside=(),
        maps=False, only=(*others, *fold.test), input=own.model.get("input", "features"), **read,
    )  # fmt: skip
    folder = _folder(recipe, cohort, method, plan.inputs, {name: read[name] for name in read if name != "image"})
    return replace(plan, out=out / "runs" / folder / f"{_leaf(fold)}-{seed}")


def _leaf(fold: Fold) -> str:
    """Name of a fold's folder: with a hash of the sections where its own does not say which are held out."""
    leaf = _slug(fold.name)
    if fold.test == (fold.name,) and len(leaf) <= _LONGEST:
        return leaf
    return f"{leaf[:_LONGEST]}-{hashlib.sha256(json.dumps(sorted(fold.test)).encode()).hexdigest()[:8]}"


def _folder(recipe: Recipe, cohort: Cohort, method: Method, inputs: Inputs, read: Mapping[str, float]) -> str:
    """Name of the folder of a method's runs: what changes a run changes it, and nothing else: no method's name, no
    place of a file; views and how sections are read where a user says it."""
    facts = {key: value for key, value in asdict(method).items() if key not in ("name", "held_out")}
    if method.views == defaults.VIEWS:
        del facts["views"]
    facts |= {"inputs": asdict(inputs), **read}
    order = method.settings.model.get("order")
    if isinstance(order, str) and order not in ORDERS:  # what the file says, wherever it lies
        facts["settings"]["model"]["order"] = hashlib.sha256(Path(order).read_bytes()).hexdigest()
    panel = Path(cohort.panel)
    genes = hashlib.sha256(panel.read_bytes()).hexdigest() if panel.is_file() else [cohort.panel, recipe.n_genes]
    made_of = json_ready({**facts, "panel": genes, "sections": sorted(cohort.sections)})
    return f"{method.model}-{hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:8]}"


def _slug(text: str) -> str:
    """Fit for a folder."""
    return re.sub("[^A-Za-z0-9+]+", "-", text).strip("-")


def _find(cohort: Cohort, data: Path | None) -> dict[str, SectionRef]:
    folder = None if data is None else folder_of(cohort, data)
    if folder is None or not folder.is_dir():
        return {}
    try:
        return {ref.id: ref for ref in find_sections(folder) if ref.id in cohort.sections}
    except InputError:  # no section there at all: each is missing
        return {}


def _missing_sections(cohort: Cohort, refs: Mapping[str, SectionRef], data: Path | None) -> list[str]:
    lines = []
    if absent := [section for section in cohort.sections if section not in refs]:
        where = "no --data given" if data is None else f"looked in {folder_of(cohort, data)}"
        how = (
            f"`genar fetch {cohort.name} --out DIR/{cohort.name}` fetches them" if cohort.name else "name their folder"
        )
        found = f"{len(absent)} of {len(cohort.sections)} sections ({first_names(absent)}), {where}; {how}"
        lines.append(f"{cohort.name}: {found}" if cohort.name else found)
    return lines


def _missing_features(encoder: str, refs: Sequence[SectionRef], store: Path, options: ReadOptions) -> list[str]:
    """Weights, images or imported features that this encoder lacks."""
    if encoder.startswith(encoders.IMPORTED):
        name = encoder.removeprefix(encoders.IMPORTED)
        if not (absent := [ref.id for ref in refs if not _has_features(store, ref.id, encoder)]):
            return []
        how = f"`genar features DIR --import FOLDER --encoder {name} --out {store}` brings them in"
        return [f"features {encoder} of {len(absent)} sections ({first_names(absent)}) in {store}; {how}"]
    lines = _missing_images(refs, options)
    state = encoders.weights_state(encoder)
    if state in ("gated", "offline"):
        hub = encoders.hub_of(encoder)
        ask = f"ask for access at https://huggingface.co/{hub} and `hf auth login`, then " if state == "gated" else ""
        lines.append(f"weights of encoder {encoder}, not in the hub's cache; {ask}`hf download {hub}`")
    return lines


def _missing_images(refs: Iterable[SectionRef], options: ReadOptions) -> list[str]:
    """A line for the sections without an image, and one for each that cannot be read so."""
    bare, lines = [], []
    for ref in refs:
        try:
            named_image(ref.id, options)
        except InputError:  # the folder has none of this section
            bare.append(ref)
            continue
        try:
            if ref.image(options) is None:
                bare.append(ref)
        except InputError as error:
            lines.append(str(error))
    if bare:
        where = options.image or (bare[0].root / "wsis" if bare[0].format == "hest" else None)
        how = f" in {where}" if where else "; pass --image FOLDER that holds <id>.tif of each"
        lines.insert(0, f"images of {len(bare)} sections ({first_names([ref.id for ref in bare])}){how}")
    return lines


def _has_features(store: Path, section: str, encoder: str) -> bool:
    heads = (read_json(path / "zarr.json", "feature store") for path in stores_of(section, store))
    facts = (head.get("attributes", {}) for head in heads)
    return any((one.get("section"), one.get("encoder")) == (section, encoder) for one in facts)
