"""A run as a Minari set: roll-outs of its agent, or the transitions of its online steps.

    python benchmark/collect.py runs/RUN own/hopper/medium-v0
    python benchmark/collect.py runs/RUN own/hopper/medium-replay-v0 --replay

RUN is the folder of a run of any of the four scripts, with --replay of dmg_finetune.py. A TD3 from scratch,
stopped half-way, makes what D4RL calls medium and medium-replay. The set is written as a whole or not at all.
"""

import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import minari
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Dict, flatdim
from minari.data_collector import EpisodeBuffer
from minari.storage.datasets_root_dir import get_dataset_path
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dmg_finetune as dmg

SCRIPTS = {"offline_steps": "dmg_finetune", "online_steps": "iql", "lam": "dmg_offline"}  # by an argument


@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[str]  # run folder
    dataset_id: tyro.conf.Positional[str]  # Minari id of the new set, in $MINARI_DATASETS_PATH
    replay: bool = False  # write the run's online transitions instead of new roll-outs
    transitions: int = 300_000  # environment steps of the roll-outs
    noise: float = 0.1  # standard deviation of the noise on their actions in [-1, 1]
    seed: int = 100  # of noise and episodes; one that no training has, or episodes start where its own did


def script_of(folder):
    """The script that made a run folder."""
    saved = json.loads(Path(folder, "args.json").read_text())
    name = next((name for key, name in SCRIPTS.items() if key in saved), "td3bc")
    script = importlib.import_module(name)
    if saved.get("script") != hashlib.sha256(Path(script.__file__).read_bytes()).hexdigest():
        print(f"Warning: {folder} is of a copy or another version of {name}.py: are its networks the same?")
    return script


def roll_out(args, env, agent, trained):
    """Act for args.transitions steps: transitions as dmg_finetune.py saves them, states as recorded."""
    (state_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    nothing = [torch.empty(0, *shape) for shape in ((state_dim,), (action_dim,), (), (state_dim,), ())]
    flags = {"from_scratch": True, "learning_starts": 0, "online_steps": args.transitions}
    settings = dmg.Args(trained.env_id, **flags, seed=args.seed)
    new_agent = dmg.Agent(state_dim, action_dim, settings)  # its mean is 0 and its std 1
    replay = dmg.Replay(nothing, env, new_agent, settings)
    rng = np.random.default_rng(args.seed)
    for _ in trange(args.transitions, unit="step"):
        action = agent.act(replay.observation[None])[0] + args.noise * rng.standard_normal(action_dim)
        replay.step(np.clip(action, -1, 1).astype(np.float32))
    return replay.state()


def saved_replay(checkpoint, agent):
    """The online transitions of a run of dmg_finetune.py, states as recorded."""
    online = checkpoint["online"]
    for k in (0, 3):  # observations, next observations
        online["rows"][k] = online["rows"][k] * agent.std + agent.mean
    return online


def nest(space, x):
    """Flat observations, (n, flatdim(space)), in the form of the space."""
    if isinstance(space, Box):
        return x.reshape(-1, *space.shape)
    named = isinstance(space, Dict)
    parts = list(space.values() if named else space)
    pieces = np.split(x, np.cumsum([flatdim(part) for part in parts])[:-1], -1)
    nested = [nest(part, piece) for part, piece in zip(parts, pieces, strict=True)]
    return dict(zip(space.keys(), nested, strict=True)) if named else tuple(nested)


def episodes(online, spaces, antmaze):
    """Minari's buffers of transitions, as the environment gave and took them."""
    space, box = spaces
    s, a, r, next_s, terminated = (x.numpy() for x in online["rows"])
    a = a * (box.high - box.low) / 2 + (box.high + box.low) / 2
    ends = np.flatnonzero((next_s[:-1] != s[1:]).any(1)) + 1  # of all but the last
    for start, end in itertools.pairwise([0, *ends, len(r)]):
        over = terminated[start:end] == 1
        last = np.arange(start, end) == end - 1
        yield EpisodeBuffer(
            observations=nest(space, np.concatenate([s[start:end], next_s[end - 1 : end]])),
            actions=a[start:end].astype(np.float32),
            rewards=r[start:end] + antmaze,  # the scripts train on 0 and -1
            terminations=over,
            truncations=last & ~over,
        )


def description(trained, env):
    """The environment's spec, and the returns that mean a score of 0 and 100 if D4RL knows the robot."""
    spec = dataclasses.replace(env.spec, additional_wrappers=())
    if not dmg.is_environment(trained.env_id):
        source = dmg.open_minari(trained.env_id)
        spec = source._eval_env_spec or source.env_spec  # with its wrappers
    found = {"env": spec}
    robot = spec.id.split("-")[0].lower()
    if robot in dmg.D4RL_ROBOTS:
        _, found["ref_min_score"], found["ref_max_score"] = dmg.D4RL_ROBOTS[robot]
    return found


def collect(args):
    """Write the set. Raises ValueError and OSError."""
    script = script_of(args.run)
    trained = script.read_args(args.run)
    if args.replay and script.__name__ != "dmg_finetune":
        raise ValueError(f"{args.run} is of {script.__name__}.py: --replay needs one of dmg_finetune.py")
    if trained.env_id in dmg.D4RL_FILES:
        raise ValueError(f"a Minari set needs a Gymnasium environment, which {trained.env_id} has not")
    if not re.search(r"-v\d+$", args.dataset_id):
        raise ValueError(f"{args.dataset_id} has no version: is it {args.dataset_id}-v0?")
    target = get_dataset_path(args.dataset_id)
    if target.exists():
        raise ValueError(f"{target} exists: delete it or give another id")
    recorded, env = script.make_raw_env(trained), script.make_env(trained)
    agent = script.Agent(*env.observation_space.shape, *env.action_space.shape, trained)
    checkpoint = torch.load(Path(args.run, "checkpoint.pt"), map_location="cpu")
    agent.load_state_dict(checkpoint["agent"])
    online = saved_replay(checkpoint, agent) if args.replay else roll_out(args, env, agent, trained)
    spaces = recorded.observation_space, recorded.action_space
    buffers = list(episodes(online, spaces, dmg.is_antmaze(trained)))
    facts = description(trained, recorded) | {"algorithm_name": script.__name__}
    root = get_dataset_path()
    with tempfile.TemporaryDirectory(prefix=".", dir=root) as temporary:
        os.environ["MINARI_DATASETS_PATH"] = temporary  # Minari would write in place
        try:
            minari.create_dataset_from_buffers(args.dataset_id, buffers, **facts)
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(Path(temporary, args.dataset_id), target)
    returns = [buffer.rewards.sum() for buffer in buffers]
    print(f"{target}: {len(buffers):,} episodes, return {np.mean(returns):.1f} +- {np.std(returns):.1f}")


if __name__ == "__main__":
    collect(tyro.cli(Args))
