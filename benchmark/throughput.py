"""Gradient steps per second of the scripts, beside a plain PyTorch form and a JAX program of DMG.

    python benchmark/throughput.py                            # one thread; the GPU instead if one is visible
    python benchmark/throughput.py --processes 20 --contenders "dmg_offline --compile"  # 20 side by side

Update and batch alone, on data of Walker2d's size. Contenders are processes of their own and take turns,
so that the neighbours of a shared machine trouble all alike.
"""

import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
STATE, ACTION, ROWS = 17, 6, 100_000
SCRIPTS = ("dmg_offline", "dmg_finetune", "iql", "td3bc")
CONTENDERS = (*SCRIPTS, *(f"{name} --compile" for name in SCRIPTS), "plain_dmg", "jax_dmg")
GPU_FORMS = "", "--no-cudagraphs", "--compile", "--compile --no-cudagraphs"


@dataclasses.dataclass
class Args:
    contenders: tuple[str, ...] = CONTENDERS  # what is measured: scripts with flags, plain_dmg, jax_dmg
    gpu_only: bool = False  # each script as CUDA graph, plain, and compiled, beside JAX
    threads: int = 1  # CPU threads of each process
    processes: int = 1  # processes of each contender side by side, whose steps are added up
    steps: int = 100  # gradient steps in a turn, an even number
    turns: int = 9  # turns of each contender, after one that is not counted
    output: Path = Path("throughput.json")  # where the figures go
    serve: str = ""  # internal: the contender that this process is


def torch_learner(name, data, device):
    """As a script's main: draw a batch and its noise, learn."""
    file, *flags = name.split()
    script = importlib.import_module(file)
    if file == "plain_dmg":
        learn = script.PlainDMG(STATE, ACTION).update
    else:
        args = tyro.cli(script.Args, args=flags)
        torch.use_deterministic_algorithms(True)
        with torch.device(device):
            agent = script.Agent(STATE, ACTION, args)
        for number in ("lam", "nu", "gamma") if file == "dmg_finetune" else ():  # they change online
            setattr(args, number, torch.tensor(getattr(args, number), device=device))
        learn = script.accelerate(agent, args)

    def train(steps):
        for step in range(steps):
            index = torch.randint(ROWS, (256,), device=device)
            batch = [x.index_select(0, index) for x in data]
            if file == "iql":
                learn(batch)
            else:
                noise = torch.randn(256, ACTION, device=device)
                learn(batch, noise, step % 2 == 1)

    return train


def jax_learner(data):
    import jax
    from jax_dmg import start, train

    jax.config.update("jax_default_device", jax.devices("gpu" if data[0].is_cuda else "cpu")[0])  # or fails
    arrays = [jax.numpy.asarray(x.cpu().numpy()) for x in data]
    state = list(start(jax.random.key(0), STATE, ACTION))

    def learn(steps):
        state[:] = train(*state, arrays, jax.random.key(1), steps)
        jax.block_until_ready(state)

    return learn


def serve(args):
    """Be a contender: for each line of input train and print the seconds it took."""
    if args.processes == 1:  # JAX would take every core
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)
    gpu = torch.cuda.is_available() and args.serve != "plain_dmg"
    device = torch.device("cuda" if gpu else "cpu")
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())
    shapes = (ROWS, STATE), (ROWS, ACTION), (ROWS,), (ROWS, STATE)
    data = [torch.rand(shape, device=device) for shape in shapes] + [torch.zeros(ROWS, device=device)]
    learn = jax_learner(data) if args.serve == "jax_dmg" else torch_learner(args.serve, data, device)
    learn(args.steps)  # compiles, captures
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        learn(args.steps)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - start, flush=True)


def start_process(args, name):
    command = [sys.executable, __file__, "--serve", name, "--steps", str(args.steps)]
    command += ["--threads", str(args.threads), "--processes", str(args.processes)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe)


def main(args):
    """Print a table and write JSON; a contender that does not start is left out."""
    running, speeds = {}, {}
    forms = [f"{name} {form}" for name in SCRIPTS for form in GPU_FORMS]
    for name in [*forms, "jax_dmg"] if args.gpu_only else args.contenders:
        processes = [start_process(args, name) for _ in range(args.processes)]
        if all(process.stdout.readline() == "ready\n" for process in processes):
            running[name], speeds[name] = processes, []
    for turn in range(args.turns + 1):
        for name, processes in running.items():
            for process in processes:
                print(file=process.stdin, flush=True)
            seconds = [float(process.stdout.readline()) for process in processes]
            if turn:
                speeds[name].append(sum(args.steps / x for x in seconds))
    print(f"| {args.threads} threads, {args.processes} processes | steps/s | range |\n|-|-|-|")
    for name, found in speeds.items():
        print(f"| {name} | {statistics.median(found):.0f} | {min(found):.0f} to {max(found):.0f} |")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    record = {"torch": torch.__version__, "gpu": gpu, "cores": os.cpu_count(), "steps_per_second": speeds}
    args.output.write_text(json.dumps(vars(args) | {"output": None} | record, indent=1))


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    serve(arguments) if arguments.serve else main(arguments)
