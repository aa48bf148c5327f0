"""The folders that examples in docstrings find beside them: ``tissue``, two small simulated sections, and ``run``, a
training on the first of them."""

import pytest
from _pytest.doctest import DoctestItem

import genar


@pytest.fixture(scope="session")
def _examples(tmp_path_factory):
    from genar.data.simulate import TissueConfig

    folder = tmp_path_factory.mktemp("examples")
    genar.write_tissue(folder / "tissue", config=TissueConfig(n_rows=6, n_cols=6, n_genes=80, mpp=2.0))
    genar.train(
        folder / "tissue", folder / "run", test="SIM2", model="ridge", n_genes=20, views=1, maps=False,
        features=folder / "features", progress=False,
    )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def _beside_an_example(request, tmp_path, monkeypatch, doctest_namespace):
    if isinstance(request.node, DoctestItem):
        folder = request.getfixturevalue("_examples")
        for name in ("tissue", "run", "features"):
            (tmp_path / name).symlink_to(folder / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GENAR_FEATURES", str(folder / "features"))
        doctest_namespace["genar"] = genar
