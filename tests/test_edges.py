"""Short trainings, odd settings and edited recipes: what they must not do in silence."""

from commands import run as genar


def test_the_command_refuses_such_a_decoding_before_it_reads_anything(tissue, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    words = ["train", tissue, "--test", "SIM2", "--model", "stem", "--set", "decode=greedy", "--out", out]
    assert genar(monkeypatch, *words) == 2
    assert "decodes by mean" in capsys.readouterr().err
    assert not (out / "panel.json").exists()
