"""Runs scripts x --env-ids x --values x --seeds on a Ray cluster; start the same command again to go on where it was.

    python benchmark/sweep.py --env-ids hopper-medium-v2 walker2d-medium-v2 --values lam=0,0.25,0.5 nu=0.1 --seeds 0 1 2

Each run is the command a user would type, in a working directory of its own: {folder}/{slug}/ gets runs/ from the
script, output.log (what it printed) and status.json (its attempts: node, exit code). All that a restart knows is there.
"""

import ctypes
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import ray
import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

FINISHED, WRONG_INPUT, DIVERGED = 0, 2, 3  # exit codes of the scripts
PATHS = ("dataset-path", "checkpoint")  # flags that hold a path: the runs work in other folders


@dataclasses.dataclass
class Args:
    env_ids: tuple[str, ...]
    """--env-id of the runs"""
    scripts: tuple[str, ...] = ("dmg_offline.py",)
    """scripts to run"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """--seed of the runs"""
    values: tuple[str, ...] = ()
    """flags of every run, name=value or name=value,value,...: every combination is run; a switch (no-cuda) has no ="""
    folder: Path = Path("benchmark-runs")
    """where the runs are kept; every node of a cluster must see it under this path"""
    retries: int = 3
    """how often a run that failed or was killed is started again, from its checkpoint"""
    cpus_per_run: float = 1
    """CPUs that a run takes, and its OMP_NUM_THREADS"""
    gpus_per_run: float = 0
    """GPUs that a run takes; with 0.25 four runs share one, with 0 a run sees none"""
    ray_address: str | None = None
    """a running Ray cluster, host:port or auto (default: a cluster on this machine for the time of the sweep)"""
    dry_run: bool = False
    """print the commands and what has become of them, run nothing"""


@dataclasses.dataclass(frozen=True)
class Run:
    """One command and its folder. Every property is read from the disk: nothing is lost with the process that asks."""

    command: tuple[str, ...]
    folder: Path

    @property
    def attempts(self) -> list[dict]:
        path = self.folder / "status.json"
        return json.loads(path.read_text())["attempts"] if path.exists() else []

    @property
    def checkpoint(self) -> Path | None:
        """The run folder to go on from."""
        return max(self.folder.glob("runs/*/checkpoint.pt"), key=lambda path: path.stat().st_mtime, default=None)

    @property
    def progress(self) -> tuple[str, str]:
        """Step and score of the last evaluation."""
        rows = [path.read_text().split() for path in self.folder.glob("runs/*/eval.csv")]
        last = max((row[-1].split(",") for row in rows if len(row) > 1), key=lambda row: int(row[0]), default=None)
        return (f"{int(last[0]):,}", f"{float(last[3]):.1f}") if last else ("", "")

    @property
    def is_done(self) -> bool:
        return bool(self.attempts) and self.attempts[-1]["exit_code"] in (FINISHED, DIVERGED)

    def record(self, attempts: list[dict]) -> None:
        temporary = self.folder / "status.json.tmp"
        temporary.write_text(json.dumps({"command": shlex.join(self.command), "attempts": attempts}, indent=2))
        os.replace(temporary, self.folder / "status.json")

    def last_line(self) -> str:
        return re.split(r"[\r\n]+", (self.folder / "output.log").read_text(errors="replace").strip())[-1]


def refuse(condition: bool, sentence: str) -> None:
    if condition:
        print(sentence, file=sys.stderr)
        sys.exit(2)


def plan(args: Args) -> list[Run]:
    """Every run of the sweep. The same flags give the same folder whatever their order."""
    names = [item.split("=")[0] for item in args.values]
    refuse(len(set(names)) < len(names), f"--values names a flag twice: {' '.join(names)}.")
    axes = []
    for item in sorted(args.values, key=lambda item: item.split("=")[0]):
        name, equals, values = item.partition("=")
        name = name.lstrip("-").replace("_", "-")
        refuse(name in ("seed", "env-id", "resume", ""), f"--values {item}: there are --seeds and --env-ids for that.")
        refuse(bool(equals) and not all(values.split(",")), f"--values {item} has an empty value.")
        full = [str(Path(x).resolve()) if name in PATHS else x for x in values.split(",")]
        axes.append([(f"--{name}", x) for x in full] if equals else [(f"--{name}",)])
    runs = {}
    for script, env_id, seed, *flags in itertools.product(args.scripts, args.env_ids, args.seeds, *axes):
        path = Path(script).resolve()
        refuse(not path.is_file(), f"there is no script {script} here: give its path.")
        words = ["--env-id", env_id, "--seed", str(seed), *itertools.chain(*flags)]
        flag_words = ["=".join([flag[0][2:], *(Path(x).name for x in flag[1:])]) for flag in flags]
        slug = re.sub(r"[^\w=.-]+", "-", "__".join([path.stem, env_id, str(seed), *flag_words]))[:150]
        digest = hashlib.sha256(shlex.join([path.stem, *words]).encode()).hexdigest()[:6]
        folder = args.folder.resolve() / f"{slug}__{digest}"
        runs[folder] = Run((sys.executable, str(path), *words), folder)
    return list(runs.values())


def attempt(run: Run, threads: int, sees_gpu: bool) -> None:
    """On a node of the cluster: run the script, from its checkpoint if it has one, until it ends or this node dies."""
    node, libc = ray.get_runtime_context().get_node_id()[:6], ctypes.CDLL(None)
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "lock").open("w") as lock, (run.folder / "output.log").open("a") as log:
        # the script inherits the lock: as long as it lives, even an orphan on a cut-off node, nothing else starts here
        fcntl.flock(lock, fcntl.LOCK_EX)
        if run.is_done:  # by another sweep meanwhile
            return
        attempts = run.attempts
        attempts.append({"node": node, "began": time.strftime("%Y-%m-%d %H:%M:%S"), "exit_code": None})
        resumed = run.checkpoint
        command = [*run.command[:2], "--resume", str(resumed.parent)] if resumed else list(run.command)
        print(f"\n$ {shlex.join(command)}", file=log, flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "60"}
        environment |= {} if sees_gpu else {"CUDA_VISIBLE_DEVICES": ""}
        # PR_SET_PDEATHSIG: the script gets SIGKILL when this worker dies; its checkpoint is whole whenever that is
        die_with_me = (lambda: libc.prctl(1, 9)) if sys.platform == "linux" else None
        process = subprocess.Popen(
            command, cwd=run.folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()], preexec_fn=die_with_me,
        )  # fmt: skip
        attempts[-1]["pid"] = process.pid
        run.record(attempts)
        attempts[-1]["exit_code"] = process.wait()
        run.record(attempts)


def state(run: Run, before: int, pending: bool) -> str:
    """before: attempts that are over, so that a new one tells a run that runs from one that waits for a node."""
    attempts = run.attempts
    if pending:
        return "running" if len(attempts) > before else "waiting"
    code = attempts[-1]["exit_code"] if attempts else None
    names = {FINISHED: "finished", DIVERGED: "diverged", None: "killed" if attempts else "waiting"}
    return names.get(code, f"failed ({code})")


def table(states: dict[Run, str]) -> Table:
    """Counts of all runs, a row for each that has begun, the finished ones last."""
    kinds = Counter(kind.split()[0] for kind in states.values())
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    columns = [Column("run", overflow="fold"), "state", "attempts", "step", "score"]
    shown = Table(*columns, title=f"{len(states)} runs: {counts}")
    for run, kind in sorted(states.items(), key=lambda item: item[1] == "finished"):
        if kind != "waiting":
            shown.add_row(run.folder.name, kind, str(len(run.attempts)), *run.progress)
    return shown


def sweep(args: Args, runs: list[Run], console: Console) -> bool:
    """Run what is not done, retries counted here whatever a run died of. Returns whether all finished or diverged."""
    remote = ray.remote(max_retries=0, num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run)(attempt)
    left, before, pending = dict.fromkeys(runs, args.retries), {}, {}

    def start(run: Run) -> None:
        before[run] = len(run.attempts)
        pending[remote.remote(run, max(1, int(args.cpus_per_run)), args.gpus_per_run > 0)] = run

    def states() -> dict[Run, str]:
        return {run: state(run, before.get(run, 0), run in pending.values()) for run in runs}

    for run in runs:
        if not run.is_done:
            start(run)
    with Live(table(states()), console=console, auto_refresh=False) as live:
        while pending:
            ended, _ = ray.wait(list(pending), timeout=2)
            for ref in ended:
                run, reason = pending.pop(ref), ""
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as error:  # the worker or its node died
                    reason = f", {type(error).__name__}"
                outcome = state(run, before[run], pending=False)
                fatal = outcome == f"failed ({WRONG_INPUT})" and not reason
                again = not run.is_done and not fatal and left[run] > 0
                if not run.is_done and not reason:
                    reason = f", {run.last_line()}"
                step, score = run.progress
                at = f" at step {step}, score {score}" if step else ""
                console.print(
                    f"{time.strftime('%H:%M:%S')} {run.folder.name}: {outcome}{at}{reason}{'; again' if again else ''}",
                    markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip
                if again:
                    left[run] -= 1
                    start(run)
            if console.is_terminal or not pending:  # in a log file the last one is enough
                live.update(table(states()), refresh=console.is_terminal)
    return all(run.is_done for run in runs)


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    runs, console = plan(args), Console(width=None if sys.stdout.isatty() else 160)
    if args.dry_run:
        for run in runs:
            print(f"{state(run, 0, pending=False)}: {shlex.join(run.command)}")
        return 0
    if all(run.is_done for run in runs):
        console.print(table({run: state(run, 0, pending=False) for run in runs}))
        return 0
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {"include_dashboard": False, "object_store_memory": 100 * 2**20}  # nothing large goes through Ray
    try:
        if found := re.fullmatch(r"([^/]+):(\d+)", args.ray_address or ""):  # Ray itself would try for minutes
            socket.create_connection(found.groups(), timeout=10).close()
        ray.init(args.ray_address or "local", log_to_driver=False, **({} if args.ray_address else local))
    except (OSError, ValueError, RuntimeError) as error:
        refuse(True, f"cannot reach the Ray cluster {args.ray_address}: {' '.join(str(error).split())}")
    cpus, gpus = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))
    fits = args.cpus_per_run <= cpus and args.gpus_per_run <= gpus
    refuse(not fits, f"a run takes more CPUs or GPUs than the cluster has, {cpus:g} and {gpus:g}.")
    try:
        return 0 if sweep(args, runs, console) else 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the checkpoints", file=sys.stderr)
        return 130
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
