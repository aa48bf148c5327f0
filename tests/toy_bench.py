"""Small recipes of a bench, written, read and run."""

from genar import bench

HEAD = """
title: toy
sections: [A, B]
held_out: [A]
n_genes: 12
encoder: genar.bench.toy:narrow_encoder
seeds: [1]
methods:
"""
RIDGE = "  - {name: ridge, model: ridge}\n"
OF_P1_AND_P2 = """
title: told
sections: [P1, P2]
panel: highest_mean
n_genes: 3
encoder: genar.bench.toy:narrow_encoder
methods:
  - {name: ridge, model: ridge}
"""
OF_HOME = """
title: x
sections: [S1, S2]
encoder: genar.bench.toy:narrow_encoder
panel: clean
n_genes: 20
seeds: [1]
methods: [{name: ridge, model: ridge}, {name: mean, model: mean}]
"""


RECIPE = """
title: toy
sections: [A, B]
n_genes: 12
encoder: genar.bench.toy:narrow_encoder
seeds: [1, 2]
methods:
  - {name: "ridge!", model: ridge}
  - {name: knn, model: knn}
  - name: tiny
    model: genar
    set: {width: 16, depth: 1, heads: 2, components: 4, max_epochs: 1, samples: 2, validation_share: 0, scales: [3, 12]}
compare:
  - [tiny, ridge!]
"""


PATIENTS = """
title: toy
sections: [A, B, C, D]
patients: {A: Ann, B: Ann, C: Bea, D: Bea}
n_genes: 10
encoder: genar.bench.toy:narrow_encoder
protocol: PROTOCOL
methods:
  - {name: ridge, model: ridge}
"""


def read(tmp_path, text=RECIPE, name="toy", **changes):
    """The recipe of this text, in which the keys of ``changes`` are replaced."""
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / f"{name}.yaml").write_text(text)
    return bench.read_recipe(str(tmp_path / f"{name}.yaml"))


def run_recipe(recipe, data, out, features, said=None):
    return bench.bench_run(recipe, data, out, features=features, say=str if said is None else said.append)


def bench_of(four, tmp_path, protocol, *more, out="out", old="", new=""):
    text = PATIENTS.replace("PROTOCOL", protocol) + "\n".join(more)
    (tmp_path / "toy.yaml").write_text(text.replace(old, new) if old else text)
    said = []
    recipe = bench.read_recipe(str(tmp_path / "toy.yaml"))
    result = bench.bench_run(recipe, four, tmp_path / out, features=tmp_path / "features", say=said.append)
    return result, said


def write_recipe(tmp_path, **changes):
    text = OF_P1_AND_P2
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "told.yaml").write_text(text)
    return tmp_path / "told.yaml"
