"""What all tests need of the process: one thread each, Ctrl-C as in a terminal, and modules beside the tests."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two cores are shared with whatever else runs
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs, and inherited
os.environ["ABLATE_PLUGINS"] = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def _trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command trusts the folder of its grid in the whole process; the next test starts without."""
    monkeypatch.setenv("ABLATE_PLUGINS", os.environ["ABLATE_PLUGINS"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONSAFEPATH", os.environ.get("PYTHONSAFEPATH", ""))
