"""Databases of others: studies of Optuna, experiments of MLflow."""

from __future__ import annotations


def with_driver(url: str) -> str:
    """A PostgreSQL database through psycopg 3; which driver is SQLAlchemy's own choice depends on its version."""
    return url.replace("postgresql://", "postgresql+psycopg://", 1) if url.startswith("postgresql://") else url
