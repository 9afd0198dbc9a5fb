"""benchmark/sweep.py: what is killed goes on, what is finished is not repeated. Tiny runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import d4rl_arrays, write_hdf5

pytest.importorskip("ray", reason="needs benchmark/requirements.txt")

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = ("eval-frequency=200", "eval-episodes=1", "batch-size=8", "no-cuda")


def sweep(tmp_path, *flags):
    """Start the program as a user would, in tmp_path."""
    command = [sys.executable, REPOSITORY / "benchmark/sweep.py", "--scripts", REPOSITORY / "dmg_offline.py"]
    command += ["--env-ids", "Hopper-v4", *flags]
    with (tmp_path / "sweep.log").open("a") as log:
        return subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)


def result(process, tmp_path):
    """Exit code and all that was printed."""
    return process.wait(timeout=180), (tmp_path / "sweep.log").read_text()


def wait_for(condition):
    for _ in range(900):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("nothing came")


def the_run(tmp_path, word=""):
    (folder,) = (tmp_path / "benchmark-runs").glob(f"*{word}*")
    return folder


def attempts(folder):
    return json.loads((folder / "status.json").read_text())["attempts"]


def evaluations(folder):
    """Rows of the only eval.csv without the wall seconds, which no two runs share."""
    (path,) = folder.glob("runs/*/eval.csv")
    return [row.rsplit(",", 1)[0] for row in path.read_text().splitlines()]


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[1])


def test_killed_diverged_and_wrong_runs_and_a_second_start(tmp_path):
    arrays = d4rl_arrays()
    write_hdf5(tmp_path / "good.hdf5", arrays)
    write_hdf5(tmp_path / "diverging.hdf5", arrays | {"rewards": 1e25 * arrays["rewards"]})
    write_hdf5(tmp_path / "wrong.hdf5", d4rl_arrays(state_dim=5))
    flags = ["--seeds", "0", "--values", "dataset-path=good.hdf5,diverging.hdf5,wrong.hdf5", *TINY]
    flags.append("gradient-steps=400")
    process = sweep(tmp_path, *flags)
    (path,) = wait_for(lambda: list(tmp_path.glob("benchmark-runs/*good*/runs/*/eval.csv")))
    good = the_run(tmp_path, "good")
    wait_for(path.with_name("checkpoint.pt").exists)
    os.kill(attempts(good)[0]["pid"], signal.SIGKILL)
    code, printed = result(process, tmp_path)

    assert code == 1 and "Traceback" not in printed, printed
    assert [x["exit_code"] for x in attempts(good)] == [-signal.SIGKILL, 0]
    first, second = (line for line in (good / "output.log").read_text().splitlines() if line.startswith("$ "))
    assert "--resume" not in first and f"--resume {path.parent}" in second
    assert [int(row.split(",")[0]) for row in evaluations(good)[1:]] == [0, 200, 400]
    assert [x["exit_code"] for x in attempts(the_run(tmp_path, "diverging"))] == [3]  # a result
    assert [x["exit_code"] for x in attempts(the_run(tmp_path, "wrong"))] == [2]  # no use to try again
    assert "3 runs: 1 diverged, 1 finished, 1 wrong input" in printed
    assert "observations of shape" in printed

    before = path.stat().st_mtime_ns
    flags[3] = "dataset-path=good.hdf5,diverging.hdf5"
    code, printed = result(sweep(tmp_path, *flags), tmp_path)
    assert code == 0 and "2 runs: 1 diverged, 1 finished" in printed
    assert "finished at step 400, return " in result(sweep(tmp_path, *flags, "--dry-run"), tmp_path)[1]
    assert len(attempts(good)) == 2 and len(attempts(the_run(tmp_path, "diverging"))) == 1
    assert path.stat().st_mtime_ns == before


def test_two_nodes_one_and_a_worker_killed_in_the_middle_and_nothing_is_lost(tmp_path):
    from ray.cluster_utils import Cluster

    write_hdf5(tmp_path / "hopper.hdf5", d4rl_arrays())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        flags = ["--values", "dataset-path=hopper.hdf5", *TINY, "gradient-steps=800", "--seeds", "0", "1"]
        flags += ["--ray-address", cluster.address]
        process = sweep(tmp_path, *flags)

        def on_second_node():
            """The run that the second node works on, once it has a checkpoint to lose."""
            for folder in (tmp_path / "benchmark-runs").glob("*"):
                saved = list(folder.glob("runs/*/checkpoint.pt"))
                if saved and second.node_id.startswith(attempts(folder)[0]["node"]):
                    return folder

        folder = wait_for(on_second_node)
        (other,) = {*(tmp_path / "benchmark-runs").iterdir()} - {folder}
        wait_for(lambda: list(other.glob("runs/*/checkpoint.pt")))
        # a worker, as a machine short of memory does
        os.kill(parent(attempts(other)[0]["pid"]), signal.SIGKILL)
        worker = parent(attempts(folder)[0]["pid"])
        for pid in (parent(worker), worker):  # the node at once: neither can end the script any more
            os.kill(pid, signal.SIGKILL)
        cluster.remove_node(second, allow_graceful=False)
        for killed in (other, folder):
            wait_for(lambda killed=killed: not Path(f"/proc/{attempts(killed)[0]['pid']}").exists())
            assert evaluations(killed)[-1].split(",")[0] != "800"  # no orphan that went on to its end
        code, printed = result(process, tmp_path)
    finally:
        cluster.shutdown()

    assert code == 0, printed
    assert "2 runs: 2 finished" in printed and printed.count("; again") == 2
    lost, again = attempts(folder)
    assert lost["node"] != again["node"]
    for killed in (other, folder):
        assert [x["exit_code"] for x in attempts(killed)] == [None, 0]
        assert [int(row.split(",")[0]) for row in evaluations(killed)[1:]] == [0, 200, 400, 600, 800]


def test_a_plan_is_every_combination_in_folders_that_do_not_depend_on_the_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from sweep import Args, plan

    scripts = (str(REPOSITORY / "dmg_offline.py"), str(REPOSITORY / "td3bc.py"))
    args = {"env_ids": ("hopper-medium-v2", "D4RL/antmaze/umaze-v1"), "scripts": scripts, "seeds": (0, 1, 2)}
    runs = plan(Args(**args, values=("lam=0,0.5", "nu=0.1", "no-cuda")))
    assert len(runs) == len({run.folder for run in runs}) == 2 * 2 * 3 * 2
    words = "--env-id hopper-medium-v2 --seed 0 --lam 0 --no-cuda --nu 0.1"
    assert " ".join(runs[0].command[2:]) == words
    assert {run.folder.name.split("__")[1] for run in runs} == {"hopper-medium-v2", "D4RL-antmaze-umaze-v1"}
    other_order = plan(Args(**args, values=("no-cuda", "nu=0.1", "lam=0.5,0")))
    assert {run.folder for run in other_order} == {run.folder for run in runs}
    args |= {"env_ids": ("Hopper-v4",), "scripts": scripts[:1]}
    run, *_ = plan(Args(**args, values=("dataset-path=a/b.hdf5",)))
    assert run.command[-2:] == ("--dataset-path", str(tmp_path / "a/b.hdf5"))  # runs work in other folders
    for flags in ({"values": ("seed=1",)}, {"values": ("lam=0.1,",)}, {"scripts": ("nowhere.py",)}):
        with pytest.raises(ValueError, match=r"--seeds|lam=0.1,|nowhere.py"):
            plan(Args(**args | flags))
    assert not list(tmp_path.iterdir())
