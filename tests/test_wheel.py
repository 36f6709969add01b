"""A wheel, installed in a new environment, works from another directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path) -> str:
    result = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_the_wheel_trains_and_reports_away_from_the_sources(tmp_path: Path) -> None:
    dist, env, work = tmp_path / "dist", tmp_path / "env", tmp_path / "work"
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, ROOT, cwd=tmp_path)
    (wheel,) = dist.glob("*.whl")
    assert wheel.stat().st_size < 8_000_000
    venv.create(env, with_pip=True)
    python = env / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # the dependencies are those of this environment; its own editable ablate is not seen through a .pth file
    (site,) = env.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])

    work.mkdir()
    shutil.copy(ROOT / "grids" / "quickstart.yaml", work)  # the recipe that it names is in the wheel
    where = run(python, "-c", "import ablate, runners; print(ablate.__file__, runners.__file__)", cwd=work)
    assert all(path.startswith(str(env)) for path in where.split())
    small = ["budget.epochs=1", "rollout.num_groups=3", "rollout.group_size=2", "rollout.num_steps=3"]
    small += ["evaluation.num_prompts=6", "evaluation.num_steps=2"]
    settings = [word for setting in small for word in ("--set", setting)]
    ablate = env / "bin" / "ablate"
    one = ["--only", "sampler=ode", "--seeds", "0"]
    run(ablate, "run", "quickstart.yaml", "--no-tracking", *one, *settings, cwd=work)
    (record,) = work.glob("results/quickstart/*/record.json")
    assert json.loads(record.read_text())["status"] == "done"
    run(ablate, "report", "results/quickstart", cwd=work)
    assert (work / "results" / "quickstart" / "report" / "overview.png").exists()
