"""Commands in the process of the tests, and what they say."""

import sys

from genar import cli


def run(monkeypatch, *words):
    """The command in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["genar", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def sets(*settings):
    """An option ``--set`` of each."""
    return [word for setting in settings for word in ("--set", setting)]


def run_fetch(monkeypatch, capsys, *words):
    """`genar fetch`: its exit code, its last line on standard error, its output."""
    code = run(monkeypatch, "fetch", *words)
    out, err = capsys.readouterr()
    return code, err.strip().splitlines()[-1] if err.strip() else "", out


def told(capsys):
    """What was said since the last look, on both outputs, as one line."""
    got = capsys.readouterr()
    return " ".join((got.out + got.err).split())


def assert_one_error(capsys, expected):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in lines[0]
