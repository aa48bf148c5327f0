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
