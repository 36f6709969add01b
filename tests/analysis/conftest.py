"""A results folder for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
from written import Writer


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "results" / "little")
