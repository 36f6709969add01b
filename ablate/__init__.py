"""What a cell means: objectives, estimators and samplers, the grid that crosses them, and what a cell leaves behind."""

__version__ = "0.1.0"
