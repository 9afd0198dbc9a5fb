"""Run scripts x --env-ids x --values x --seeds with Ray; the same command again resumes.

    python benchmark/sweep.py --env-ids hopper-medium-v2 walker2d-medium-v2 --values lam=0,0.25 --seeds 0 1

Each run is the command that a user would type, in a folder of its own: {folder}/{name}/ has runs/ of the
script, output.log and status.json (attempts, exit codes). --dry-run shows how far all are.
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
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import ray
import tyro

STATES = {0: "finished", 2: "wrong input", None: "running or killed"}  # by exit code
ERRORS = {"FloatingPointError": "diverged", "ValueError": "wrong input"}  # by what a script died of
DONE = "finished", "diverged"
PATHS = ("dataset-path", "checkpoint")  # flags that contain a path: the runs work in other folders
PLACES = "MINARI_DATASETS_PATH", "D4RL_DATASET_DIR"  # and so do these
PLACES = {x: str(Path(os.environ[x]).expanduser().resolve()) for x in PLACES if os.environ.get(x)}


@dataclasses.dataclass
class Args:
    env_ids: tuple[str, ...]  # --env-id of the runs
    scripts: tuple[str, ...] = ("dmg_offline.py",)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # --seed of the runs
    values: tuple[str, ...] = ()  # name=value or name=value,value: all combinations run; a switch has no =
    folder: Path = Path("benchmark-runs")  # of all runs; each node of a cluster must see it under this path
    retries: int = 3  # how often a run that failed or was killed is started again, from its checkpoint
    cpus_per_run: float = 1  # CPUs that a run takes, and its OMP_NUM_THREADS
    gpus_per_run: float = 0  # GPUs that a run takes; with 0.25 four runs share one, with 0 a run sees none
    ray_address: str | None = None  # a running Ray cluster, host:port or auto (None: this machine)
    dry_run: bool = False  # print the commands and what has become of them, run nothing

    def __post_init__(self):
        plan(self)  # its ValueError is shown as a sentence


@dataclasses.dataclass(frozen=True)
class Run:
    """One command and its folder. All is read from the disk: nothing is lost with the process that asks."""

    command: tuple[str, ...]
    folder: Path

    @property
    def attempts(self):
        path = self.folder / "status.json"
        return json.loads(path.read_text())["attempts"] if path.exists() else []

    @property
    def state(self):
        if not self.attempts:
            return "not begun"
        code, error = self.attempts[-1]["exit_code"], self.attempts[-1].get("error") or ""
        download = re.search("cannot download|No data found", error)  # Minari's: another run downloads it
        known = code == 1 and not download and ERRORS.get(error.split(":")[0])
        return STATES.get(code) or known or f"failed ({code})"

    @property
    def progress(self):
        """The last evaluation: step and score, or return where there is no score."""
        found = ""
        for path in sorted(self.folder.glob("runs/*/eval.csv")):
            for row in path.read_text().split()[1:]:
                step, mean, _, score, *_ = row.split(",")
                what = f"return {float(mean):.1f}" if score == "nan" else f"score {float(score):.1f}"
                found = f" at step {int(step):,}, {what}"
        return found

    def record(self, attempts):
        temporary = self.folder / "status.json.tmp"
        status = {"command": shlex.join(self.command), "attempts": attempts}
        temporary.write_text(json.dumps(status, indent=2))
        os.replace(temporary, self.folder / "status.json")  # never half-written


def flag_axes(values):
    """For each item of --values the words that its alternatives add to a command."""
    axes = {}
    for item in values:
        name, equals, alternatives = item.partition("=")
        name = name.lstrip("-").replace("_", "-")
        if name in axes or name in ("seed", "env-id", "resume", ""):
            raise ValueError(f"--values {item}: give a flag once; --seeds and --env-ids have their own")
        words = alternatives.split(",")
        if equals and not all(words):
            raise ValueError(f"--values {item} has an empty value")
        if name in PATHS:
            words = [str(Path(word).expanduser().resolve()) for word in words]
        axes[name] = [(f"--{name}", word) for word in words] if equals else [(f"--{name}",)]
    return [axes[name] for name in sorted(axes)]


def key(command):
    """Of a command's flags and its script's bytes: a changed script has runs of its own."""
    text = Path(command[1]).read_bytes() + shlex.join(command[2:]).encode()
    return hashlib.sha256(text).hexdigest()[:6]


def plan(args):
    """Every run of the sweep. The same flags give the same folder whatever their order. Raises ValueError."""
    runs = {}
    axes = flag_axes(args.values)
    for script, env_id, seed, *flags in itertools.product(args.scripts, args.env_ids, args.seeds, *axes):
        path = Path(script).resolve()
        if not path.is_file():
            raise ValueError(f"there is no script {script} here: give its path")
        words = ["--env-id", env_id, "--seed", str(seed), *itertools.chain(*flags)]
        parts = [path.stem, env_id, str(seed)]
        for name, *value in flags:
            parts.append("=".join([name[2:], *(Path(x).name for x in value)]))
        name = re.sub(r"[^\w=.-]+", "-", "__".join(parts))[:150]
        command = sys.executable, str(path), *words
        folder = args.folder.resolve() / f"{name}__{key(command)}"
        runs[folder] = Run(command, folder)
    return list(runs.values())


def error_in(printed):
    """The line that names what a script died of; without one, the end of what it printed, tyro's box too."""
    named = re.findall(r"^[\w.]+Error: .*", printed, re.M)
    return named[-1] if named else re.sub(r"[\s╭╮│╰╯─]+", " ", printed)[-300:].strip()


def attempt(run, threads, sees_gpu):
    """On a node of the cluster: run the script, from its checkpoint if it has one, to its end."""
    node, libc = ray.get_runtime_context().get_node_id()[:6], ctypes.CDLL(None)
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "lock").open("w") as lock, (run.folder / "output.log").open("a") as log:
        # the script inherits the lock: while it lives, even an orphan on a cut-off node, nothing starts here
        fcntl.flock(lock, fcntl.LOCK_EX)
        if run.state in DONE:  # by another sweep meanwhile
            return
        if not run.folder.name.endswith(key(run.command)):
            run.record([*run.attempts, {"exit_code": 2, "error": "the script was changed meanwhile"}])
            return
        attempts = [*run.attempts, {"node": node, "began": time.strftime("%F %T"), "exit_code": None}]
        checkpoints = sorted(run.folder.glob("runs/*/checkpoint.pt"))
        command = [*run.command[:2], "--resume", str(checkpoints[-1].parent)] if checkpoints else run.command
        print(f"\n$ {shlex.join(command)}", file=log, flush=True)
        start = log.tell()
        environment = os.environ | PLACES | {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "60"}
        environment |= {} if sees_gpu else {"CUDA_VISIBLE_DEVICES": ""}
        # PR_SET_PDEATHSIG: the script dies with this worker; its checkpoint is never half-written
        die_with_me = (lambda: libc.prctl(1, 9)) if sys.platform == "linux" else None
        io = {"stdout": log, "stderr": subprocess.STDOUT, "pass_fds": [lock.fileno()]}
        process = subprocess.Popen(command, cwd=run.folder, env=environment, preexec_fn=die_with_me, **io)
        attempts[-1]["pid"] = process.pid
        run.record(attempts)
        attempts[-1]["exit_code"] = process.wait()
        attempts[-1]["error"] = error_in(Path(log.name).read_bytes()[start:].decode(errors="replace"))
        run.record(attempts)


def sweep(args, runs):
    """Run what is not done; retries are counted here, whatever a run died of."""
    remote = ray.remote(max_retries=0, num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run)(attempt)
    left, pending = dict.fromkeys(runs, args.retries), {}

    def start(run):
        pending[remote.remote(run, max(1, int(args.cpus_per_run)), args.gpus_per_run > 0)] = run

    for run in (run for run in runs if run.state not in DONE):
        start(run)
    while pending:
        (ended,), _ = ray.wait(list(pending))
        run = pending.pop(ended)
        try:
            ray.get(ended)
            state = run.state
        except ray.exceptions.RayError as error:  # the worker or its node died
            state = f"killed ({type(error).__name__})"
        again = run.state not in DONE and state != "wrong input" and left[run] > 0
        if state.startswith(("failed", "wrong")):
            state += ", " + run.attempts[-1]["error"]
        now = time.strftime("%H:%M:%S")
        print(f"{now} {run.folder.name}: {state}{run.progress}{'; again' * again}", flush=True)
        if again:
            left[run] -= 1
            start(run)


def main(args):
    """Exit code: 0 where all runs finished or diverged, else 1. Raises ValueError."""
    runs = plan(args)
    if args.dry_run:
        for run in runs:
            print(f"{run.state}{run.progress}: {shlex.join(run.command)}")
        return 0
    if not all(run.state in DONE for run in runs):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local = {"include_dashboard": False, "object_store_memory": 100 * 2**20}  # nothing large goes through
        ray.init(args.ray_address or "local", log_to_driver=False, **({} if args.ray_address else local))
        has = ray.cluster_resources()
        if args.cpus_per_run > has.get("CPU", 0) or args.gpus_per_run > has.get("GPU", 0):
            raise ValueError(f"a run takes more CPUs or GPUs than the cluster has: {has}")
        sweep(args, runs)
    counts = Counter(run.state for run in runs)
    print(f"{len(runs)} runs: " + ", ".join(f"{n} {state}" for state, n in sorted(counts.items())))
    return 0 if all(run.state in DONE for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
