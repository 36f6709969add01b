"""What all tests need of the process: one thread each, Ctrl-C as in a terminal, and modules beside the tests."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from commands import Command

from ablate import cli

torch.set_num_threads(1)  # two cores are shared with whatever else runs
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs, and inherited
os.environ["ABLATE_PLUGINS"] = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def _trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command trusts the folder of its grid in the whole process; the next test starts without."""
    monkeypatch.setenv("ABLATE_PLUGINS", os.environ["ABLATE_PLUGINS"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONSAFEPATH", os.environ.get("PYTHONSAFEPATH", ""))


@pytest.fixture
def columns() -> int:
    """Of the terminal that commands print to; a module may have another."""
    return 120


@pytest.fixture
def ablate(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", str(columns))

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ablate", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return run
