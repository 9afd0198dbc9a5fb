"""Does Q promise more than the actor earns? Q(s, a) of saved agents beside the discounted return that follows.

    python benchmark/overestimation.py runs/walker2d-medium-v2__dmg_offline__0__1795000000 ...

Prints a table in Markdown, a line for each run.
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
SCRIPTS = ("dmg_offline", "dmg_finetune", "td3bc")


@dataclasses.dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """run folders of dmg_offline.py, dmg_finetune.py or td3bc.py"""
    episodes: int = 10
    """episodes for each run, at least 1; their seeds are 5000000, 5000001, ..., which no evaluation has"""


def discounted(rewards: np.ndarray, gamma: float, terminated: bool) -> np.ndarray:
    """Discounted return from each step on, (n,); of a cut-off episode only where less than 1 % of it is cut off."""
    returns = np.zeros(len(rewards) + 1)
    for t in reversed(range(len(rewards))):
        returns[t] = rewards[t] + gamma * returns[t + 1]
    horizon = 0 if terminated else math.ceil(math.log(0.01) / math.log(gamma)) if gamma else 1
    return returns[: max(len(rewards) - horizon, 0)]


def measure(run: str, episodes: int) -> dict[str, object]:
    """A row of the table. Raises ValueError; the scripts' own Stop becomes one."""
    script = Path(run).resolve().name.split("__")[-3:][0]
    if script not in SCRIPTS:
        known = ", ".join(SCRIPTS)
        raise ValueError(f"{run} is no run folder of {known} (iql.py's Q is of rewards scaled by the dataset).")
    dmg = importlib.import_module(script)
    try:
        checkpoint = dmg.load_checkpoint(run)
        args = checkpoint["args"]
        plain = getattr(args, "from_scratch", False) and ("/" not in args.env_id or args.env_id in dmg.gym.registry)
        source = None if plain else dmg.open_minari(args)
        env = dmg.make_env(args, source)
    except dmg.Stop as stop:
        raise ValueError(stop.args[0]) from stop
    agent = dmg.Agent(*env.observation_space.shape, *env.action_space.shape, args)
    agent.load_state_dict(checkpoint["agent"])
    gamma = getattr(args, "gamma_online", args.gamma)
    scores, promised, earned = [], [], []
    for episode in range(episodes):
        observation, _ = env.reset(seed=5_000_000 + episode)
        rewards, q, over = [], [], False
        while not over:
            s = (torch.as_tensor(observation, dtype=torch.float32)[None] - agent.mean) / agent.std
            with torch.no_grad():
                action = agent.actor(s)
                q.append(agent.critic(s, action).amin().item())
            observation, reward, terminated, truncated, _ = env.step(action[0].numpy())
            rewards.append(reward)
            over = terminated or truncated
        returns = discounted(np.array(rewards) - dmg.is_antmaze(args), gamma, terminated)
        promised += q[: len(returns)]
        earned += returns.tolist()
        scores.append(dmg.normalized_score(args, source, np.array([sum(rewards)])).item())
    row = {"run": Path(run).resolve().name, "script": script, "data": args.dataset_path or args.env_id}
    row |= {"in-sample maximum": getattr(args, "in_sample", "")}
    row |= {name: f"{getattr(args, name):g}" if hasattr(args, name) else "" for name in ("lam", "nu")}
    q, g = (np.mean(x) if x else math.nan for x in (promised, earned))
    row |= {
        "steps": f"{checkpoint['step']:,}",
        "score": f"{np.mean(scores):.1f}",
        "Q": f"{q:.1f}",
        "discounted return": f"{g:.1f}",
    }
    return row | {"Q - return": f"{q - g:+.1f}", "states": f"{len(earned):,}"}


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    try:
        if args.episodes < 1 or not args.runs:
            raise ValueError("Give run folders, and --episodes of at least 1.")
        for i, run in enumerate(args.runs):
            row = measure(run, args.episodes)
            if i == 0:
                print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
            print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
