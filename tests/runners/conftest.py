"""What tests of MLflow share: its tables, which take seconds to create."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from postgresql_server import can_serve, postgresql

from runners import mlflow_writer


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with MLflow's tables and nothing in them, to be copied."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow_writer._client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A server of PostgreSQL."""
    if not can_serve():
        pytest.skip("PostgreSQL is not installed")
    with postgresql() as url:
        yield url
