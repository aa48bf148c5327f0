import sys

from genar import cli, machine


def run(monkeypatch, *words):
    """The command in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["genar", *map(str, words)])
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: None)  # it would change the test runner's own allocator
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0
