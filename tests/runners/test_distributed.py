"""Several processes that share a cell do what one does; whatever is killed is resumed to the same numbers."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import folder_of
from diffusers.models.embeddings import Timesteps
from diffusers.models.normalization import RMSNorm
from pydantic import ValidationError
from torch.nn import functional

from ablate.geometry import check_devices, possible_devices
from ablate.grid import load_grid
from ablate.plan import make_plan
from ablate.record import Status, read_metrics, read_record
from ablate.source import InputError
from runners.distributed import World
from runners.preflight import with_fields
from runners.run import set_up

GRIDS = Path(__file__).parents[2] / "grids"
SMALL = {
    "rollout.num_groups": 4,
    "rollout.group_size": 3,
    "rollout.num_steps": 4,
    "rollout.batch_size": 4,
    "update.updates_per_epoch": 2,
    "update.micro_batch_size": 8,
    "update.epsilon": 1e-3,  # Adam makes rounding of gradients near zero visible, else
    "evaluation.num_prompts": 7,
    "evaluation.num_steps": 2,
    "evaluation.every": 2,
    "budget.epochs": 2,
}
CELLS = {
    f"{c.objective}/{c.estimator}/{c.sampler}": c
    for c in make_plan(load_grid(GRIDS / "tiny.yaml", SMALL)).cells
    if c.seed == 0
}
EPOCHS = 20
# A server that has imported everything once; a process forked from it starts at once and can be killed.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["runners.train"])


def train(folder: Path, rank: int, size: int, port: int, double: bool, broken: int | None) -> None:
    """What each process of a cell does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    from runners import policy, train  # noqa: PLC0415

    torch.set_num_threads(1)
    if rank == broken:
        train.collect = fail
    if double:
        torch.set_default_dtype(torch.float64)
        in_double(policy.SD3Policy)
    raise SystemExit(0 if train.train_cell(folder).status.final else 1)


def fail(_: object) -> None:
    raise ValueError("this process is broken")


def in_double(policy: Any) -> None:
    """Make network, latents and velocities float64, so that the order of sums is all that differs."""
    real_init = policy.__init__

    def init(self: Any, *given: Any) -> None:
        real_init(self, *given)
        self.network.double()
        for p in self.trainable:
            p.data = p.data.double()
        self._copies = {name: [t.double() for t in tensors] for name, tensors in self._copies.items()}

    def call(self: Any, x: torch.Tensor, sigma: torch.Tensor, conditioning: Any) -> torch.Tensor:
        output: torch.Tensor = self.network(
            hidden_states=x.double(),
            timestep=1000 * sigma.double(),
            encoder_hidden_states=conditioning.tokens.double(),
            pooled_projections=conditioning.pooled.double(),
            return_dict=False,
        )[0]
        return output

    policy.__init__, policy._call = init, call
    # two places stay in float32: variances, and sines, whose last bit depends on the place in the batch
    RMSNorm.forward = lambda norm, x: functional.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
    sines = Timesteps.forward
    Timesteps.forward = lambda embedding, t: torch.cat([sines(embedding, each) for each in t.split(1)])


def start(folder: Path, size: int, *, double: bool = False, broken: int | None = None) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[BaseProcess] = [
        CONTEXT.Process(target=train, args=(folder, rank, size, port, double, broken)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: Sequence[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Exit codes; what goes on for longer is killed, as a launcher does with the others of a process that died."""
    for process in processes:
        process.join(timeout)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file  # noqa: PLC0415

    (path,) = (folder / "weights").rglob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("name", ["grpo/trajectory/sde", "gspo/elbo-adaptive/ode"])
def test_two_processes_do_what_one_does(name: str, tmp_path: Path) -> None:
    folders = [folder_of(CELLS[name], tmp_path / str(size)) for size in (1, 2)]
    for size, folder in enumerate(folders, start=1):
        assert finish(start(folder, size, double=True)) == [0] * size
    one, two = (read_metrics(folder) for folder in folders)
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith("cost/") and key != "device_hours":
                assert a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-12), key
        assert a["cost/forwards"] == b["cost/forwards"]
        assert a["cost/backwards"] == b["cost/backwards"]
    for a, b in zip(*(weights(folder).values() for folder in folders), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    record = read_record(folders[1])
    assert record is not None
    assert record.provenance is not None
    assert record.provenance.num_devices == 2
    for name_of_file in ("before.png", "after.png", "before.jsonl", "after.jsonl"):
        assert (folders[1] / "samples" / name_of_file).exists()


def test_two_processes_leave_out_the_same_groups_as_one(tmp_path: Path) -> None:
    """Shares differ then: gradients are weighted by the samples that each process still has."""
    cell = CELLS["grpo/elbo-simple/ode"]
    scoring = cell.recipe.scoring.model_copy(update={"max_missing": 0.9})
    folders = [
        folder_of(cell, tmp_path / str(size), reward="own_rewards:not_of_circles", scoring=scoring) for size in (1, 2)
    ]
    for size, folder in enumerate(folders, start=1):
        assert finish(start(folder, size, double=True)) == [0] * size
    one, two = (read_metrics(folder) for folder in folders)
    assert 0 < max(line.get("rollout/missing_groups", 0) for line in one) < 1
    for a, b in zip(one, two, strict=True):
        for key in ("rollout/missing_groups", "train/grad_norm", "train/loss", "eval/score"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-6, abs=1e-12), key
    for a, b in zip(*(weights(folder).values() for folder in folders), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_torchrun_trains_a_cell_as_one_process_does(tmp_path: Path) -> None:
    """With the command of docs/several-devices.md, on one node."""
    cell = CELLS["gspo/elbo-adaptive/ode"]
    budget = cell.recipe.budget.model_copy(update={"epochs": 1})
    alone, together = (folder_of(cell, tmp_path / name, budget=budget) for name in ("alone", "together"))
    assert finish(start(alone, 1)) == [0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = [*command, "--shutdown-timeout", "60", "-m", "ablate.cli", "cell", str(together)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(GRIDS.parent)}
    done = subprocess.run(given, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{cell.id} done") == 1
    record = read_record(together)
    assert record is not None
    assert record.provenance is not None
    assert (record.status, record.provenance.num_devices) == (Status.DONE, 2)
    for a, b in zip(read_metrics(alone), read_metrics(together), strict=True):
        assert a["eval/score"] == pytest.approx(b["eval/score"], abs=1e-3)
        assert a["cost/forwards"] == b["cost/forwards"]


def lines(folder: Path) -> list[str]:
    """metrics.jsonl without what the clock decides."""
    kept = []
    for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True):
        values = json.loads(line)
        kept.append(json.dumps({k: v for k, v in values.items() if k != "device_hours" and not k.startswith("cost/")}))
    return kept


@pytest.mark.parametrize(("size", "kills"), [(1, 12), (2, 6)])
def test_a_cell_killed_at_any_point_resumes_to_the_same_bytes(size: int, kills: int, tmp_path: Path) -> None:
    cell = CELLS["gspo/elbo-adaptive/mixed"]
    budget = cell.recipe.budget.model_copy(update={"epochs": EPOCHS})
    whole, parts = (folder_of(cell, tmp_path / name, budget=budget, checkpoint_every=1) for name in ("whole", "parts"))
    assert finish(start(whole, size)) == [0] * size
    random_moment = random.Random(0)
    for _ in range(kills):
        epochs_before = len(read_metrics(parts))
        processes = start(parts, size)
        wanted = min(epochs_before + random_moment.choice([0, 1, 2]), EPOCHS - 2)
        victim = random_moment.choice(processes)
        while victim.is_alive() and len(read_metrics(parts)) < wanted:
            victim.join(0.005)
        victim.join(random_moment.uniform(0, 0.2))
        victim.kill()
        assert -9 in finish(processes, timeout=3)
    assert finish(start(parts, size)) == [0] * size
    record = read_record(parts)
    assert record is not None
    assert record.status is Status.DONE
    assert record.attempts > kills / 2  # some were killed before they could write
    assert lines(parts) == lines(whole)


def test_the_geometry_is_kept_or_refused_with_the_nearest_one() -> None:
    recipe = CELLS["grpo/trajectory/sde"].recipe
    large = recipe.model_copy(
        update={
            "rollout": recipe.rollout.model_copy(update={"num_groups": 48}),
            "evaluation": recipe.evaluation.model_copy(update={"num_prompts": 600}),
        }
    )
    assert possible_devices(large) == [1, 2, 3, 4, 6, 8, 12, 24]
    for num_devices in possible_devices(large):
        check_devices(large, num_devices)
    with pytest.raises(InputError) as refused:
        check_devices(large, 5)
    assert str(refused.value) == (
        "rollout.num_groups = 48 in update.updates_per_epoch = 2 gives 24 groups per update, which 5 devices cannot "
        "share evenly: take 4 or 6 devices, or rollout.num_groups 40 or 50"
    )
    with pytest.raises(ValidationError, match="which 5 devices cannot share evenly"):
        with_fields(CELLS["grpo/trajectory/sde"], {"rollout.num_groups": 48, "devices": 5})
    few = large.model_copy(update={"evaluation": large.evaluation.model_copy(update={"num_prompts": 5})})
    assert possible_devices(few) == [1, 2, 3, 4]
    with pytest.raises(InputError, match=r"evaluation.num_prompts = 5 is less than one for each of 6 .* or 4 devices"):
        check_devices(few, 6)


def test_fewer_held_out_prompts_than_processes_are_refused_by_all(tmp_path: Path) -> None:
    cell, path = CELLS["grpo/trajectory/sde"], tmp_path / "prompts.txt"
    path.write_text("one\ntwo\nthree\n")  # a split gets every other line
    prompts = cell.recipe.prompts.model_copy(update={"train": str(path), "evaluation": str(path)})
    cell = cell.model_copy(update={"recipe": cell.recipe.model_copy(update={"prompts": prompts})})
    for rank in range(2):
        with pytest.raises(
            InputError, match=r"leaves 1 prompt for evaluation.split .evaluation., fewer than 2 devices"
        ):
            set_up(tmp_path, cell, world=World(device=torch.device("cpu"), rank=rank, size=2))


def test_dynamic_sampling_stays_on_one_device() -> None:
    recipe = CELLS["grpo/trajectory/sde"].recipe
    rounds = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"resample_rounds": 2})})
    assert possible_devices(rounds) == [1]
    with pytest.raises(InputError, match="one device"):
        check_devices(rounds, 2)


def test_where_one_process_fails_its_reason_is_the_record(tmp_path: Path) -> None:
    """The second process meets an error; the first, which waits for it, does not cover it up."""
    folder = folder_of(CELLS["grpo/trajectory/sde"], tmp_path / "cell")
    processes = start(folder, 2, broken=1)
    assert finish(processes) == [1, 1]
    record = read_record(folder)
    assert record is not None
    assert (record.status, record.message) == (Status.FAILED, "ValueError: this process is broken")
    assert "this process is broken" in (folder / "traceback.txt").read_text()
