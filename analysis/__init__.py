"""Reads records only: data frames, figures, tables. Never imports torch."""
