"""A results folder written by hand: what runners leave behind, without running anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ablate.components import Component
from ablate.plan import FORMAT, Cell, Excluded
from ablate.recipe import BudgetRecipe, Recipe
from ablate.record import Ledger, Provenance, Record, Status

Combination = tuple[str, str, str]  # objective, estimator, sampler


class Writer:
    """Writes plan.json, then cell folders one by one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells: list[dict[str, Any]] = []
        self.excluded: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def plan(self, **changes: Any) -> Path:
        content = {"format": FORMAT, "grid": self.folder.name, "cells": self.cells, "excluded": self.excluded}
        (self.folder / "plan.json").write_text(json.dumps(content | changes))
        return self.folder

    def exclude(
        self, combination: Combination, reason: str = "no densities", axes: dict[str, Any] | None = None
    ) -> None:
        objective, estimator, sampler = combination
        self.excluded.append(
            Excluded(
                objective=objective, estimator=estimator, sampler=sampler, axes=axes or {}, reason=reason
            ).model_dump()
        )

    def cell(
        self,
        combination: Combination,
        seed: int = 0,
        curve: dict[int, float] | None = None,
        status: Status | None = Status.DONE,
        message: str = "",
        hours: float = 0.1,
        device: str = "cpu",
        axes: dict[str, Any] | None = None,
        score: bool = True,
    ) -> Path:
        """`curve`: held-out accuracy by epoch, `hours` apart; None for a cell that has its folder but never started."""
        objective, estimator, sampler = combination
        tag = "".join(f"-{value}" for value in (axes or {}).values())
        id = f"{objective}-{estimator}-{sampler}-s{seed}{tag}"
        key = {"objective": objective, "estimator": estimator, "sampler": sampler, "seed": seed, "axes": axes or {}}
        self.cells.append({"id": id, **key, "forwards": 3})
        folder = self.folder / id
        folder.mkdir()
        names = dict(zip(("objective", "estimator", "sampler"), combination, strict=True))
        spec = Cell(
            id=id,
            grid=self.folder.name,
            **key,
            components={axis: Component(name=name) for axis, name in names.items()},
            recipe=Recipe(budget=BudgetRecipe(epochs=10)),
            versions={},
        )
        (folder / "cell.json").write_text(spec.model_dump_json())
        if curve is None:
            return folder
        (folder / "metrics.jsonl").write_text(
            "".join(line(epoch, value, hours * epoch, score=score) for epoch, value in curve.items())
        )
        if status is not None:
            seconds = 3600 * hours * max(curve, default=0)
            record = Record(
                id=id,
                status=status,
                message=message,
                seed=seed,
                epochs=max(curve, default=0),
                cost=Ledger(rollout=0.5 * seconds, reward=0.1 * seconds, update=0.4 * seconds, forwards=7, backwards=2),
                provenance=Provenance(
                    versions={}, commit=None, python="3.11", platform="x", device=device, num_devices=1, num_threads=1
                ),
            )
            (folder / "record.json").write_text(record.model_dump_json())
        return folder


def line(epoch: int, accuracy: float, device_hours: float, *, score: bool = True) -> str:
    """A line of metrics.jsonl, newline included."""
    row: dict[str, Any] = {"epoch": epoch, "update": 3 * epoch, "device_hours": device_hours, "nfe": 1000 * epoch}
    row |= {"rollout/score": 0.5, "eval/accuracy": accuracy, "eval/accuracy/counting": accuracy / 2, "note": None}
    return json.dumps(row | ({"eval/score": accuracy / 2 + 0.3} if score else {})) + "\n"
