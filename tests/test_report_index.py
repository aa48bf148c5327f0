"""The index of several runs, or of a bench, and the cards on it."""

import json
import re
import shutil

import anndata

from commands import run, told
from genar.report.index import write_report


def test_several_runs_make_an_index(report_run, tmp_path, monkeypatch, capsys):
    for name in ("first", "second <b>"):
        shutil.copytree(report_run, tmp_path / "runs" / name)
    assert run(monkeypatch, "report", tmp_path / "runs", "--out", tmp_path / "all.html") == 0
    html = (tmp_path / "all.html").read_text()
    assert "second &lt;b&gt;" in html
    assert html.count('src="data:image/png') == 3  # measured once, and the two runs
    for link in re.findall(r'href="([^"]+)"', html):
        assert (tmp_path / link).is_file(), link
    assert "all_second-b_SIM2.html" in html
    assert run(monkeypatch, "report", tmp_path / "runs", "--out", tmp_path / "all.html", "--gene", "NONE") == 2
    assert "no prediction of section SIM2 has it" in capsys.readouterr().err


def test_the_index_of_a_bench_calls_its_methods_by_name(report_run, tmp_path, monkeypatch):
    for name in ("genar-0a1b/SIM2-1", "ridge-2c3d/SIM2-1"):
        shutil.copytree(report_run, tmp_path / "bench" / "runs" / name)
    table = "method,fold,seed,folder\nGenAR <i>,SIM2,1,genar-0a1b/SIM2-1\nridge,SIM2,,ridge-2c3d/SIM2-1\n"
    (tmp_path / "bench" / "runs.csv").write_text(table)
    for source in (tmp_path / "bench", tmp_path / "bench" / "runs"):
        assert run(monkeypatch, "report", source, "--out", tmp_path / "all.html") == 0
        cards = re.findall(r'<h3><a href="[^"]+">([^<]+)</a>', (tmp_path / "all.html").read_text())
        assert cards == ["GenAR &lt;i&gt;, seed 1", "ridge"]


def test_pages_of_names_that_are_plain_alike_stay_apart(ridge_home, tmp_path):
    names = ["run_1", "run-1", "RUN 1", "第一", "第二"]
    for name in names:
        shutil.copytree(ridge_home / "run", tmp_path / "runs" / name)
    made = write_report(tmp_path / "runs", tmp_path / "all.html")
    assert len({path.name.lower() for path in made.values()}) == 1 + len(names)
    for name in names:
        assert (tmp_path / made[f"{name} B"].name).is_file()
    html = (tmp_path / "all.html").read_text()
    assert all(html.count(f'href="{path.name}"') == 1 for name, path in made.items() if name != "index")


def test_a_prediction_without_the_gene_keeps_its_card(ridge_home, tmp_path):
    for name in ("whole", "cut"):
        shutil.copytree(ridge_home / "run", tmp_path / "runs" / name)
    path = tmp_path / "runs/cut/predictions/B.h5ad"
    predicted = anndata.read_h5ad(path)
    predicted[:, 1:].copy().write_h5ad(path)
    gene = str(predicted.var_names[0])
    write_report(tmp_path / "runs", tmp_path / "all.html", gene=gene)
    html = (tmp_path / "all.html").read_text()
    assert f"{gene} is not in its panel" in html
    assert 'href="all_cut_B.html"' in html
    assert "it flatters" not in html
    assert "linear-gradient(to right, #440154" in html


def test_the_index_says_that_pcc_chose_where_it_did(ridge_home, tmp_path):
    shutil.copytree(ridge_home / "run", tmp_path / "runs/one")
    write_report(tmp_path / "runs", tmp_path / "all.html")
    assert "it flatters" in (tmp_path / "all.html").read_text()
    facts = json.loads((tmp_path / "runs/one/run.json").read_text())
    facts["plan"]["sections"] = str(tmp_path / "gone")
    (tmp_path / "runs/one/run.json").write_text(json.dumps(facts))
    write_report(tmp_path / "runs", tmp_path / "all.html")
    assert "it flatters" not in (tmp_path / "all.html").read_text()


def test_an_index_of_a_gene_that_none_has_writes_no_page(home, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    shutil.copytree(home / "run", tmp_path / "runs" / "one")
    assert run(monkeypatch, "report", tmp_path / "runs", "--gene", "NOPE", "--out", tmp_path / "i.html") == 2
    assert "--gene NOPE: no prediction of section S2 has it" in told(capsys)
    assert not list(tmp_path.glob("*.html"))
