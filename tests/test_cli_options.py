"""Options of the commands: defaults, help, JSON, and settings by ``--set`` and from YAML."""

import inspect
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import typer

import genar
from commands import run
from genar.cli import app
from genar.features import Inputs
from genar.models import Decoding, model_names
from genar.models._decoding import DECODINGS
from genar.models.genar import GenARConfig
from genar.settings import Settings, read_settings
from genar.train_plan import TrainPlan
from genar.training import TrainConfig

OWNERS = {"model": GenARConfig(), "train": TrainConfig(), "decoding": Decoding(), "inputs": Inputs()}
FIELDS = [(owner, f.name) for owner, config in OWNERS.items() for f in fields(config)]
# One of each command's inputs that is wrong.
WRONG = {
    "demo": ["--out", "DONE"],
    "check": ["NOWHERE"],
    "fetch": ["nothing", "--out", "OUT"],
    "features": ["NOWHERE", "--out", "OUT"],
    "panel": ["NOWHERE", "--out", "OUT/panel.json"],
    "groups": ["NOWHERE", "--out", "OUT"],
    "train": ["NOWHERE", "--out", "OUT"],
    "predict": ["NOWHERE", "--model", "NOWHERE", "--out", "OUT/p.h5ad"],
    "push": ["NOWHERE", "one/two"],
    "evaluate": ["NOWHERE", "NOWHERE", "--out", "OUT"],
    "report": ["NOWHERE", "--out", "OUT/r.html"],
    "export": ["NOWHERE", "--out", "OUT/p.geojson"],
    "bench": ["NOWHERE", "--out", "OUT"],
    "encoders": ["--widht"],
    "models": ["magic"],
}


def test_settings_come_from_yaml_and_the_command_line_wins(tmp_path):
    (tmp_path / "settings.yaml").write_text("width: 32\nlr: 1e-4\nmax_epochs: 7\n")
    words = ["lr=2e-3", "scales=[1, 20]", "token_noise=1", "context_spots=6", "layers=[q05, sd]", "top_k=3"]
    settings = read_settings(tmp_path / "settings.yaml", words)
    assert settings.model == {"width": 32, "scales": (1, 20), "token_noise": 1.0}
    assert settings.train == {"lr": 2e-3, "max_epochs": 7}
    assert settings.inputs == {"context_spots": (6,)}
    assert settings.decoding == {"layers": ("q05", "sd"), "top_k": 3}


@pytest.mark.parametrize(("owner", "name"), [pair for pair in FIELDS if pair[1] not in ("n_features", "n_blocks")])
def test_every_option_is_reachable_by_set(owner, name):
    value = getattr(OWNERS[owner], name)
    settings = read_settings(None, [f"{name}={json.dumps(value)}"])
    assert getattr(settings, owner if name != "seed" else "train") == {name: value}


def test_genar_sees_a_wide_patch_and_neighbours_where_patches_of_any_width_are_shown():
    plan = TrainPlan(Path("sections"), (), Path("run"))
    assert plan.inputs == Inputs((112.0, 309.0), (6,))
    assert replace(plan, settings=Settings(inputs={"context_spots": ()})).inputs == Inputs((112.0, 309.0))
    for other in ({"preset": "paper"}, {"model": "ridge"}, {"patch": "genar"}, {"encoder": "import:mine"}):
        assert replace(plan, **other).inputs == Inputs()


def test_commands_and_plans_take_the_same_where_nothing_is_said():
    of_command = {p.name: p.default for p in typer.main.get_command(app).commands["train"].params}
    for field in fields(TrainPlan):
        if field.name in of_command and field.name not in ("sections", "test", "out", "settings", "device"):
            assert of_command[field.name] == field.default, field.name
    of_python = inspect.signature(genar.train).parameters
    assert (of_python["model"].default, of_python["panel"].default) == (of_command["model"], of_command["panel"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("features", "TISSUE", "--import", "X", "--out", "X", "--widths-um", "55"), "--widths-um"),
        (("panel", "TISSUE", "--out", "X/p.json", "--aliases", "X"), "--aliases"),
        (("groups", "RUN", "--out", "X", "--exclude", "S1", "--mpp", "3"), "--exclude, --mpp"),
    ],
)
def test_options_that_would_do_nothing_are_refused(home, tmp_path, monkeypatch, capsys, words, named):
    places = {"TISSUE": home / "tissue", "RUN": home / "run"}
    words = [places.get(word, word.replace("X", str(tmp_path / "x"))) for word in words]
    assert run(monkeypatch, *words) == 2
    assert f"{named} would do nothing here" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["encoders", "models"])
def test_lists_are_json_on_request(command, monkeypatch, capsys):
    assert run(monkeypatch, command, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == "done"
    rows = told[command]
    assert all(row["name"] for row in rows)
    assert run(monkeypatch, command) == 0
    assert rows[0]["name"] in capsys.readouterr().out


@pytest.mark.parametrize("command", typer.main.get_command(app).commands)
def test_wrong_input_is_json_too_on_request(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "DONE" / "run").mkdir(parents=True)
    (tmp_path / "DONE" / "run" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, command, *WRONG[command], "--json") == 2
    told = capsys.readouterr()
    facts = json.loads(told.out)
    assert facts["status"] == "wrong input"
    assert command == "check" or set(facts) == {"status", "error"}
    assert facts["error"] in " ".join(told.err.replace("│", " ").split())
    assert [path.name for path in tmp_path.iterdir() if path.name != "genar-check"] == ["DONE"]
    assert run(monkeypatch, command, *WRONG[command]) == 2
    assert "{" not in capsys.readouterr().out


@pytest.mark.parametrize("name", model_names())
def test_every_model_has_a_card_in_plain_words(name, monkeypatch, capsys):
    assert run(monkeypatch, "models", name) == 0
    rows = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}
    assert {"title", "target", "kept"} <= set(rows)
    assert "`" not in rows["about"]
    assert rows["about"].endswith(".")


def test_help_shows_flags_as_flags_and_names_what_may_be_chosen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    for command in ("train", "predict"):
        assert run(monkeypatch, command, "--help") == 0
        told = capsys.readouterr().out
        assert "--json" in told
        assert "<bool>" not in told
        assert "BOOLEAN" not in told
    assert all(name in told for name in DECODINGS)


def test_help_loads_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; import genar.cli; print('torch' in sys.modules, 'scanpy' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "False"]


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    told = capsys.readouterr().out
    assert told.startswith("genar 0.")
    as_module = subprocess.run([sys.executable, "-m", "genar", "--version"], capture_output=True, text=True, check=True)
    assert as_module.stdout == told
