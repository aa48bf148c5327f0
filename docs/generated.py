"""What pages end with and the code alone knows: every command's options, every setting with its default."""

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import typer

from genar.cli import app
from genar.features import Inputs
from genar.models import Decoding, model_class, model_names
from genar.models._genar_config import PRESETS, GenARConfig
from genar.prediction import decoding
from genar.training import RECIPES, TrainConfig

# What shapes GenAR's groups and is no field of its configuration.
STRUCTURE = {
    "scales": ("from the panel's size", "groups at each scale, coarse to fine, the last the genes: `[1, 20, 200]`"),
    "order": (
        "kmeans",
        "order of the genes, of which groups are cut: `kmeans`, `random` (one, whatever the seed), or a `.gmt` file of "
        "gene sets",
    ),
}
# Of the published methods, where their configuration says no more than the name does.
USUAL = {
    "width": "D of a token, or of the layer within", "depth": "blocks", "depths": "blocks of each of the three views",
    "heads": "attention heads of a block (several: of each view)", "head_width": "width of an attention head",
    "mlp_width": "of an MLP", "mlp_ratio": "width of the layer within an MLP, in `width`",
    "mlp_ratios": "width of the layer within an MLP, in `width`, of each view",
    "bridge_heads": "attention heads of a bridge", "dropout": "share hidden in each training step",
    "graph_layers": "layers of the graph network", "zinb_weight": "of the zero-inflated negative binomial in the loss",
    "distil_weight": "of the self-distillation in the loss",
}  # fmt: skip
BY_DATA = ("n_features", "n_blocks")
"""fields of ``GenARConfig`` that no user sets"""
MARK = "<!-- what follows is made of the code by `make docs` -->"


def renew(page: Path, tables: str) -> None:
    """Write ``tables`` below the mark of a page, unless they stand there."""
    text = page.read_text(encoding="utf-8")
    own, _, there = text.partition(MARK)
    if there.strip() != tables.strip():
        page.write_text(f"{own}{MARK}\n\n{tables.strip()}\n", encoding="utf-8")


def command_tables() -> str:
    """The options of every command, from the command line itself, as Markdown."""
    lines = []
    for name, command in typer.main.get_command(app).commands.items():  # pyright: ignore
        lines += [f"## genar {name}", "", " ".join(command.help.split()), "", "| option | what |", "| --- | --- |"]
        for one in command.params:
            if one.name == "help":
                continue
            written = ", ".join(one.opts) if one.param_type_name == "option" else one.name.upper()
            told = (getattr(one, "help", None) or "").replace("|", "\\|").replace("<", "&lt;")
            said = one.default in (None, "", ...) or one.default is False or "[default" in told
            default = "" if said else f" [default: {one.default}]"
            lines.append(f"| `{written}` | {told}{default} |")
        lines.append("")
    return "\n".join(lines)


def setting_tables() -> str:
    """The settings of GenAR, the training, the decoding, the inputs and the other models, as Markdown."""
    network = {name: asdict(preset()) for name, preset in PRESETS.items()}
    small = {"small (default)": network.pop("small"), **network}
    structure = [(name, [default] * len(small), what) for name, (default, what) in STRUCTURE.items()]
    lines = ["## GenAR", "", *_head(small), *_rows([*structure, *_settings(GenARConfig, small, BY_DATA)])]
    own = {"small (default)": Inputs(**model_class("genar").input_defaults["small"]), "paper, released": Inputs()}
    lines += ["", "## Inputs", "", *_head(own), *_rows(_settings(Inputs, {k: asdict(v) for k, v in own.items()}))]
    recipes = {name: asdict(recipe()) for name, recipe in RECIPES.items()}
    lines += ["", "## Training", "", *_head(recipes), *_rows(_settings(TrainConfig, recipes))]
    decodings = {"commands": asdict(decoding(model_class("genar"), {})), "`Decoding()` in Python": asdict(Decoding())}
    lines += ["", "## Decoding", "", *_head(decodings), *_rows(_settings(Decoding, decodings))]
    lines += ["", "## Published methods"]
    for name in model_names():
        if config := getattr(model_class(name), "config", None):
            presets = {preset: asdict(model_class(name).configure(preset, {})) for preset in model_class(name).presets}
            lines += ["", f"### {name}", "", *_head(presets), *_rows(_settings(config, presets))]
    return "\n".join(lines)


def field_docs(config: type) -> dict[str, str]:
    """What the docstring below each field of a dataclass says; "" where there is none."""
    (cls,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    docs, name = {}, ""
    for node in cls.body:  # pyright: ignore
        if isinstance(node, ast.AnnAssign):
            name = node.target.id  # pyright: ignore
            docs[name] = ""
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs[name] = " ".join(str(node.value.value).split())
            name = ""
    return docs


def _settings(config: type, columns: Mapping[str, Mapping], leave_out: tuple[str, ...] = ()) -> list:
    docs = field_docs(config)
    return [
        (
            f.name,
            [_plain(values[f.name]) for values in columns.values()],
            _markdown(docs[f.name]) or USUAL.get(f.name, ""),
        )
        for f in fields(config)
        if f.name not in leave_out
    ]


def _head(columns) -> list[str]:
    return ["| setting | " + " | ".join(columns) + " | what |", "| --- |" + " --- |" * (len(columns) + 1)]


def _rows(settings: list) -> list[str]:
    return [f"| `{name}` | " + " | ".join(values) + f" | {what} |" for name, values, what in settings]


def _plain(value) -> str:
    """As it is written behind ``--set``."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_plain, value))}]" if isinstance(value, tuple) else f"{value}"


def _markdown(text: str) -> str:
    return re.sub("``(.+?)``", r"`\1`", text).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
