"""benchmark/sweep.py: what is killed resumes, what is finished or diverged is not repeated. Tiny runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module, reload
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import d4rl_arrays, refusal, write_hdf5

pytest.importorskip("ray", reason="needs benchmark/requirements.txt")

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = ("eval-frequency=200", "eval-episodes=1", "batch-size=8", "no-cuda")


def start(tmp_path, *flags):
    """Start the program as a user would, in tmp_path; it prints into sweep.log."""
    command = [sys.executable, REPOSITORY / "benchmark/sweep.py", "--scripts", REPOSITORY / "dmg_offline.py"]
    command += ["--env-ids", "Hopper-v4", *flags]
    with (tmp_path / "sweep.log").open("a") as log:
        return subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)


def wait_for(condition):
    tries = (condition() or time.sleep(0.1) for _ in range(3000))
    return next(filter(None, tries))


def attempts(folder):
    return json.loads((folder / "status.json").read_text())["attempts"]


def steps_of(folder):
    """Steps in the only eval.csv."""
    (path,) = folder.glob("runs/*/eval.csv")
    return [int(row.split(",")[0]) for row in path.read_text().splitlines()[1:]]


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[1])


def test_killed_diverged_and_wrong_runs_and_a_second_start(tmp_path):
    arrays = d4rl_arrays()
    write_hdf5(tmp_path / "good.hdf5", arrays)
    write_hdf5(tmp_path / "diverging.hdf5", arrays | {"rewards": 1e25 * arrays["rewards"]})
    write_hdf5(tmp_path / "wrong.hdf5", d4rl_arrays(state_dim=5))
    paths = "dataset-path=good.hdf5,diverging.hdf5"
    flags = ["--seeds", "0", "--values", *TINY, "gradient-steps=400"]
    process = start(tmp_path, *flags, f"{paths},wrong.hdf5,absent.hdf5")
    (path,) = wait_for(lambda: list(tmp_path.glob("benchmark-runs/*good*/runs/*/checkpoint.pt")))
    good = path.parents[2]
    os.kill(attempts(good)[0]["pid"], signal.SIGKILL)
    code, printed = process.wait(timeout=180), (tmp_path / "sweep.log").read_text()
    assert code == 1 and "Traceback" not in printed, printed
    first, second = (line for line in (good / "output.log").read_text().splitlines() if line.startswith("$ "))
    assert "--resume" not in first and f"--resume {path.parent}" in second
    assert steps_of(good) == [0, 200, 400]
    for name, codes in {"good": [-9, 0], "diverging": [1], "wrong": [1], "absent": [2]}.items():
        (folder,) = tmp_path.glob(f"benchmark-runs/*{name}*")
        assert [x["exit_code"] for x in attempts(folder)] == codes
    assert "4 runs: 1 diverged, 1 finished, 2 wrong input" in printed
    assert "wrong input, ValueError: " in printed and "there is no file " in printed
    assert "diverged at step 200, return nan" in printed and "finished at step 400, return " in printed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("benchmark-runs/*/status.json")}
    assert start(tmp_path, *flags, paths).wait(timeout=180) == 0
    assert "2 runs: 1 diverged, 1 finished" in (tmp_path / "sweep.log").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_an_attempt_finds_the_bundled_set_and_refuses_a_changed_script(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("MINARI_DATASETS_PATH", "datasets")  # the run works in another folder
    sweep, node = reload(import_module("sweep")), SimpleNamespace(get_node_id=lambda: "a node")
    monkeypatch.setattr(sweep.ray, "get_runtime_context", lambda: node)
    script = shutil.copy("dmg_offline.py", tmp_path)
    flags = {"seeds": (0, 1), "scripts": (script,), "folder": tmp_path, "values": ("gradient-steps=2", *TINY)}
    done, left = sweep.plan(args := sweep.Args(("dmg/halfcheetah/medium-replay-v0",), **flags))
    sweep.attempt(done, 1, False)
    assert done.state == "finished" and done.progress.startswith(" at step 2, score ")
    (path,) = done.folder.glob("runs/*/eval.csv")
    path.write_text(path.read_text().splitlines()[0])
    assert done.progress == ""  # before the first evaluation
    Path(script).write_text(Path(script).read_text() + "# changed")
    sweep.attempt(left, 1, False)
    assert left.state == "wrong input" and not (left.folder / "runs").exists()
    assert not {run.folder for run in sweep.plan(args)} & {done.folder, left.folder}
    states = {"FloatingPointError": "diverged", "TypeError": "failed (1)", "ValueError": "failed (-9)"}
    for error, state in states.items():
        code = -9 if "-9" in state else 1  # killed, whatever it printed
        left.record([{"exit_code": code, "error": sweep.error_in(f"12 % done\n{error}: x\nwandb: sent\n")}])
        assert left.state == state
    left.record([{"exit_code": 1, "error": "ValueError: cannot download http://x (timed out): put"}])
    assert left.state == "failed (1)"  # is retried


def test_a_node_is_killed_in_the_middle_and_nothing_is_lost(tmp_path):
    from ray.cluster_utils import Cluster

    write_hdf5(tmp_path / "hopper.hdf5", d4rl_arrays())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        flags = ["--values", "dataset-path=hopper.hdf5", *TINY, "gradient-steps=800", "--seeds", "0"]
        process = start(tmp_path, *flags, "--ray-address", cluster.address)
        (path,) = wait_for(lambda: list(tmp_path.glob("benchmark-runs/*/runs/*/checkpoint.pt")))
        folder, pid = path.parents[2], attempts(path.parents[2])[0]["pid"]
        for killed in (parent(parent(pid)), parent(pid)):  # at once: neither can end the script any more
            os.kill(killed, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{pid}").exists())
        assert steps_of(folder)[-1] != 800  # no orphan that ran to its end
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        code, printed = process.wait(timeout=180), (tmp_path / "sweep.log").read_text()
    finally:
        cluster.shutdown()
    assert code == 0 and "1 runs: 1 finished" in printed and printed.count("; again") == 1, printed
    lost, again = attempts(folder)
    assert (lost["exit_code"], again["exit_code"]) == (None, 0) and lost["node"] != again["node"]
    assert steps_of(folder) == [0, 200, 400, 600, 800]


def test_a_plan_is_every_combination_in_folders_that_do_not_depend_on_the_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from sweep import Args, plan

    scripts = (str(REPOSITORY / "dmg_offline.py"), str(REPOSITORY / "td3bc.py"))
    args = ("hopper-medium-v2", "D4RL/antmaze/umaze-v1"), scripts, (0, 1, 2)
    runs = plan(Args(*args, ("lam=0,0.5", "nu=0.1", "no-cuda")))
    assert len(runs) == len({run.folder for run in runs}) == 2 * 2 * 3 * 2
    words = "--env-id hopper-medium-v2 --seed 0 --lam 0 --no-cuda --nu 0.1"
    assert " ".join(runs[0].command[2:]) == words
    assert {run.folder.name.split("__")[1] for run in runs} == {"hopper-medium-v2", "D4RL-antmaze-umaze-v1"}
    other_order = plan(Args(*args, ("no-cuda", "nu=0.1", "lam=0.5,0")))
    assert {run.folder for run in other_order} == {run.folder for run in runs}
    run, *_ = plan(Args(*args, ("dataset-path=a/b.hdf5",)))
    assert run.command[-2:] == ("--dataset-path", str(tmp_path / "a/b.hdf5"))  # runs work in other folders
    assert "--seeds and --env-ids" in refusal(Args, *args, ("seed=1",))
    assert "lam=0.1, has an empty value" in refusal(Args, *args, ("lam=0.1,",))
    assert "no script nowhere.py" in refusal(Args, ("a",), ("nowhere.py",))
    assert not list(tmp_path.iterdir())
