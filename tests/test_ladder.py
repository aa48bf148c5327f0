"""No room of the package is entered from one below it."""

import ast
from pathlib import Path

import pytest

import genar

SRC = Path(genar.__file__).parent.parent
ROOMS = [
    "errors",
    "defaults",
    "processes",
    "machine",
    "data",
    "fetch",
    "genes",
    "encoders",
    "features",
    "models",
    "batches",
    "training_config",
    "resume",
    "streaming",
    "training_loop",
    "training",
    "settings",
    "prediction",
    "pixels",
    "evaluation",
    "report",
    "assess",
    "export",
    "recipes",
    "inference",
    "train_plan",
    "runs",
    "demo",
    "lazyslide",
    "groups",
    "panels",
    "bench",
    "_console",
    "_options",
    "notebook",
    "cli",
    "__main__",
]  # each imports itself and those before
EVALUATION_SEES = ("genar.data.contract", "genar.data.files", "genar.defaults", "genar.errors", "genar.evaluation")


def module_name(path):
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((SRC / "genar").rglob("*.py"))}


def imports(source, module):
    """Every module that ``source`` imports, also inside functions; ``from package import x`` counts as the module x
    where there is one."""
    package = module if module in MODULES and MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


def is_under(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def room_of(name):
    return f"{name}..".split(".")[1]  # "" for the package itself


def violations(source, module):
    room = room_of(module)
    allowed = ROOMS[: ROOMS.index(room) + 1] if room else ROOMS  # the package itself names the public things of all
    for name in imports(source, module):
        target = room_of(name)
        ours = is_under(name, "genar")
        if ours and target and target not in allowed:
            yield f"{module} imports {name}: {room or 'genar'} may not enter {target}"
        if room in ("data", "genes") and is_under(name, "torch"):
            yield f"{module} imports {name}: no tensors here"
        if room == "models" and module != "genar.models.checkpoint" and is_under(name, "genar.data"):
            yield f"{module} imports {name}: models never see data"
        if room == "evaluation" and ours and not is_under(name, *EVALUATION_SEES):
            yield f"{module} imports {name}: evaluation sees the contract and arrays"


@pytest.mark.parametrize("module", MODULES)
def test_no_room_is_entered_from_below(module):
    assert not list(violations(MODULES[module].read_text(encoding="utf-8"), module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("genar.genes", "from genar.models import Model"),
        ("genar.genes", "from genar import features"),
        ("genar.genes", "def f():\n    import genar.cli"),
        ("genar.genes", "from .. import encoders"),
        ("genar.data.slide", "from ..genes import Panel"),
        ("genar.data", "from .. import genes"),
        ("genar.data.slide", "import numpy\nimport torch.nn.functional"),
        ("genar.genes", "def f():\n    from torch import nn"),
        ("genar.models.ridge", "from genar.data import contract"),
        ("genar.models", "if True:\n    from genar.data.files import replacing"),
        ("genar.evaluation", "from genar.data import contract, read_section"),
        ("genar.evaluation.metrics", "from genar.genes import Panel"),
    ],
)
def test_checker_catches(module, source):
    assert list(violations(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("genar.models.checkpoint", "from genar.data.files import replacing"),
        ("genar.evaluation", "from genar.data import contract\nfrom genar.data.files import write_text"),
        ("genar.features", "import genar\nimport torch\nfrom genar.encoders import Encoder"),
        ("genar.data.slide", "import torchless"),
        ("genar.cli", "def f():\n    from genar import runs"),
    ],
)
def test_checker_lets_pass(module, source):
    assert not list(violations(source, module))
