"""A recipe: what ``genar bench`` runs, read from a YAML file and checked before anything runs.

A recipe names data sets of the paper or sections, a panel, an encoder, methods (a model with its settings), a protocol,
seeds and pairs to compare; tables that show some of the methods beside a table of the paper; a figure; gene groups.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from importlib import resources
from pathlib import Path

from genar import defaults, encoders
from genar.data.datasets import DATASETS, dataset
from genar.data.door import door
from genar.data.yaml_text import load_yaml
from genar.errors import InputError
from genar.evaluation.protocol import PROTOCOLS
from genar.genes import RECIPES as PANEL_RECIPES
from genar.genes import gene_sets_of, read_panel
from genar.models import model_class
from genar.prediction import decoding
from genar.settings import Settings, read_settings
from genar.training import train_config_from_dict

_FIELDS = {
    "title", "sections", "patients", "datasets", "panel", "n_genes", "encoder", "views", "seeds", "protocol",
    "held_out", "k", "methods", "compare", "paper", "tables", "figure", "groups",
}  # fmt: skip
_METHOD_FIELDS = {"name", "model", "preset", "recipe", "set", "encoder", "views", "held_out"}
_TABLE_FIELDS = {"rows", "paper", "dataset"}
_FIGURE_FIELDS = {"genes", "methods", "section"}
_DATASET = "{dataset}"
_SHIPPED = (Path(), Path("recipes"))  # as the package's own may be named: recipes/NAME.yaml, NAME.yaml, NAME
_OWN_TABLES = ("runs", "differences", "by_section", "groups")
"""files of a bench that no table of a recipe may replace"""


@dataclass(frozen=True)
class Method:
    """A row of the tables."""

    name: str
    model: str
    _: KW_ONLY
    preset: str = defaults.PRESET
    recipe: str = defaults.RECIPE
    settings: Settings = field(default_factory=Settings)
    encoder: str = encoders.DEFAULT
    held_out: tuple[str, ...] = ()
    """Runs with these sections held out alone, where it is dear; () for every fold of the protocol."""
    views: int = defaults.VIEWS
    """1 or 8 flips and turns of a patch; 0 for the encoder's default"""

    @property
    def seeded(self) -> bool:
        """Whether a seed changes it."""
        return model_class(self.model).gradient


@dataclass(frozen=True)
class Cohort:
    """Sections that are trained and scored on together: a data set of the paper, or those that a recipe names."""

    name: str
    sections: Mapping[str, str]
    """Section -> patient, "" where unknown."""
    panel: str
    """A panel recipe or a file."""
    paper: str = ""
    """The section that the paper held out."""
    sisters: int = 0
    """Other sections of its patient."""


@dataclass(frozen=True)
class TableOfRecipe:
    """Some methods as rows, beside a table of the paper where there is one."""

    name: str
    rows: Mapping[str, str]
    """Row, as the paper calls it, -> method."""
    paper: str = ""
    """Number of the paper's table, "" for none."""
    dataset: str = ""
    """Data set of the paper's values; "" for the same as ours."""


@dataclass(frozen=True)
class FigureOfRecipe:
    """Maps: a row a gene, the measured section and the methods side by side."""

    genes: Mapping[str, tuple[str, ...]]
    """Cohort -> genes."""
    methods: tuple[str, ...]
    section: str = ""
    """The section that is drawn, for recipes of one cohort; "" for the first held out of each."""


@dataclass(frozen=True)
class GroupsOfRecipe:
    """Panel lists and group tables, beside the paper's where files of them are named ("" for none)."""

    genes: str = ""
    groups: str = ""


@dataclass(frozen=True)
class Recipe:
    """What ``genar bench`` runs."""

    title: str
    cohorts: tuple[Cohort, ...]
    methods: tuple[Method, ...] = ()
    _: KW_ONLY
    n_genes: int = defaults.N_GENES
    seeds: tuple[int, ...] = (2021,)
    protocol: str = "section"
    held_out: tuple[str, ...] = ()
    k: int = 5
    compare: tuple[tuple[str, str], ...] = ()
    tables: tuple[TableOfRecipe, ...] = ()
    figure: FigureOfRecipe | None = None
    groups: GroupsOfRecipe | None = None
    name: str = "recipe"
    """Its file's name without the suffix."""

    def shared(self, methods: Collection[str]) -> tuple[str, ...]:
        """The sections that each of the methods holds out, () for all: what may stand in one table."""
        limits = [set(m.held_out) for m in self.methods if m.held_out and m.name in methods]
        return tuple(sorted(set.intersection(*limits))) if limits else ()


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in shipped() if path.suffix == ".yaml")


def shipped() -> list[Path]:
    """The files of the package's folder of recipes."""
    return sorted(Path(str(path)) for path in resources.files("genar.recipes").iterdir())


def read_recipe(name: str) -> Recipe:
    """A recipe from a YAML file, or one that comes with the package, by name.

    Raises ``InputError`` where there is none, a key is not known, a line is malformed, or a method asks for a model,
    an encoder or a setting that does not exist.
    """
    path, facts = _read_yaml(name)
    with door(path, "recipe", "compare it with one that comes with the package"):
        return _recipe(path, facts)


def _recipe(path: Path, facts) -> Recipe:
    if not isinstance(facts, dict) or set(facts) - _FIELDS or not {"sections", "datasets"} & set(facts):
        wrong = sorted(set(facts) - _FIELDS) if isinstance(facts, dict) else type(facts).__name__
        raise InputError(
            f"{path}: expected sections or datasets, and of {', '.join(sorted(_FIELDS))} no other key; found {wrong}"
        )
    if not {"methods", "groups"} & set(facts):
        raise InputError(f"{path}: expected methods to run, or groups to write; found neither")
    methods = _methods(path, facts)
    names = [method.name for method in methods]
    recipe = Recipe(
        str(facts.get("title", path.stem)), _cohorts(path, facts), methods,
        n_genes=_whole(path, "n_genes", facts.get("n_genes", defaults.N_GENES)),
        seeds=_seeds(path, facts.get("seeds", list(Recipe.seeds))),
        protocol=str(facts.get("protocol", Recipe.protocol)),
        held_out=tuple(_names(path, "held_out", facts.get("held_out", []))),
        k=_whole(path, "k", facts.get("k", Recipe.k)),
        compare=_pairs(path, facts.get("compare", ()), names), tables=_tables(path, facts, names),
        figure=_figure(path, facts, names), groups=_groups(path, facts.get("groups")), name=path.stem,
    )  # fmt: skip
    _refuse_idle(path, facts, recipe)
    _check(path, recipe)
    return recipe


def _refuse_idle(path: Path, facts: Mapping, recipe: Recipe) -> None:
    """``InputError`` where a key is there that the others leave nothing to do."""
    if "k" in facts and recipe.protocol != "kfold":
        raise InputError(f"{path}: k is the number of folds of protocol kfold, found protocol {recipe.protocol}")
    if "n_genes" in facts and (files := [c.panel for c in recipe.cohorts if Path(c.panel).is_file()]):
        raise InputError(
            f"{path}: n_genes beside the list {files[0]}, which is taken whole; leave it out, or cut the list"
        )


def _read_yaml(name: str) -> tuple[Path, object]:
    path = Path(name)
    if not path.is_file() and path.parent in _SHIPPED and path.suffix in ("", ".yaml"):  # not a file of somebody's own
        path = next((p for p in shipped() if p.name == f"{path.stem}.yaml"), path)
    if not path.is_file():
        raise InputError(f"recipe {name}: no such file; recipes of the package are {', '.join(recipe_names())}")
    with door(path, "YAML file"):
        return path, load_yaml(path.read_text(encoding="utf-8"))


def _keys(path: Path, what: str, entry, known: set[str], needed: set[str]) -> dict:
    """The entry, a mapping that has the keys ``needed`` and no other than ``known``."""
    if not isinstance(entry, dict) or not needed <= set(entry) or set(entry) - known:
        has, may = ", ".join(sorted(needed)) or "no key for sure", ", ".join(sorted(known - needed))
        raise InputError(f"{path}: {what} has {has}, and may have {may}; found {entry}")
    return entry


def _whole(path: Path, key: str, value) -> int:
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: {key} must be a whole number above 0, found {value!r}")
    return value


def _names(path: Path, key: str, value) -> list[str]:
    if not isinstance(value, list):
        raise InputError(f"{path}: {key} must be a list, found {value!r}; write [{value}]")
    return [str(name) for name in value]


def _seeds(path: Path, seeds) -> tuple[int, ...]:
    if (
        not isinstance(seeds, list)
        or not seeds
        or not all(type(s) is int and 0 <= s < 2**32 for s in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        raise InputError(
            f"{path}: seeds must be a list of whole numbers from 0 to 4294967295, each once, found {seeds!r}"
        )
    return tuple(seeds)


def _methods(path: Path, facts: Mapping) -> tuple[Method, ...]:
    shared = {"encoder": encoders.DEFAULT, "views": defaults.VIEWS}
    shared |= {key: facts[key] for key in shared if key in facts}
    methods = tuple(_method(path, entry, shared) for entry in facts.get("methods", ()))
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: {name!r} must name one method, found {names.count(name)}")
    return methods


def _method(path: Path, entry, shared: Mapping) -> Method:
    """A method; what it does not say is the recipe's own, ``shared`` by all."""
    entry = {**shared, **_keys(path, "a method", entry, _METHOD_FIELDS, {"name", "model"})}
    where = f"{path}: method {entry['name']!r}"
    try:
        cls = model_class(str(entry["model"]))
        words = [f"{key}={json.dumps(value)}" for key, value in entry.get("set", {}).items()]
        settings = read_settings(None, words, str(entry["model"]))
        method = Method(
            str(entry["name"]), str(entry["model"]), preset=str(entry.get("preset", Method.preset)),
            recipe=str(entry.get("recipe", Method.recipe)), settings=settings, encoder=str(entry["encoder"]),
            held_out=tuple(_names(path, "held_out", entry.get("held_out", []))), views=_views(entry["views"]),
        )  # fmt: skip
        encoders.check_name(method.encoder)
        train_config_from_dict(settings.train, method.recipe)
        if "seed" in settings.train:
            raise InputError("seed is the recipe's: seeds")
        own, _ = gene_sets_of(settings.model)
        cls.check_settings(method.preset, own)
        cls.check_decoding(method.preset, own, decoding(cls, {"decode": "mean", **settings.decoding}))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return method


def _views(value) -> int:
    if type(value) is not int or value not in (defaults.VIEWS, 1, 8):
        raise InputError(f"views must be 1 or 8, found {value!r}; leave it out for the encoder's default")
    return value


def _cohorts(path: Path, facts: Mapping) -> tuple[Cohort, ...]:
    panel = str(facts.get("panel", "clean"))
    patients = {str(section): str(patient) for section, patient in facts.get("patients", {}).items()}
    if "sections" in facts:
        if "datasets" in facts:
            raise InputError(f"{path}: expected sections or datasets, found both")
        ids = _names(path, "sections", facts["sections"])
        if unknown := sorted(set(patients) - set(ids)):
            raise InputError(f"{path}: patients names {unknown[0]!r}, which is none of the sections {', '.join(ids)}")
        sections = {section: patients.get(section, "") for section in ids}
        return (Cohort("", sections, _panel(path, panel, "")),)
    made = tuple(_of_dataset(path, str(name), panel, patients) for name in _names(path, "datasets", facts["datasets"]))
    known = {section for cohort in made for section in cohort.sections}
    if unknown := sorted(set(patients) - known):
        raise InputError(f"{path}: patients names {unknown[0]!r}, which is no section of the data sets")
    return made


def _of_dataset(path: Path, name: str, panel: str, patients: Mapping[str, str]) -> Cohort:
    known = dataset(name)
    told = {**known.patients, **patients}
    sections = {section: told.get(section, "") for section in known.sections}
    return Cohort(known.name, sections, _panel(path, panel, known.name), known.held_out, len(known.sisters))


def _panel(path: Path, panel: str, name: str) -> str:
    file = find_beside(path, panel.replace(_DATASET, name))
    if file is None and panel not in PANEL_RECIPES:
        raise InputError(
            f"{path}: panel {panel!r} is neither a file nor one of the panel recipes {', '.join(PANEL_RECIPES)}"
        )
    return str(file or panel)


def find_beside(path: Path, name: str) -> Path | None:
    """The file ``name`` beside the recipe, or among those of the package; ``None`` where there is none."""
    places = [path.parent / name, *(p for p in shipped() if p.name == name)]
    return next((place for place in places if place.is_file()), None)


def _pairs(path: Path, pairs, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{path}: compare takes pairs of methods, found {pair!r}")
        _known(path, "compare", pair, names)
    return tuple((str(one), str(other)) for one, other in pairs)


def _known(path: Path, where: str, used: Sequence[str], names: Sequence[str]) -> None:
    for name in used:
        if name not in names:
            raise InputError(f"{path}: {where} names {name!r}, which is no method; methods are {', '.join(names)}")


def _tables(path: Path, facts: Mapping, names: Sequence[str]) -> tuple[TableOfRecipe, ...]:
    whole = TableOfRecipe("table", {name: name for name in names}, str(facts.get("paper", "")))
    tables = [whole]
    for name, entry in facts.get("tables", {}).items():
        entry = {"rows": entry} if isinstance(entry, list) else entry
        entry = _keys(path, f"table {name}", entry, _TABLE_FIELDS, {"rows"})
        rows = entry["rows"] if isinstance(entry["rows"], dict) else {row: row for row in entry["rows"]}
        rows = {str(row): str(method) for row, method in rows.items()}
        _known(path, f"table {name}", list(rows.values()), names)
        if str(name) in (whole.name, *_OWN_TABLES) or not str(name).replace("_", "").isalnum():
            raise InputError(
                f"{path}: a table's name is that of its file, of letters, digits and _, and none of "
                f"{', '.join((whole.name, *_OWN_TABLES))}; found {name!r}"
            )
        tables.append(TableOfRecipe(str(name), rows, str(entry.get("paper", "")), str(entry.get("dataset", ""))))
    return tuple(tables) if names else ()


def _figure(path: Path, facts: Mapping, names: Sequence[str]) -> FigureOfRecipe | None:
    if facts.get("figure") is None:
        return None
    entry = _keys(path, "figure", facts["figure"], _FIGURE_FIELDS, {"genes"})
    shown = tuple(map(str, entry.get("methods", names)))
    _known(path, "figure", shown, names)
    cohorts = [dataset(str(name)).name for name in facts.get("datasets", ())] or [""]
    named = entry["genes"]
    genes = dict(named) if isinstance(named, dict) else dict.fromkeys(cohorts, named or ())
    if set(genes) != set(cohorts):
        raise InputError(f"{path}: figure names genes of {', '.join(genes)}; expected those of {', '.join(cohorts)}")
    genes = {c: (g,) if isinstance(g, str) else tuple(map(str, g or ())) for c, g in genes.items()}
    if not shown or not all(genes.values()):
        raise InputError(f"{path}: figure needs a method and a gene at least, found {entry} and {len(names)} methods")
    return FigureOfRecipe(genes, shown, str(entry.get("section", "")))


def _groups(path: Path, entry) -> GroupsOfRecipe | None:
    if entry is None:
        return None
    entry = _keys(path, "groups", {} if entry is True else entry, {"genes", "groups"}, set())
    return GroupsOfRecipe(*(str(entry.get(key, "")).strip() for key in ("genes", "groups")))


def _check_size(path: Path, method: Method, cohort: Cohort, n_genes: int) -> None:
    """Settings that cannot fit the panel, whose genes may be chosen later but whose length is known."""
    n_genes = len(read_panel(cohort.panel).genes) if Path(cohort.panel).is_file() else n_genes
    own, _ = gene_sets_of(method.settings.model)
    try:
        model_class(method.model).check_settings(method.preset, own, n_genes)
    except InputError as error:
        raise InputError(f"{path}: method {method.name!r}: {error}") from error


def _check(path: Path, recipe: Recipe) -> None:
    """What can only be told of the whole."""
    if recipe.protocol not in PROTOCOLS:
        raise InputError(f"{path}: protocol {recipe.protocol!r} is not known; expected one of {', '.join(PROTOCOLS)}")
    if recipe.held_out and recipe.protocol not in ("section", "patient"):
        raise InputError(f"{path}: held_out has no meaning under protocol {recipe.protocol}; leave it out")
    for cohort in recipe.cohorts:
        if recipe.protocol == "paper" and not cohort.paper:
            raise InputError(f"{path}: protocol paper needs data sets of the paper ({', '.join(DATASETS)})")
        patients = cohort.sections.values() if recipe.protocol == "patient" else ()
        known = [*cohort.sections, *dict.fromkeys(filter(None, patients))]
        if wrong := [s for s in recipe.held_out if s not in known and all(patients)]:  # or the data know that patient
            raise InputError(f"{path}: held_out {wrong[0]!r} is none of {', '.join(known)}")
        for method in recipe.methods:
            if wrong := [s for s in method.held_out if s not in (recipe.held_out or cohort.sections)]:
                raise InputError(f"{path}: method {method.name!r}: held_out {wrong[0]!r} is not held out by the recipe")
            _check_size(path, method, cohort, recipe.n_genes)
        genes = recipe.figure.genes[cohort.name] if recipe.figure else ()
        panel = read_panel(cohort.panel).genes if genes and Path(cohort.panel).is_file() else genes
        if absent := [gene for gene in genes if gene not in panel]:
            raise InputError(f"{path}: figure: gene {absent[0]!r} is not in the panel {cohort.panel}")
    for rows in (*(table.rows.values() for table in recipe.tables), *recipe.compare):
        if not recipe.shared(rows) and any(m.held_out for m in recipe.methods if m.name in rows):
            raise InputError(f"{path}: no section is held out for each of {', '.join(rows)}, which stand in one table")
    if recipe.figure and recipe.figure.section and recipe.figure.section not in recipe.cohorts[0].sections:
        raise InputError(f"{path}: figure: section {recipe.figure.section!r} is none of the recipe's")
