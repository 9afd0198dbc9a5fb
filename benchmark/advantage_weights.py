"""Which of the dataset's actions does an agent imitate, and how far does it go from them? Saved agents over their data.

    python benchmark/advantage_weights.py runs/walker2d-medium-v2__dmg_offline__0__1795000000 ...

Prints a table in Markdown, a line for each run; TD3+BC has no weights. Distance: mean squared difference of the action
without noise from the dataset's, over transitions and dimensions, actions in [-1, 1]. The best tenth: the transitions
of the episodes of highest return.
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
SCRIPTS = ("dmg_offline", "iql", "td3bc")

COLUMNS = (
    "std of the advantage",
    "mean weight",
    "at the clip (%)",
    "effective share of the data (%)",
    "weight on the best tenth (%)",
)


@dataclasses.dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """run folders of dmg_offline.py, iql.py or td3bc.py"""


def episode_returns(rewards: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The return of each transition's episode, (n,), the last one's also where it has no end."""
    episode = np.concatenate([[0], np.cumsum(ends[:-1])])
    return np.bincount(episode, rewards)[episode]


def distance(agent: torch.nn.Module, data: tuple) -> float:
    """Mean squared difference between the actor's actions, IQL's mean, and the dataset's."""
    squares = 0.0
    with torch.no_grad():
        for s, a in zip(data.observations.split(10_000), data.actions.split(10_000), strict=True):
            pi = agent.actor(s)
            squares += ((pi if isinstance(pi, torch.Tensor) else pi.mean) - a).double().square().sum().item()
    return squares / data.actions.numel()


def measure(run: str) -> dict[str, object]:
    """A row of the table. Raises ValueError; the scripts' own Stop becomes one."""
    script = Path(run).resolve().name.split("__")[-3:][0]
    if script not in SCRIPTS:
        raise ValueError(f"{run} is no run folder of {', '.join(SCRIPTS)}.")
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
    row = {"run": Path(run).resolve().name, "script": script, "data": args.dataset_path or args.env_id}
    row |= {"steps": f"{checkpoint['step']:,}", "distance": f"{distance(agent, data):.4f}"}
    row |= dict.fromkeys(COLUMNS, "")
    if not hasattr(agent, "value"):
        return row
    with torch.no_grad():
        pairs = zip(data.observations.split(10_000), data.actions.split(10_000), strict=True)
        advantage = torch.cat([agent.critic_target(s, a).amin(0) - agent.value(s) for s, a in pairs]).double()
    if getattr(args, "linear_weights", False):
        weight = advantage.clamp(0.0, args.max_weight).numpy()
    else:
        weight = (args.inverse_temperature * advantage).clamp(max=math.log(args.max_weight)).exp().numpy()
    best = np.argsort(-returns, kind="stable")[: math.ceil(len(returns) / 10)]
    columns = (
        f"{advantage.std():.2f}",
        f"{weight.mean():.2f}",
        f"{100 * (weight > args.max_weight * (1 - 1e-9)).mean():.1f}",
        f"{100 * weight.sum() ** 2 / (weight**2).sum() / len(weight):.1f}",
        f"{100 * weight[best].sum() / weight.sum():.1f}",
    )
    return row | dict(zip(COLUMNS, columns, strict=True))


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
