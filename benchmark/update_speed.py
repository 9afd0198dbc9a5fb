"""Speed of the update by threads and --matmul-precision, error of a product: python benchmark/update_speed.py"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dmg_offline import Agent, Args, Batch, resolve, update

args = resolve(Args())
agent, n, normal = Agent(17, 6, args), args.batch_size, torch.randn
batch = Batch(normal(n, 17), normal(n, 6).clamp(-1, 1), normal(n), normal(n, 17), torch.zeros(n))
a, b, noise = normal(256, 256), normal(256, 256), normal(n, 6)
speeds: dict[tuple[int, str], list[float]] = {}
for repetition in range(6):  # alternating, so that the neighbours of a shared machine trouble all alike
    for threads in (1, 2):
        for precision in ("highest", "medium"):
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            began = time.perf_counter()
            for step in range(100):
                update(agent, batch, noise, args, update_actor=step % args.policy_frequency == 0)
            if repetition:  # the first is warm-up
                speeds.setdefault((threads, precision), []).append(100 / (time.perf_counter() - began))
for (threads, precision), found in speeds.items():
    print(
        f"{threads} threads, {precision}: {statistics.median(found):.0f} steps/s ({min(found):.0f} to {max(found):.0f})"
    )
for precision in ("highest", "medium"):
    torch.set_float32_matmul_precision(precision)
    error = (a @ b - a.double() @ b.double()).abs().max().item()
    print(f"{precision}: largest error of a product of two normal 256 x 256 matrices {error:.1e}")
