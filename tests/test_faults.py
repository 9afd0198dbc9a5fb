"""Nothing is lost: a run that is killed at any moment, or out of disk, goes on later to the same bits.

Runs are forked children of this process: no import to wait for, and each can be killed or limited by itself.
"""

import errno
import importlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from conftest import d4rl_arrays, write_hdf5
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from test_resume import same, scalars

SCRIPTS = ("dmg_offline", "td3bc", "iql", "dmg_finetune")
STEPS = {"dmg_offline": ["gradient"], "td3bc": ["gradient"], "iql": ["gradient", "online"]}
SMALL = ["--env-id", "Pendulum-v1", "--no-cuda", "--eval-frequency", "40", "--eval-episodes", "1", "--batch-size", "8"]


def flags(script, steps, data):
    """A run of `steps` steps, half of them online where there are two kinds."""
    kinds = STEPS.get(script, ["offline", "online"])
    return [*SMALL, "--dataset-path", str(data), *(f"--{kind}-steps={steps // len(kinds)}" for kind in kinds)]


def fork(script, argv, before=lambda module: None, log="log"):
    """The process number of a child that runs a script's main(); before(module) may spoil things in it first."""
    module = importlib.import_module(script)
    if child := os.fork():
        return child
    code = 99
    try:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        sys.argv = [f"{script}.py", *argv]
        before(module)
        code = module.main()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child, seconds=None):
    """Exit code of a child, negative after a signal; None if it still runs after `seconds`."""
    end = None if seconds is None else time.monotonic() + seconds
    while end is None or time.monotonic() < end:
        done, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def complete(script, argv, log="log", **more):
    code = wait(fork(script, argv, log=log, **more))
    return code, Path(log).read_text()


def state(folder):
    """All of the last checkpoint but clock readings and arguments, and eval.csv without its clock."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    kept = {key: x for key, x in checkpoint.items() if key not in ("args", "evaluations", "seconds")}
    rows = [line.rsplit(",", 1)[0] for line in (folder / "eval.csv").read_text().splitlines()]
    return kept | {"rows": [row[:-1] for row in checkpoint["evaluations"]], "csv": rows}


def the_run():
    (folder,) = Path("runs").iterdir()
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Path of a small file for Pendulum; the working folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    return write_hdf5(tmp_path / "pendulum.hdf5", d4rl_arrays(60, 3, 1))


# ---- kills ----
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in_the_middle_of_a_checkpoint(rng):
    left, save = rng.randrange(3), torch.save

    def before(module):
        def half(x, file):
            nonlocal left
            left -= 1
            if left >= 0:
                return save(x, file)
            save(x, buffer := io.BytesIO())
            file.write(buffer.getvalue()[: rng.randrange(buffer.tell())])
            file.flush()
            die()

        module.torch.save = half

    return before


def dies_at_a_rename(rng):
    """Before or after one of the first renames: between eval.csv and the checkpoint, too."""
    count, after = rng.randrange(6), rng.random() < 0.5

    def before(module, replace=os.replace):
        def last(*paths):
            nonlocal count
            count -= 1
            replace(*paths) if count >= 0 or after else None
            die() if count < 0 else None

        module.os.replace = last

    return before


def in_order(folder):
    """TensorBoard reads the files of one second by process number: what came first is first here."""
    older = [*folder.glob("events.out.tfevents.0*")]
    for file in {*folder.glob("*tfevents*")} - {*older}:
        file.rename(folder / f"events.out.tfevents.{len(older):010}.{file.name[20:]}")


def kill_and_resume(script, data, kills, steps, seed):
    """Start a run, stop it `kills` times at random moments, let it end; returns its folder and how it was stopped."""
    rng, argv, stopped = random.Random(seed), flags(script, steps, data), []
    while True:
        folder = next(Path("runs").iterdir(), None) if Path("runs").exists() else None
        if folder and not (folder / "checkpoint.pt").exists():  # nothing was done yet
            shutil.rmtree("runs")
            folder = None
        in_order(folder) if folder else None
        how = rng.choice(("kill", "kill", "checkpoint", "rename", "interrupt", "terminate"))
        spoil = {"checkpoint": dies_in_the_middle_of_a_checkpoint, "rename": dies_at_a_rename}.get(how)
        last = len(stopped) == kills
        more = {"before": spoil(rng)} if spoil and not last else {}
        child = fork(script, ["--resume", str(folder)] if folder else argv, **more)
        if last:
            assert wait(child) == 0, Path("log").read_text()
            return the_run(), stopped
        code = wait(child, rng.uniform(0, 1.5) if not spoil else 20)
        if code is None:
            number = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}.get(how, signal.SIGKILL)
            os.kill(child, number)
            code = wait(child)
            ended = 0  # it may end by itself just before the kill
            assert code in (-number, 128 + number, ended), (number, code, Path("log").read_text())
        assert code in (-9, 0, 130, 143, -2, -15), (how, code, Path("log").read_text())
        stopped += [how]


def check_kills(script, data, kills, steps, seed=0):
    code, log = complete(script, flags(script, steps, data))
    assert code == 0, log
    whole = the_run().rename("whole")
    Path("runs").rmdir()
    folder, stopped = kill_and_resume(script, data, kills, steps, seed)
    assert same(state(folder), state(whole)), stopped
    assert scalars(folder) == scalars(whole), stopped  # no step twice, none missing
    assert "hyperparameters/text_summary" in tensors(folder), stopped
    assert not list(folder.glob("*.tmp")) or stopped[-1] in ("kill", "checkpoint", "rename"), stopped


def tensors(folder):
    return EventAccumulator(str(folder)).Reload().Tags()["tensors"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_killed_right_after_each_checkpoint_keeps_what_was_logged_before_it(script, data):
    argv, saved = flags(script, 80, data), Path("saved")

    def before(module, replace=os.replace, record=RecordWriter.write):
        def last(source, path):
            replace(source, path)
            if path.name == "checkpoint.pt":
                with saved.open("a") as file:
                    file.write("x")
                die()

        module.os.replace = last
        RecordWriter.write = lambda *x: (time.sleep(0.02), record(*x))  # a slow disk

    assert complete(script, argv)[0] == 0
    whole = the_run().rename("whole")
    for kills in (1, 2, 3):  # the last one at the end of the run
        assert complete(script, argv, before=before)[0] == -signal.SIGKILL and saved.read_text() == kills * "x"
        in_order(the_run())
        argv = ["--resume", str(the_run())]
    code, log = complete(script, argv)
    assert code == 0, log
    assert same(state(the_run()), state(whole)) and scalars(the_run()) == scalars(whole)
    assert tensors(the_run()) == tensors(whole)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(script, data):
    check_kills(script, data, 5, 320)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_killed_at_30_random_moments_ends_in_the_same_bits(script, seed, data):
    check_kills(script, data, 30, 1600, seed)


# ---- disks ----
def full(size):
    """No file may grow past `size` bytes: what a full disk does, wherever the tests run."""
    return lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_event_fits(_):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    RecordWriter.write = fail  # a bound on the size of files would hit the log too


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished short run of each script in it, to copy."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patched:
        path = write_hdf5(folder / "pendulum.hdf5", d4rl_arrays(60, 3, 1))
        for script in SCRIPTS:
            (folder / script).mkdir()
            patched.chdir(folder / script)
            assert complete(script, flags(script, 80, path))[0] == 0, Path("log").read_text()
    return folder


@pytest.fixture
def run(finished, data):
    """run(script): the folder of a finished run in the working folder, and the flags that make it go on."""

    def copy(script):
        shutil.copytree(finished / script / "runs", "runs")
        kind = STEPS.get(script, ["online"])[-1]
        return the_run(), ["--resume", str(the_run()), f"--{kind}-steps=160"]

    return copy


FAULTS = {
    "no checkpoint fits": (full(200_000), "cannot write {}/checkpoint.pt: "),
    "no event fits": (no_event_fits, "cannot write to {}: [Errno 28] No space left"),
    "checkpoint.pt cannot be written": ("checkpoint.pt.tmp", "cannot write {}/checkpoint.pt: "),
    "eval.csv cannot be written": ("eval.csv.tmp", "cannot write {}/eval.csv: "),
}


@pytest.mark.parametrize(
    "script, name",
    [*(("dmg_finetune", name) for name in FAULTS), *((script, "no checkpoint fits") for script in SCRIPTS[:3])],
)
def test_what_cannot_be_written_ends_the_run_and_leaves_the_old_files(script, name, run):
    folder, argv = run(script)
    how, words = FAULTS[name]
    if isinstance(how, str):
        (folder / how).mkdir()
        how = full(10**9)
    old = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    code, log = complete(script, argv, before=how)
    assert code == 2 and words.format(folder) in log, log
    kept = old if "eval.csv" in words or "cannot write to" in words else old.keys() - {"eval.csv"}  # one row ahead
    assert all((folder / name).read_bytes() == old[name] for name in kept)
    assert (folder / "eval.csv").read_bytes().startswith(old["eval.csv"])
    assert "main()" not in log and not (folder / "checkpoint.pt.tmp").is_file(), log


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("script", ["dmg_offline", "dmg_finetune"])
def test_a_disk_that_fills_up_ends_the_run_and_leaves_the_old_files(script, finished, data, small_disk, monkeypatch):
    monkeypatch.chdir(small_disk)
    source = next((finished / script / "runs").iterdir())
    size = (source / "checkpoint.pt").stat().st_size
    subprocess.run(["mount", "-o", f"remount,size={int(1.7 * size)}", str(small_disk)], check=True)
    shutil.copytree(source, folder := Path("runs", source.name))
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    kind = STEPS.get(script, ["online"])[-1]
    argv = ["--resume", str(folder), f"--{kind}-steps=160"]
    code, log = complete(script, argv, log=finished / "log")
    assert code == 2 and f"cannot write {folder}/checkpoint.pt: [Errno 28] No space left" in log, log
    assert all((folder / name).read_bytes() == x for name, x in old.items() if name != "eval.csv")
    subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(small_disk)], check=True)
    assert complete(script, argv, log=finished / "log")[0] == 0


def test_a_minari_set_on_a_full_disk_leaves_nothing_and_is_written_later(data, small_disk, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(small_disk))
    (small_disk / "ballast").write_bytes(bytes(4 * 2**20 - 20_000))
    argv = ["--env-id=Pendulum-v1", "--from-scratch", "--learning-starts=300", "--online-steps=300", "--no-cuda"]
    code, log = complete("dmg_finetune", [*argv, "--eval-episodes=1", "--save-dataset=my/pendulum-v0"])
    assert code == 2 and "my/pendulum-v0: No space left" in log and str(small_disk) in log, log
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    (small_disk / "ballast").unlink()
    code, log = complete("dmg_finetune", ["--resume", str(the_run())])
    assert code == 0 and (small_disk / "my/pendulum-v0/data/metadata.json").exists(), log


@pytest.mark.parametrize("script", ["td3bc", "iql"])
def test_a_folder_for_runs_that_cannot_be_made_is_refused_with_its_path(script, data):
    Path("runs").write_text("a file")
    code, log = complete(script, flags(script, 80, data))
    assert code == 2 and "cannot make runs/" in log and "Traceback" not in log, log
