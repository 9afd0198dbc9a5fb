"""Rollouts of a trained agent as a Minari set; those of a TD3 that was stopped half-way are what D4RL calls medium.

    python benchmark/collect.py runs/Hopper-v5__dmg_finetune__0__1795000000 own/hopper/medium-v0

Nothing is written before the end, and then all at once.
"""

import dataclasses
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dmg_finetune as dmg


@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[str]
    """run folder of dmg_finetune.py whose last agent acts"""
    dataset_id: tyro.conf.Positional[str]
    """Minari id of the set, written into $MINARI_DATASETS_PATH or ~/.minari/datasets"""
    transitions: int = 300_000
    """number of environment steps, at least 1"""
    noise: float = 0.1
    """standard deviation of the noise on the actions, 0 or more, in units of the action range [-1, 1]"""
    seed: int = 100
    """seed of noise and episodes, [0, 1e9]; one that no training has, or the episodes start where its own did"""


def collect(args: Args) -> None:
    """Act for args.transitions steps and write them as dmg_finetune.py --save-dataset does. Raises dmg.Stop."""
    checkpoint = dmg.load_checkpoint(args.run)
    saved = {"save_dataset": args.dataset_id, "online_steps": args.transitions, "seed": args.seed}
    trained = dataclasses.replace(checkpoint["args"], num_seeds=1, **saved)
    dmg.require(args.transitions > 0, f"--transitions {args.transitions}: at least 1 is needed.")
    dmg.require(0 <= args.noise < float("inf"), f"--noise {args.noise}: a number of 0 or more is needed.")
    dmg.require(0 <= args.seed <= 10**9, f"--seed {args.seed} is outside [0, 1e9].")
    dmg.check_save_dataset(trained)
    plain = trained.from_scratch and ("/" not in trained.env_id or trained.env_id in gym.registry)
    source = None if plain else dmg.open_minari(trained)
    env = dmg.make_env(trained, source)
    (state_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    agent = dmg.Agent(state_dim, action_dim, trained)
    agent.load_state_dict(checkpoint["agent"])
    widths = {"observations": (state_dim,), "actions": (action_dim,), "next_observations": (state_dim,)}
    nothing = dmg.Batch(*(torch.empty(0, *widths.get(name, ())) for name in dmg.Batch._fields))
    with dmg.explain(f"cannot hold {args.transitions:,} transitions in memory"):
        replay = dmg.Replay(nothing, args.transitions, "cpu")
    explorer = dmg.Explorer(env, replay, agent, trained)
    explorer.begin()
    generator = torch.Generator().manual_seed(args.seed)
    for _ in trange(args.transitions, unit=" steps", desc=args.dataset_id):
        noise = args.noise * torch.randn(action_dim, generator=generator)
        with torch.no_grad():
            action = (agent.actor(explorer.state[None])[0] + noise).clamp(-1, 1)
        explorer.step(action)
    if explorer.episodes:
        returns = np.array([episode[1] for episode in explorer.episodes])
        score = dmg.normalized_score(trained, source, returns).mean()
        print(f"{len(returns):,} whole episodes, return {returns.mean():.1f} +- {returns.std():.1f}, score {score:.1f}")
    references = dmg.reference_returns(trained, source)
    dmg.write_dataset(trained, explorer, (None, None) if references == (0, 100) else references)


if __name__ == "__main__":
    try:
        collect(tyro.cli(Args))
    except dmg.Stop as stop:
        print(stop.args[0], file=sys.stderr)
        sys.exit(stop.args[1])
    except KeyboardInterrupt:
        sys.exit(130)
