"""How fast the scripts train, against the machine's matrix products, a plain PyTorch form and a JAX program.

    python benchmark/throughput.py            # CPU: one and two threads; GPU as well if there is one

Every contender is a process of its own, pinned to the cores it may use; they take turns, so that the neighbours of a
shared machine trouble all alike. Prints tables and writes JSON. Needs benchmark/requirements.txt for JAX, else leaves
it out.
"""

import dataclasses
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
SCRIPTS = ("dmg_offline", "dmg_finetune", "iql", "td3bc")
STATE, ACTION, BATCH, ROWS = 17, 6, 256, 100_000


@dataclasses.dataclass
class Args:
    threads: tuple[int, ...] = (1, 2)
    """CPU threads, a table for each"""
    steps: int = 100
    """gradient steps in a turn; an even number"""
    turns: int = 9
    """turns of each contender after a warm-up; the median and the range of their speeds are printed"""
    cuda: bool = True
    """also measure on the GPU, if there is one"""
    rows: int = 2_000_000
    """transitions of the file whose loading is timed"""
    output: str = str(ROOT / "benchmark" / "results" / "throughput.json")
    """where the figures go"""
    contender: str = ""
    """internal: what this process measures, a JSON object"""


def multiply_adds() -> dict[str, float]:
    """Multiply-adds of one gradient step of each script, from its network calls; biases and ReLU are not counted."""

    def net(n_in: int, n_out: int) -> tuple[int, int, int]:
        layers = (n_in * 256, 256 * 256, 256 * n_out)
        forward, inner = sum(layers), sum(layers[1:])
        return BATCH * forward, BATCH * (forward + inner), BATCH * forward  # forward, gradient of weights, of the input

    v, pi, q = net(STATE, 1), net(STATE, ACTION), [2 * x for x in net(STATE + ACTION, 1)]
    value = q[0] + v[0] + v[1]  # Q'(s, a), V(s) and its gradient
    td3_critic = pi[0] + q[0] + q[0] + q[1]  # pi'(s'), Q'(s', a'), Q(s, a) and its gradient
    actor = (pi[0] + q[0] + q[2] + pi[1]) / 2  # pi(s), Q(s, pi), through Q to the action and on to pi; every 2nd step
    dmg = value + td3_critic + v[0] + actor + v[0] / 2  # V(s') for the target, V(s) for the weights
    iql = value + v[0] + pi[0] + pi[1] + v[0] + q[0] + q[1]
    return {"dmg_offline": dmg, "dmg_finetune": dmg, "iql": iql, "td3bc": td3_critic + actor}


# ---- the contenders: each builds its learner and then trains for as many steps as a line of its input says ----
def serve(spec: dict) -> None:
    if spec["device"] == "cpu":
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[: spec["threads"]])
    learn = {"jax": jax_learner, "plain": plain_learner}.get(spec["name"], script_learner)(spec)
    began = time.perf_counter()
    learn(10)  # compiles, captures
    print(json.dumps({"first": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        learn(int(line))
        found = {"seconds": time.perf_counter() - began}
        print(json.dumps(found | ({} if spec["name"] == "jax" else {"gemm": gemm_rate(spec["device"])})), flush=True)


def gemm_rate(device: str) -> float:
    """float32 multiply-adds a second of products of 256 x 256 matrices at the precision in force."""
    import torch

    a, b = torch.randn(2, 256, 256, device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(400):
        torch.mm(a, b)
    wait()
    return 400 * 256**3 / (time.perf_counter() - began)


def torch_data(spec: dict):
    import torch

    torch.set_num_threads(spec["threads"])
    torch.set_float32_matmul_precision(spec["precision"])
    data = torch.randn(ROWS, STATE), torch.rand(ROWS, ACTION) * 2 - 1, torch.randn(ROWS), torch.randn(ROWS, STATE)
    return torch, [x.to(spec["device"]) for x in (*data, torch.zeros(ROWS))]


def script_learner(spec: dict):
    torch, data = torch_data(spec)
    torch.use_deterministic_algorithms(True)  # as the scripts do
    torch.utils.deterministic.fill_uninitialized_memory = False
    script = importlib.import_module(spec["name"])
    args = script.resolve(script.Args(compile=spec["compile"], cudagraphs=spec["graphs"]))
    device = torch.device(spec["device"])
    learners = [one_seed(torch, script, args, data, device) for _ in range(spec["seeds"])]
    count = 0

    def learn(steps: int) -> None:
        nonlocal count
        for _ in range(steps):
            count += 1
            for learner in learners:
                learner(count % 2 == 0)
        if spec["device"] == "cuda":
            torch.cuda.synchronize()

    return learn


def one_seed(torch, script, args, data, device):
    """The step of train_seed: a batch, its noise and the accelerated update, on a stream of its own."""
    agent, generator = script.Agent(STATE, ACTION, args, device), torch.Generator(device).manual_seed(0)
    index = torch.empty(BATCH, dtype=torch.int64, device=device)
    noise = torch.empty(BATCH, ACTION, device=device)
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    if device.type == "cuda":
        torch.cuda.synchronize()

    def update(update_actor: bool) -> dict:
        batch = script.Batch(*(x[index] for x in data))
        rest = (args,) if script.__name__ == "iql" else (noise, args, update_actor)
        return script.update(agent, batch, *rest)

    fast = script.accelerate(update, args, device)

    def learner(update_actor: bool) -> None:
        with torch.cuda.stream(stream):
            index.random_(ROWS, generator=generator)
            noise.normal_(generator=generator)
            fast(update_actor or script.__name__ == "iql")

    return learner


def plain_learner(spec: dict):
    torch, (s, a, r, next_s, terminated) = torch_data(spec)
    from plain_dmg import PlainDMG

    agent = PlainDMG(STATE, ACTION)

    def learn(steps: int) -> None:
        for step in range(steps):
            index, noise = torch.randint(ROWS, (BATCH,)), torch.randn(BATCH, ACTION)
            agent.update(*(x[index] for x in (s, a, r, next_s, terminated)), noise, step % 2 == 1)

    return learn


def jax_learner(spec: dict):
    import jax
    from jax_dmg import start, train

    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    data = [jax.random.normal(k1, shape) for shape in ((ROWS, STATE), (ROWS, ACTION), (ROWS,), (ROWS, STATE), (ROWS,))]
    state = [*start(k2, STATE, ACTION), data, k3]

    def learn(steps: int) -> None:
        state[:2] = train(*state, steps)
        jax.block_until_ready(state[0])

    for steps in (10, spec["steps"]):  # a scan of another length is compiled anew
        learn(steps)
    return learn


# ---- the measurement ----
def start(args: Args, specs: list[dict]) -> list[tuple[dict, subprocess.Popen]]:
    """A process for each of `specs`, ready to train; adds first_seconds. Those that fail are left out."""
    command, running, starting = [sys.executable, __file__, "--steps", str(args.steps), "--contender"], [], []
    for spec in specs:
        spec["steps"] = args.steps
        environment = os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "TF_CPP_MIN_LOG_LEVEL": "3"}
        process = subprocess.Popen(
            [*command, json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        starting.append((spec, process))
        if spec["device"] == "cuda" and spec is not specs[-1]:
            continue  # a lent GPU is dear: all start together; on a CPU they would slow each other's compilation
        for ready, process in starting:
            line = process.stdout.readline()
            if line:
                running.append((ready, process))
                ready["first_seconds"] = json.loads(line)["first"]
            else:
                print(f"{label(ready)} did not start: left out")
        starting = []
    return running


def crowd(args: Args, spec: dict, processes: int) -> dict:
    """Steps a second of all agents of so many processes that train at the same time; `spec` has agents of each."""
    running = start(args, [dict(spec) for _ in range(processes)])
    for _ in range(2):  # the first is warm-up
        for _, process in running:
            print(10 * args.steps, file=process.stdin, flush=True)
        seconds = [json.loads(process.stdout.readline())["seconds"] for _, process in running]
    for _, process in running:
        process.stdin.close()
        process.wait()
    agents = len(running) * spec["seeds"]
    return {
        "processes": len(running),
        "agents": agents,
        "steps_per_second": agents * 10 * args.steps / max(seconds, default=1),
    }


def race(args: Args, specs: list[dict]) -> list[dict]:
    """Let the contenders take turns; adds steps_per_second (of each seed), its range and the GEMM rate beside them."""
    running = [(spec, process, []) for spec, process in start(args, specs)]
    for turn in range(args.turns + 1):
        for _, process, found in running:
            print(args.steps, file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline())
            if turn:  # the first is warm-up
                found.append(answer)
    for spec, process, found in running:
        process.stdin.close()
        process.wait()
        speeds = [args.steps / x["seconds"] for x in found]
        spec |= {"steps_per_second": statistics.median(speeds), "slowest": min(speeds), "fastest": max(speeds)}
        if "gemm" in found[0]:
            spec["gemm_multiply_adds_per_second"] = statistics.median(x["gemm"] for x in found)
            if spec["name"] in multiply_adds():
                shares = [
                    speed * multiply_adds()[spec["name"]] * spec["seeds"] / x["gemm"]
                    for speed, x in zip(speeds, found, strict=True)
                ]
                spec["share_of_gemm"] = statistics.median(shares)
    return [spec for spec, *_ in running]


def label(spec: dict) -> str:
    words = [spec["name"]] + ["--compile"] * spec["compile"]
    words += ["graphs" if spec["graphs"] else "eager"] if spec["device"] == "cuda" else []
    words += [spec["precision"]] if spec["name"] == "plain" else []
    return " ".join(words + ([f"{spec['seeds']} seeds"] if spec["seeds"] > 1 else []))


def measure_loading(rows: int) -> dict:
    """Seconds and peak memory, in GiB, of a process that loads `rows` transitions of Walker2d's size."""
    import h5py
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        rng, path = np.random.default_rng(0), str(Path(folder, "walker2d.hdf5"))
        with h5py.File(path, "w") as file:
            for key, width in (("observations", 17), ("actions", 6)):
                file[key] = rng.uniform(-1, 1, (rows, width)).astype(np.float32)
            file["rewards"] = rng.uniform(-1, 1, rows).astype(np.float32)
            for key, period in (("terminals", 977), ("timeouts", 1000)):
                file[key] = np.arange(rows) % period == period - 1
        code = (
            "import time, resource, dmg_offline as d;"
            f"a = d.resolve(d.Args(env_id='Walker2d-v4', dataset_path={path!r}));"
            "e = d.make_env(a, None); t = time.perf_counter(); d.load_dataset(a, None, e);"
            "print(time.perf_counter() - t, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
        )
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    seconds, peak = map(float, out.splitlines()[-1].split())
    return {"rows": rows, "seconds": seconds, "peak_gib": peak}


def measure_evaluation() -> dict:
    """Seconds of 10 HalfCheetah episodes by evaluate() with a new actor, and of the bare environments' same steps."""
    import gymnasium as gym
    import numpy as np
    import torch

    import dmg_offline

    torch.set_num_threads(1)
    args = dmg_offline.resolve(dmg_offline.Args())
    source = dmg_offline.open_minari(args)
    agent, evaluated, bare = dmg_offline.Agent(STATE, ACTION, args), [], []

    @torch.no_grad()
    def act(observations: np.ndarray) -> np.ndarray:
        s = torch.as_tensor(observations, dtype=torch.float32)
        return agent.actor((s - agent.mean) / agent.std).numpy()

    for _ in range(5):
        envs = [dmg_offline.make_env(args, source) for _ in range(10)]
        began = time.perf_counter()
        dmg_offline.evaluate(act, envs, 10, 0)
        evaluated.append(time.perf_counter() - began)
        env = gym.make(source.spec)
        env.reset(seed=0)
        action = np.zeros(ACTION, np.float32)
        began = time.perf_counter()
        for step in range(10_000):
            if step % 1000 == 0:
                env.reset(seed=step)
            env.step(action)
        bare.append(time.perf_counter() - began)
    ratio = statistics.median(x / y for x, y in zip(evaluated, bare, strict=True))
    return {"seconds": statistics.median(evaluated), "bare_seconds": statistics.median(bare), "ratio": ratio}


def main() -> None:
    args = tyro.cli(Args)
    if args.contender:
        serve(json.loads(args.contender))
        return
    import torch

    gpu = args.cuda and torch.cuda.is_available()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    results = {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
    results |= {"gpu": torch.cuda.get_device_name() if gpu else None, "command": " ".join(sys.argv), "batch": BATCH}
    results |= {"multiply_adds": multiply_adds(), "races": []}
    base = {"device": "cpu", "compile": False, "graphs": True, "seeds": 1, "precision": "medium"}
    for threads in args.threads:
        specs = [base | {"name": n, "compile": c, "threads": threads} for n in SCRIPTS for c in (False, True)]
        specs += [base | {"name": "plain", "precision": p, "threads": threads} for p in ("highest", "medium")]
        specs += [base | {"name": "jax", "threads": threads}]
        specs += [base | {"name": "dmg_offline", "seeds": 5, "threads": threads}]
        results["races"].append(race(args, specs))
    if gpu:
        base |= {"device": "cuda", "threads": 1}
        specs = [base | {"name": n, "graphs": g} for n in SCRIPTS for g in (False, True)]
        specs += [base | {"name": "dmg_offline", "compile": True}]
        specs += [base | {"name": n, "seeds": 5} for n in SCRIPTS]
        results["races"].append(race(args, specs))
        many = base | {"name": "dmg_offline", "seeds": 5}
        results["crowds"] = [
            crowd(args, base | {"name": "dmg_offline"}, 1),
            *(crowd(args, many, n) for n in (1, 4, 12)),
        ]
        print("\n| processes at once | agents | steps/s of all |\n|-|-|-|")
        for x in results["crowds"]:
            print("| {processes} | {agents} | {steps_per_second:.0f} |".format(**x))
    for specs in results["races"]:
        where = results["gpu"] if specs[0]["device"] == "cuda" else f"{cpu}, {specs[0]['threads']} thread(s)"
        print(f"\n{where}\n| | steps/s | range | share of the GEMM rate | first 10 steps |\n|-|-|-|-|-|")
        for x in specs:
            share = f"{x['share_of_gemm']:.0%}" if "share_of_gemm" in x else ""
            span = f"{x['slowest']:.0f} to {x['fastest']:.0f}"
            print(f"| {label(x)} | {x['steps_per_second']:.0f} | {span} | {share} | {x['first_seconds']:.0f} s |")
        rates = [x["gemm_multiply_adds_per_second"] for x in specs if "share_of_gemm" in x]
        print(f"\nGEMM 256 x 256 x 256, float32: {2e-9 * statistics.median(rates):.0f} GFLOP/s")
    results["loading"], results["evaluation"] = measure_loading(args.rows), measure_evaluation()
    print(
        "\n{rows:,} transitions: loaded in {seconds:.1f} s, {peak_gib:.2f} GiB at the peak".format(**results["loading"])
    )
    text = "10 HalfCheetah episodes: {seconds:.1f} s, bare environments {bare_seconds:.1f} s, ratio {ratio:.2f}"
    print(text.format(**results["evaluation"]))
    results["peak_gib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    temporary = Path(args.output + ".tmp")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, args.output)


if __name__ == "__main__":
    main()
