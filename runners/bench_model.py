"""What `ablate bench MODEL` measures: a cell of the paper's own method and geometry on a model, without a grid file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ablate.source import InputError, choices
from runners.hub import INDEX
from runners.identity import is_hub_id
from runners.random_weights import HUB_IDS, transformer_of

GRID = """\
name: bench
recipe: model
axes: {objective: [epg], estimator: [{name: elbo, weight: adaptive}], sampler: [ode]}
seeds: [0]
"""
LARGE = """\
model:
  {path: %s, dtype: bfloat16, lora_rank: 32, lora_alpha: 64, max_sequence_length: 128, resolution: 512,
   offload_encoders: true, cache_embeddings: true}
rollout: {num_groups: 48, group_size: 24, num_steps: 10, batch_size: 24}
update: {updates_per_epoch: 1, num_points: 3, micro_batch_size: 9}
reward: jpeg               # judges images of any size and content
kl: {coef: 1.0e-4}
old_policy: {rate: 0.001, limit: 0.5}
budget: {epochs: 1}
"""  # what the time of an epoch depends on in grids/recipes/sd35-medium.yaml
EMBEDDED = """\
model: {path: %s, max_sequence_length: 0, resolution: 32}
rollout: {num_groups: 24, group_size: 16, num_steps: 8, batch_size: 128}
update: {updates_per_epoch: 3, num_points: 3, group_probe: shared, micro_batch_size: 128}
reward: scenes
kl: {coef: 0.02}
old_policy: {rate: 0.001, limit: 0.5}
budget: {epochs: 1}
"""  # and in grids/recipes/tiny-scenes.yaml


def model_of(argument: str, *, random_weights: bool) -> str | None:
    """The model.path that the argument of `ablate bench` stands for; None where it is a grid's path.

    Raises InputError for what is neither.
    """
    path = Path(argument)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return None
    if random_weights:
        transformer_of(argument)
        return HUB_IDS.get(argument, argument)
    if argument in HUB_IDS:
        raise InputError(f"bench {argument}: give --random-weights, or {HUB_IDS[argument]} for the real ones")
    if path.is_dir() and not (path / INDEX).exists():
        raise InputError(f"bench {argument}: a folder without {INDEX}; expected one written by save_pretrained")
    if argument == "tiny" or path.is_dir():
        return argument
    if is_hub_id(argument) and not path.parent.is_dir():
        return argument
    known = choices(argument, ["tiny", *HUB_IDS, *(str(file) for file in sorted(path.parent.glob("*.yaml")))])
    expected = "expected a grid file, `tiny`, a local pipeline, a hub id, or a size for --random-weights"
    raise InputError(f"bench {argument}: is neither a grid file nor a model; {expected}{known}")


@contextmanager
def grid_of(model: str) -> Iterator[Path]:
    """A grid file of one cell that trains this model, for as long as the context lasts."""
    with TemporaryDirectory() as folder:
        grid, recipe = Path(folder) / "bench.yaml", Path(folder) / "recipes" / "model.yaml"
        recipe.parent.mkdir()
        grid.write_text(GRID, encoding="utf-8")
        recipe.write_text((EMBEDDED if model == "tiny" else LARGE) % json.dumps(model), encoding="utf-8")
        yield grid
