"""Every finding of the doctor has its cause, and its remedy."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sd35 import ODE, write_pipeline
from sd35 import cell as sd35_cell
from typer.testing import CliRunner

from ablate.cli import app
from ablate.grid import load_grid
from ablate.plan import Cell, make_plan
from ablate.record import Record, Status
from runners import doctor, dry_run, preflight
from runners.doctor import examine
from runners.dry_run import smallest
from runners.memory_estimate import MemoryEstimate
from runners.preflight import Finding, estimated, memory, with_fields

GRIDS = Path(__file__).parents[2] / "grids"


def cells(name: str = "quickstart", **settings: Any) -> tuple[Cell, ...]:
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return make_plan(load_grid(GRIDS / f"{name}.yaml", given)).cells


def levels(found: list[Finding]) -> dict[str, str]:
    return {f"{finding.what}: {finding.remedy}": finding.level for finding in found}


def test_nothing_stands_between_the_quickstart_and_its_first_cell(tmp_path: Path) -> None:
    found = list(examine(cells(), tmp_path))
    assert {finding.level for finding in found} == {"ok"}
    assert any("two epochs of two images, evaluation, a restart and the export" in finding.what for finding in found)
    assert any("GiB for weights and checkpoints" in finding.what for finding in found)


@pytest.mark.parametrize(
    ("settings", "level", "part"),
    [
        ({"model__resolution": 33}, "problem", "model.resolution 33 is no multiple of 16: such as 32"),
        ({"model__resolution": 64}, "warning", "reward scenes looks for shapes of the embedded world, 32 pixels wide"),
        ({"evaluation__num_prompts": 5000}, "ok", "reward scenes-1"),
        ({"reward": "jpeg"}, "ok", "reward jpeg"),
        ({"update__num_points": 500}, "warning", "update.num_points 500: elbo-adaptive and ode have 8"),
        ({"model__path": "nobody/nothing"}, "problem", "the hub cannot be reached"),
    ],
)
def test_each_finding(settings: dict[str, Any], level: str, part: str, tmp_path: Path, monkeypatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("runners.hub.HfApi.model_info", offline)
    found = levels(list(examine(cells(**settings), tmp_path, dry_run=False)))
    assert [value for text, value in found.items() if part in text] == [level]


def test_fewer_prompts_than_asked_for_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a\nb\nc\n")
    (tmp_path / "held-out.txt").write_text("d\ne\nf\ng\n")
    given = {"train": str(tmp_path / "train.txt"), "evaluation": str(tmp_path / "held-out.txt")}
    found = levels(
        list(
            examine(
                cells(prompts__train=given["train"], prompts__evaluation=given["evaluation"]), tmp_path, dry_run=False
            )
        )
    )
    assert any(
        "2 prompts in split evaluation, of 300 asked for: set evaluation.num_prompts to 2" in text for text in found
    )


@pytest.mark.parametrize("stage", ["evaluate", "train_epoch", "export", "load"])
def test_a_dry_run_that_fails_is_a_problem_with_its_message(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(dry_run, stage, broken)
    found = doctor._dry_run(cells()[0])
    assert found.level == "problem"
    assert "OutOfMemoryError: too large" in found.what


def test_a_dry_run_goes_on_from_its_own_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run.checkpoint, "save", lambda *_: None)
    found = doctor._dry_run(cells()[0])
    assert found.level == "problem"
    assert "the checkpoint that was just saved is not found again" in found.what


# devices, drivers, rewards


@pytest.mark.parametrize(
    ("answer", "available", "level", "part"),
    [
        ("550.54.15\n550.54.15\n", True, "ok", "NVIDIA driver 550.54.15; torch is built for CUDA 12.8"),
        (
            "470.1\n",
            False,
            "warning",
            "driver 470.1; torch is built for CUDA 12.8, and sees no device: update the driver",
        ),
        (subprocess.TimeoutExpired("nvidia-smi", 10), True, "warning", "nvidia-smi does not answer (TimeoutExpired)"),
        (FileNotFoundError(), False, None, ""),
    ],
)
def test_the_driver_is_a_finding(
    answer: object, available: bool, level: str | None, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], *, timeout: float, **_: object) -> SimpleNamespace:
        assert command[0] == "nvidia-smi"
        assert timeout <= 10
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    found = levels(list(doctor._driver()))
    assert list(found.values()) == ([level] if level else [])
    assert all(part in text for text in found)


def test_without_cuda_there_is_no_driver_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert list(doctor._driver()) == []


def test_each_reward_and_each_member_of_a_panel_is_a_finding() -> None:
    panel = ["background", "jpeg", "own_rewards:raises", "own_rewards:undefined"]
    found = levels(list(doctor._rewards(cells(reward={"jpeg": 1, "scenes": 2}, evaluation__panel=panel))))
    assert [(text.split(": ")[0], level) for text, level in found.items()] == [
        ("reward jpeg-1 passes its self-check", "ok"),
        ("reward scenes-1 passes its self-check", "ok"),
        ("reward background-1 passes its self-check", "ok"),
        ("reward own_rewards:raises", "problem"),
        ("reward own_rewards:undefined", "problem"),
    ]
    assert any("ConnectionError: no server at port 18085" in text for text in found)
    assert any("expected 3 finite scores, got [nan nan nan]" in text for text in found)


# memory


def needed(cell: Cell, num_devices: int = 1) -> MemoryEstimate:
    found = estimated(with_fields(cell, {"devices": num_devices}))
    assert isinstance(found, MemoryEstimate)
    return found


def test_several_devices_share_what_one_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are shared between devices, weights and batches are not."""
    fields = {"rollout.group_size": 4096, "rollout.batch_size": 1, "update.micro_batch_size": 1}
    cell = with_fields(cells()[0], fields)
    alone, together = needed(cell).peak, needed(cell, 4).peak
    assert together < alone / 2
    monkeypatch.setattr(preflight, "device_memory", lambda: (int(alone * 1.5), 5))
    found = memory(cell)
    assert (found.level, found.remedy) == ("ok", "")
    assert f"{together / 2**30:.2g} GiB on each of 4 devices" in found.what
    monkeypatch.setattr(preflight, "device_memory", lambda: (int(alone), 5))
    found = memory(cell)
    assert (found.level, found.remedy) == ("warning", "devices=4 fits, with the same result")


def test_the_batch_that_is_the_largest_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes, field in (((1024, 8), "rollout.batch_size"), ((8, 512), "update.micro_batch_size")):
        given = {"rollout.batch_size": sizes[0], "update.micro_batch_size": sizes[1]}
        cell = with_fields(cells()[0], given)
        there = needed(with_fields(cell, {field: max(sizes) // 4})).peak / 0.92 + 1
        monkeypatch.setattr(preflight, "device_memory", lambda there=there: (there, 1))
        found = memory(cell)
        assert (found.level, found.remedy) == ("warning", f"{field} {max(sizes) // 4} fits, with the same result")


def test_where_no_batch_is_small_enough_the_model_must_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "device_memory", lambda: (2**20, 1))
    found = memory(cells()[0])
    assert (found.level, found.remedy.split(",")[0]) == ("problem", "model.gradient_checkpointing")


class Process:
    """Asked for the memory of each device, answers or fails."""

    def __init__(self, answer: str | Exception) -> None:
        self.answer, self.asked = answer, ""

    def __call__(self, command: list[str], **_: object) -> SimpleNamespace:
        self.asked = command[-1]
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(stdout=self.answer)


@pytest.mark.parametrize(
    ("answer", "free"), [("7000\n", 7000), ("", 9000), (subprocess.TimeoutExpired("python", 60), 9000)]
)
def test_only_the_memory_of_a_gpu_that_is_free_counts(
    answer: str | Exception, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the fullest device, asked in another process; all of it where nothing can be asked."""
    process = Process(answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=9000))
    monkeypatch.setattr(preflight.subprocess, "run", process)
    assert preflight.device_memory() == (free, 3)
    said: list[int] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (10 - i, 100))
    exec(process.asked, {"print": said.append})
    assert said == [8]


def test_without_a_gpu_the_memory_of_the_machine_that_can_be_had_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything, _ = preflight.device_memory()
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:    7 kB\n")
    monkeypatch.setattr(preflight, "MEMINFO", file)
    assert preflight.device_memory() == (7 * 1024, 1)
    file.write_text("nothing")
    assert preflight.device_memory()[0] >= everything


def test_the_memory_of_a_machine_with_gpus_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    few = needed(cells()[0])
    monkeypatch.setattr(preflight, "host_memory", lambda: 3 * few.host)
    assert list(preflight.host(few, 4)) == []  # one memory, which `memory` has looked at
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert list(preflight.host(few, 2)) == []
    (found,) = preflight.host(few, 4)
    assert found.level == "warning"
    assert "for each of 4 processes" in found.what


def test_cells_that_differ_in_rewards_or_in_guidance_of_evaluations_are_not_alike_in_memory() -> None:
    cell = cells()[0]
    others = [
        with_fields(cell, fields)
        for fields in ({"reward": "jpeg"}, {"evaluation.guidance_scale": 4.5}, {"scoring.offload": True})
    ]
    assert len(preflight.alike_in_memory([cell, cell, *others])) == 4


def test_memory_is_looked_at_before_rewards_take_some_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(doctor, "memory", lambda _: order.append("memory") or Finding("ok", "enough"))
    monkeypatch.setattr(doctor, "host", lambda *_: order.append("host") or [Finding("warning", "little left")])
    monkeypatch.setattr(doctor, "_rewards", lambda _: order.append("rewards") or [])
    found = [finding.what for finding in examine(cells(), tmp_path, dry_run=False)]
    assert order[-1] == "rewards"
    assert set(order) == {"memory", "host", "rewards"}
    assert {"enough", "little left"} < set(found)


# downloads


def test_models_are_downloaded_to_a_disk_that_has_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that differ in more than their weights are downloaded once."""
    model = cells("full")[0].recipe.model
    models = [model, model.model_copy(update={"lora_rank": 4}), model.model_copy(update={"path": "other/model"})]
    monkeypatch.setattr("runners.hub.download_bytes", lambda _: 2**30)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 2**30))
    found = preflight.downloads(models)
    assert found is not None
    assert (found.level, found.what.split(" at ")[0]) == ("ok", "2 GiB of models to download, 3 GiB free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    found = preflight.downloads(models)
    assert found is not None
    assert (found.level, found.remedy) == ("problem", "set HF_HOME to a folder on another disk")
    assert preflight.downloads(cells()[:0]) is None


def test_a_download_that_has_no_room_is_a_problem_of_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runners.hub.download_bytes", lambda _: 2**60)
    found = levels(list(examine(cells(), tmp_path, dry_run=False)))
    assert [level for text, level in found.items() if "of models to download" in text] == ["problem"]


# before a run


def test_a_run_of_the_embedded_model_waits_for_no_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "estimated", None)
    assert list(preflight.preflight(cells("tiny"), tmp_path)) == []


def test_a_run_is_warned_of_memory_and_disk_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = sd35_cell(write_pipeline(tmp_path / "sd35"), ODE, tmp_path)
    peak = needed(cell).peak
    assert list(preflight.preflight([cell], tmp_path)) == []
    monkeypatch.setattr(preflight, "device_memory", lambda: (2 * peak, 1))
    assert list(preflight.preflight([cell], tmp_path)) == []
    (found,) = preflight.preflight([cell], tmp_path, workers=2)
    assert (found.level, found.remedy) == ("warning", "`ablate doctor` on this grid says what fits")
    assert "for each of 2 cells" in found.what
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert [finding.level for finding in preflight.preflight([cell], tmp_path)] == ["problem"]
    (tmp_path / cell.id).mkdir()
    record = Record(id=cell.id, status=Status.DONE, seed=0)
    (tmp_path / cell.id / "record.json").write_text(record.model_dump_json())
    assert list(preflight.preflight([cell], tmp_path, workers=2)) == []


def test_a_run_says_what_it_is_warned_of_and_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("runners.sweep.run_cells", lambda *_, **__: [])
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    given = ["run", str(GRIDS / "quickstart.yaml"), "--results", str(tmp_path), "--no-tracking"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 1  # nothing has run
    assert "problem  0." in result.stdout
    assert "give --results another disk" in result.stdout


def test_a_disk_that_is_too_small_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    last = list(examine(cells(), tmp_path))[-1]
    assert (last.level, last.remedy) == ("problem", "give --results another disk, or set export_weights to false")


@pytest.mark.parametrize("name", ["tiny", "baselines", "paper_table"])
def test_the_smallest_form_of_every_cell_is_legal(name: str) -> None:
    for cell in cells(name):
        small = smallest(cell)
        rollout = small.recipe.rollout
        assert rollout.num_groups % small.recipe.update.updates_per_epoch == 0
        assert type(small.recipe).model_validate(small.recipe.model_dump()) == small.recipe


def test_the_exit_code_says_whether_there_is_a_problem(tmp_path: Path) -> None:
    given = ["doctor", str(GRIDS / "quickstart.yaml"), "--no-dry-run", "--results", str(tmp_path)]
    assert CliRunner().invoke(app, given).exit_code == 0
    result = CliRunner().invoke(app, [*given, "--set", "model.resolution=33"])
    assert result.exit_code == 1
    assert "problem" in result.output
