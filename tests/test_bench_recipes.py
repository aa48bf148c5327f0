"""Recipes of a bench: what they may say, and what is refused before anything runs."""

import json

import pytest

from genar import bench
from genar.errors import InputError
from toy_bench import HEAD, OF_HOME, PATIENTS, RECIPE, RIDGE, bench_of, read, run_recipe, write_recipe


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("model: knn", "model: magic"), "method 'knn': model 'magic' is not known; expected one of"),
        (("[tiny, ridge!]", "[tiny, rigde]"), "rigde"),
        (("seeds:", "seedz:"), "seedz"),
        (("seeds: [1, 2]", "seeds: [1, 1]"), "seeds must be"),
        (("model: knn", "model: knn, held_out: [C]"), "'knn': held_out 'C' is not held out by the recipe"),
        (
            ("ridge}\n  - {name: knn, model: knn", "ridge, held_out: [A]}\n  - {name: knn, model: knn, held_out: [B]"),
            "no section is held out for each of ridge!, knn, tiny",
        ),
        (("width: 16", "widht: 16"), "widht"),
        (("width: 16", "width: 15"), "multiple of heads"),
        (("model: knn", "model: knn, colour: red"), "colour"),
        (("title: toy", "protocol: magic"), "protocol 'magic' is not known; expected one of section, paper"),
        (("title: toy", "protocol: paper"), "protocol paper needs data sets"),
        (("title: toy", "protocol: kfold"), "found 5 folds and 2 patients"),
        (("title: toy", "panel: nowhere.txt"), "nowhere.txt"),
        (("title: toy", "held_out: [Z]"), "Z"),
        (("title: toy", "encoder2: uni"), "encoder2"),
        (("model: knn", "model: knn, encoder: magic"), "magic"),
        (("title: toy", "figure: {genes: [X], methods: [nobody]}"), "nobody"),
        (("title: toy", "tables: {one: [nobody]}"), "nobody"),
        (("title: toy", "tables: {one: {rows: [knn], colour: red}}"), "colour"),
        (("title: toy", "datasets: [her2st]"), "both"),
        (("sections: [A, B]", "datasets: [magic]"), "magic"),
        (("sections: [A, B]", "sections: [A, Z]"), "1 of 2 sections .Z."),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(change, says, bench_tissue, tmp_path):
    def wrong():
        recipe = read(tmp_path, RECIPE.replace("encoder: genar.bench.toy:narrow_encoder\n", ""), **dict([change]))
        bench.bench_run(recipe, bench_tissue, tmp_path / "out", say=lambda line: None)

    with pytest.raises(InputError, match=says):
        wrong()
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="her2st_small"):
        bench.read_recipe("nowhere.yaml")


def test_a_recipe_that_is_not_there_is_no_other_one(tmp_path):
    for name in (tmp_path / "her2st_small.yaml", "folder/her2st_small.yaml", "her2st_small.txt"):
        with pytest.raises(InputError, match="no such file; recipes of the package are"):
            bench.read_recipe(str(name))
    assert bench.read_recipe("her2st_small.yaml") == bench.read_recipe("her2st_small")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[S1, S2]", "S1", r"sections must be a list, found 'S1'; write \[S1\]"),
        ("title: x", "held_out: S1", r"held_out must be a list"),
        ("sections: [S1, S2]", "datasets: her2st", r"datasets must be a list"),
        ("seeds: [1]", "seeds: [-1]", "from 0 to 4294967295"),
        ("seeds: [1]", "seeds: [4294967296]", "from 0 to 4294967295"),
        (
            "title: x",
            "tables: {runs: [ridge]}",
            "and none of table, runs, differences, by_section, groups; found 'runs'",
        ),
    ],
)
def test_recipes_that_say_something_else_than_meant(tmp_path, old, new, words):
    (tmp_path / "mine.yaml").write_text(OF_HOME.replace(old, new))
    with pytest.raises(InputError, match=words):
        bench.read_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("protocol", "more", "says"),
    [
        ("kfold", "held_out: [A]", "has no meaning under protocol kfold"),
        ("patient", "held_out: [Zoe]", "'Zoe' is none of A, B, C, D, Ann, Bea"),
    ],
)
def test_recipes_that_make_no_sense(four, tmp_path, protocol, more, says):
    with pytest.raises(InputError, match=says):
        bench_of(four, tmp_path, protocol, more)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("held_out: [A]", "names A alone, and fold Ann holds out A, B together"),
        ("set: {seed: 3}", "seed is the recipe's"),
        ("set: {decode: greedy}", "decodes by mean"),
    ],
)
def test_methods_that_make_no_sense(four, tmp_path, entry, says):
    with pytest.raises(InputError, match=says):
        bench_of(four, tmp_path, "patient", old="model: ridge}", new=f"model: ridge, {entry}}}")


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            "figure: {genes: [X], section: B}",
            "section 'B' is not held out for each of ridge, knn, .*for all of them: A",
        ),
        ("figure: {genes: []}", "figure needs a method and a gene"),
        ("figure: {genes: {'': X}, section: Z}", "section 'Z' is none of the recipe's"),
        ("  - {name: late, model: genar, set: {scales: [3, 20]}}", "method 'late': .*20"),
    ],
)
def test_what_cannot_be_drawn_or_fit_is_refused_before_anything_runs(change, says, bench_tissue, features, tmp_path):
    text = f"{HEAD}{RIDGE}  - {{name: knn, model: knn}}\n{change}\n"
    with pytest.raises(InputError, match=says):
        run_recipe(read(tmp_path, text), bench_tissue, tmp_path / "out", features)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ['{"1": ', "{}", '{"1": "A B"}', '["A"]'])
def test_a_malformed_file_of_groups_is_one_line_before_anything_is_written(home, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text(text)
    (tmp_path / "g.yaml").write_text(OF_HOME.split("seeds")[0] + "groups: {groups: bad.json}\n")
    with pytest.raises(InputError, match=r"bad\.json"):
        bench.bench_run(bench.read_recipe("g.yaml"), home / "tissue", tmp_path / "out")
    assert not list((tmp_path / "out").glob("groups*"))


def test_patients_of_sections_named_by_numbers_are_known(tmp_path):
    text = PATIENTS.replace("PROTOCOL", "kfold").replace("[A, B, C, D]", "[1, 2, 3, 4]") + "k: 2\n"
    text = text.replace("{A: Ann, B: Ann, C: Bea, D: Bea}", "{1: Ann, 2: Ann, 3: Bea, 4: Bea}")
    (tmp_path / "toy.yaml").write_text(text)
    (cohort,) = bench.read_recipe(tmp_path / "toy.yaml").cohorts
    assert cohort.sections == {"1": "Ann", "2": "Ann", "3": "Bea", "4": "Bea"}


def test_patients_of_a_bench_are_told_beside_data_sets(tmp_path):
    from genar.bench import read_recipe

    recipe = {"title": "t", "datasets": ["kidney"], "methods": [{"name": "m", "model": "mean"}]}
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**recipe, "patients": {"NCBI692": "A", "NCBI693": "B"}}))
    sections = read_recipe(path).cohorts[0].sections
    assert (sections["NCBI692"], sections["NCBI693"]) == ("A", "B")
    path.write_text(json.dumps({**recipe, "patients": {"NOSUCH": "A"}}))
    with pytest.raises(InputError, match="'NOSUCH', which is no section"):
        read_recipe(path)


def test_a_recipe_says_how_many_views(tmp_path):
    own = "{name: ridge, model: ridge}\n  - {name: upright, model: ridge, views: 1}\nviews: 8"
    recipe = bench.read_recipe(str(write_recipe(tmp_path, **{"{name: ridge, model: ridge}": own})))
    found = {run.method.name: run.plan.views for run in bench.plan_runs(recipe, None, tmp_path).runs}
    assert found == {"ridge": 8, "upright": 1}
    for wrong in ("2", "true", "many"):
        path = write_recipe(tmp_path, **{"model: ridge}": f"model: ridge, views: {wrong}}}"})
        with pytest.raises(InputError, match="method 'ridge': views must be 1 or 8, found"):
            bench.read_recipe(str(path))
