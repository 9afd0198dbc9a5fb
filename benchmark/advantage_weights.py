"""Which of the dataset's actions does an agent imitate? The advantage weights of saved agents over their dataset.

    python benchmark/advantage_weights.py runs/walker2d-medium-v2__dmg_offline__0__1795000000 ...

Prints a table in Markdown, a line for each run. The best tenth: the transitions of the episodes of highest return.
"""

import dataclasses
import importlib
import math
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SCRIPTS = ("dmg_offline", "iql")


@dataclasses.dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """run folders of dmg_offline.py or iql.py"""


def episode_returns(rewards: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The return of each transition's episode, (n,), the last one's also where it has no end."""
    episode = np.concatenate([[0], np.cumsum(ends[:-1])])
    return np.bincount(episode, rewards)[episode]


def measure(run: str) -> dict[str, object]:
    """A row of the table. Raises ValueError; the scripts' own Stop becomes one."""
    script = Path(run).resolve().name.split("__")[-3:][0]
    if script not in SCRIPTS:
        raise ValueError(f"{run} is no run folder of {' or '.join(SCRIPTS)}.")
    module = importlib.import_module(script)
    try:
        checkpoint = module.load_checkpoint(run)
        args = checkpoint["args"]
        source = module.open_minari(args)
        env = module.make_env(args, source)
        if source:
            rows, timeouts, keep = module.read_minari(source, env.unwrapped.observation_space)
        else:
            rows, timeouts, keep = module.read_hdf5(args.dataset_path or module.download_d4rl(args.env_id))
        data, _, _ = module.load_dataset(args, source, env)
    except module.Stop as stop:
        raise ValueError(stop.args[0]) from stop
    ends = (timeouts == 1) | (rows.terminated == 1) & (not module.is_antmaze(args))
    returns = episode_returns(rows.rewards, ends)[keep]
    agent = module.Agent(*env.observation_space.shape, *env.action_space.shape, args)
    agent.load_state_dict(checkpoint["agent"])
    with torch.no_grad():
        pairs = zip(data.observations.split(10_000), data.actions.split(10_000), strict=True)
        advantage = torch.cat([agent.critic_target(s, a).amin(0) - agent.value(s) for s, a in pairs]).double()
    if getattr(args, "linear_weights", False):
        weight = advantage.clamp(0.0, args.max_weight).numpy()
    else:
        weight = (args.inverse_temperature * advantage).clamp(max=math.log(args.max_weight)).exp().numpy()
    best = np.argsort(-returns, kind="stable")[: math.ceil(len(returns) / 10)]
    row = {"run": Path(run).resolve().name, "script": script, "data": args.dataset_path or args.env_id}
    return row | {
        "steps": f"{checkpoint['step']:,}",
        "std of the advantage": f"{advantage.std():.2f}",
        "mean weight": f"{weight.mean():.2f}",
        "at the clip (%)": f"{100 * (weight > args.max_weight * (1 - 1e-9)).mean():.1f}",
        "effective share of the data (%)": f"{100 * weight.sum() ** 2 / (weight**2).sum() / len(weight):.1f}",
        "weight on the best tenth (%)": f"{100 * weight[best].sum() / weight.sum():.1f}",
    }


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    try:
        if not args.runs:
            raise ValueError("Give run folders.")
        for i, run in enumerate(args.runs):
            row = measure(run)
            if i == 0:
                print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
            print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
