"""The public names, and the page that shows them, run as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import genar
from genar.errors import InputError
from pages import DOCS, run_page


@pytest.mark.parametrize("name", genar.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(genar, name).__doc__
    assert name in dir(genar)


def test_names_are_the_ones_of_their_rooms():
    from genar.models.genar import GenAR

    assert genar.GenAR is GenAR


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'predict_everything'"):
        _ = genar.predict_everything


def test_types_and_names_agree():
    """What type checkers see is what there is."""
    shown = re.search(r"if TYPE_CHECKING:.*?\n\n", Path(genar.__file__).read_text(), re.DOTALL)
    assert shown
    lines = re.findall(r"from genar\.(\S+) import (.+)", shown[0])
    seen = {name: home for home, names in lines for name in names.split(", ")}
    assert seen == genar._HOMES
    assert sorted(seen) == sorted(genar.__all__)


def test_import_is_light():
    heavy = ("torch", "openslide", "anndata", "numpy", "pandas")
    code = f"import genar, sys; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_prediction_does_not_wait_for_what_only_training_needs():
    code = "import genar.runs, genar.inference, sys; print('torch' in sys.modules, 'pytorch_lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page("python.md")
    assert names["predicted"].shape == (names["held_out"].n_obs, 40)
    assert names["scores"].summary["pcc_50"] > 0.1
    assert set(names["run"].scores["SIM2"]) == {"genar", "genar_mean", "mean", "ridge"}
    assert names["counts"].n_vars == 40
    assert len(names["scores"].per_gene) == 40


def test_training_and_prediction_refuse_what_they_do_not_know(tissue, tissue_sections, tmp_path):
    with pytest.raises(genar.InputError, match="option 'n_gene' is not known; did you mean 'n_genes'"):
        genar.train(tissue, tmp_path / "run", n_gene=5)
    with pytest.raises(genar.InputError, match="setting 'widht' is not known; did you mean 'width'"):
        genar.train(tissue, tmp_path / "run", settings={"widht": 5})
    with pytest.raises(genar.InputError, match="setting 'max_epochs' is the training's"):
        genar.predict(tissue_sections[0], tmp_path / "run", max_epochs=3)
    with pytest.raises(genar.InputError, match="mpp tell how a file is read; this section was read already"):
        genar.predict(tissue_sections[0], tmp_path / "run", mpp=0.5)
    for sections, found in ((tissue_sections, "list of AnnData"), (tissue_sections[0], "AnnData"), (None, "NoneType")):
        with pytest.raises(genar.InputError, match=f"expected a folder of sections, found {found}; write each"):
            genar.train(sections, tmp_path / "run")


@pytest.mark.parametrize("name", genar.__all__)
def test_every_public_name_has_an_example_and_stands_on_the_page(name):
    assert ">>> " in getattr(genar, name).__doc__
    home = getattr(genar, name).__module__
    listed = re.findall(r"automodule:: (\S+)\n   :members: (.+)", (DOCS / "api.md").read_text())
    assert any(home.startswith(module) and name in members.split(", ") for module, members in listed)


def test_the_notebook_refuses_as_the_command_does(home, tmp_path):
    with pytest.raises(InputError, match="--encoder, --views would do nothing here"):
        genar.train(
            home / "tissue", tmp_path / "run", model="hist2st", input="patches", encoder="resnet18", views=1,
            progress=False,
        )  # fmt: skip
    with pytest.raises(InputError, match="nonsense"):
        genar.train(home / "tissue", tmp_path / "run", beside="nonsense", progress=False)
    with pytest.raises(InputError, match=r"'S9' is no section"):
        genar.train(home / "tissue", tmp_path / "run", only="S9", progress=False)
    for wrong, told in (({"n_genes": "20"}, "n_genes must be a whole number, found '20'"),
                        ({"views": "1"}, "views must be a whole number, found '1'"),
                        ({"mpp": "2.0"}, "--mpp must be a positive number of um, found '2.0'")):  # fmt: skip
        with pytest.raises(InputError, match=told):
            genar.train(home / "tissue", tmp_path / "run", progress=False, **wrong)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())
