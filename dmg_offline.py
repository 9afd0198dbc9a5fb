"""Doubly Mild Generalization (DMG) for offline RL, in one file.

Mao, Wang, Qu, Jiang, Ji, "Doubly Mild Generalization for Offline Reinforcement Learning", NeurIPS 2024,
https://arxiv.org/abs/2411.07934

    python dmg_offline.py --env-id walker2d-medium-v2 --lam 0.25

Arguments, networks, losses and update (Algorithm 1), data, environments, evaluation, speed, main.
`update` equals the published code to 1e-14 (float64, 50 steps). 32 of D4RL's 33 policies return here
what was published: hopper_online_10 1296 +- 65, published 1291 +- 86, in Gymnasium's Hopper-v4 1186 +- 43.
"""

import copy
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import minari
import mujoco
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.wrappers import FlattenObservation, RecordVideo, RescaleAction, TimeLimit
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    # ---- shared by all scripts: dataset arguments ----
    env_id: str = "dmg/halfcheetah/medium-replay-v0"
    """a D4RL v2 name, a Minari id (this one is in datasets/), or a Gymnasium id with --dataset-path"""
    dataset_path: str | None = None
    """HDF5 file in D4RL's schema: your own data, or a replacement for the file of a D4RL name"""
    normalize_states: bool | None = None
    """normalise states by the dataset's mean and standard deviation; None: yes, AntMaze no"""
    # ---- end of dataset arguments ----
    gradient_steps: int = 1_000_000
    """number of iterations of the update"""
    lam: float = 0.25
    """mixture coefficient (lambda), in [0, 1]: weight of the mildly generalized maximum in the target"""
    nu: float | None = None
    """penalty coefficient (nu); None: 0.1, 10 if the dataset's name contains "expert", AntMaze 0.5"""
    expectile: float | None = None
    """expectile of the in-sample maximum (tau), in [0, 1]; None: 0.7, AntMaze 0.9"""
    in_sample: Literal["iql", "xql", "sql"] = "iql"
    """how V learns the in-sample maximum: expectile, Gumbel regression or sparse Q-learning (Table 3)"""
    in_sample_temperature: float | None = None
    """beta of xql, alpha of sql; None: xql 5, sql 2, with medium-expert data 5"""
    inverse_temperature: float | None = None
    """inverse temperature of the advantage weights (alpha); None: 3, AntMaze 10"""
    max_weight: float | None = None
    """upper clip of the advantage weights; None: 3, AntMaze 100"""
    policy_frequency: int = 2
    """critic updates per update of actor and targets"""
    policy_noise: float = 0.2
    """standard deviation of the target policy's smoothing noise, in units of the action range [-1, 1]"""
    noise_clip: float = 0.5
    """clip of the smoothing noise, same unit"""
    exp_name: str = "dmg_offline"
    """name of the experiment, part of the run folder's name"""
    # ---- shared by all scripts: run arguments ----
    gamma: float = 0.99
    """discount factor, in [0, 1]"""
    target_update_rate: float = 0.005
    """Polyak rate of the target networks (xi), in [0, 1]"""
    batch_size: int = 256
    """transitions per gradient step"""
    learning_rate: float = 3e-4
    """Adam's step size, before any decay"""
    eval_frequency: int | None = None
    """gradient steps between evaluations, each with a checkpoint; None: 20,000, AntMaze 50,000"""
    eval_episodes: int | None = None
    """whole episodes per evaluation; None: 10, AntMaze 100"""
    seed: int = 0
    """seed of networks, batches, noise and evaluation episodes"""
    resume: str | None = None
    """run folder to continue from its checkpoint, with that run's arguments"""
    cuda: bool = True
    """train on the GPU if there is one"""
    cudagraphs: bool = True
    """on a GPU, launch the whole update as one CUDA graph"""
    compile: bool = False
    """compile the update (on a CPU it needs a C++ compiler and is then 1.2 times as fast)"""
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    """of matrix products: high is float32 on a CPU, TF32 on a GPU; medium is faster on some AMD CPUs"""
    torch_deterministic: bool = True
    """use deterministic kernels, so that one seed gives the same bits again on the same machine"""
    capture_video: bool = False
    """film the first episode of each evaluation into the run folder (needs moviepy)"""
    track: bool = False
    """mirror the TensorBoard log to Weights & Biases (needs wandb)"""
    wandb_project_name: str = "dmg"
    """project of --track"""
    wandb_entity: str | None = None
    """team of --track"""
    # ---- end of run arguments ----

    def __post_init__(self):
        """Fill in what depends on the dataset (App. C.1, Table 5). Raises InputError."""
        name = Path(self.env_id).name + Path(self.dataset_path or "").name.replace("_", "-")
        defaults = {"nu": 10.0 if "expert" in name else 0.1, "expectile": 0.7}
        defaults |= {"inverse_temperature": 3.0, "max_weight": 3.0}
        if is_antmaze(self):
            defaults = {"nu": 0.5, "expectile": 0.9, "inverse_temperature": 10.0, "max_weight": 100.0}
        temperatures = {"iql": None, "xql": 5.0, "sql": 5.0 if "medium-expert" in name else 2.0}
        defaults["in_sample_temperature"] = temperatures[self.in_sample]
        complete(self, defaults)


# ---- shared by all scripts: networks ----
class Linear(nn.Module):
    """nn.Linear, (B, n_in) -> (B, n_out), or two side by side, (2, B, n_in) -> (2, B, n_out)."""

    def __init__(self, n_in, n_out, *nets):
        super().__init__()
        bound = n_in**-0.5  # nn.Linear's initialisation
        self.weight = nn.Parameter(torch.empty(*nets, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*nets, 1, n_out).uniform_(-bound, bound))

    def forward(self, x):
        if self.weight.shape[-1] == 1:  # the sum is faster than a product with one column
            return (x * self.weight.mT).sum(-1, keepdim=True) + self.bias
        product = torch.baddbmm if x.ndim == 3 else torch.addmm  # faster than x @ weight + bias
        return product(self.bias, x, self.weight)


def mlp(n_in, n_out, *nets):
    hidden = Linear(n_in, 256, *nets), nn.ReLU(True), Linear(256, 256, *nets), nn.ReLU(True)
    return [*hidden, Linear(256, n_out, *nets)]


class TwinCritic(nn.Sequential):
    """Q1 and Q2, batched to halve the matrix products: (B, state_dim), (B, action_dim) -> (2, B)."""

    # a LayerNorm in it needs parameters of shape (2, 1, 256): nn.LayerNorm(256) would be shared by Q1 and Q2
    def forward(self, s, a):
        return super().forward(torch.cat([s, a], -1).expand(2, -1, -1)).squeeze(-1)


# ---- end of networks ----
# ---- shared by DMG and IQL: value loss ----
def in_sample_value_loss(target_q, v, args):
    """Loss that draws V(s), (B,), to the maximum of Q'(s, a), (B,), over the dataset's actions (Eq. 15)."""
    u = target_q - v
    if args.in_sample == "iql":  # expectile
        return ((args.expectile - (u < 0).to(u.dtype)).abs() * u.square()).mean()
    if args.in_sample == "xql":  # Gumbel regression, scaled by its largest term
        z = (u / args.in_sample_temperature).clamp(max=7)
        return ((z.exp() - z - 1) * (-z.max().clamp(min=-1).detach()).exp()).mean()
    t = u / (2 * args.in_sample_temperature) + 1
    return (t.clamp(min=0).square() + v / args.in_sample_temperature).mean()


# ---- end of value loss ----
# ---- shared by the DMG scripts: agent, losses, update ----
class Agent(nn.Module):
    """The networks of Algorithm 1, their optimizers, and the mean and std that normalise states."""

    def __init__(self, state_dim, action_dim, args):
        super().__init__()
        self.actor = nn.Sequential(*mlp(state_dim, action_dim), nn.Tanh())  # (B, state) -> (B, action)
        self.critic = TwinCritic(*mlp(state_dim + action_dim, 1, 2))
        self.value = nn.Sequential(*mlp(state_dim, 1), nn.Flatten(0))  # (B, state) -> (B,)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("std", torch.ones(state_dim))
        self.actor_optimizer = Adam(self.actor, args.learning_rate)
        self.critic_optimizer = Adam(self.critic, args.learning_rate)
        self.value_optimizer = Adam(self.value, args.learning_rate)

    def normalise(self, observations):
        """Observations of the environment as the networks see them, both (n, state_dim)."""
        return (torch.as_tensor(observations).to(self.mean) - self.mean) / self.std

    @torch.no_grad()
    def act(self, observations):
        """Actions in [-1, 1], (n, action_dim), for observations of the environment, (n, state_dim)."""
        return self.actor(self.normalise(observations)).cpu().numpy()


def update(agent, batch, noise, args, update_actor):
    """One iteration of Algorithm 1. noise: (B, action_dim), standard normal. Returns detached scalars."""
    s, a, r, next_s, terminated = batch  # (B, state), (B, action), (B,), (B, state), (B,)

    # in-sample maximum (Eq. 15): V(s) tends to the largest Q'(s, a) over the dataset's actions
    with torch.no_grad():
        target_q = agent.critic_target(s, a).amin(0)
    v = agent.value(s)
    value_loss = in_sample_value_loss(target_q, v, args)
    agent.value_optimizer.minimise(value_loss)

    # critic (Eq. 16): a share lam of the target may generalize to the actor's action, the rest is in-sample
    with torch.no_grad():
        smoothing = (noise * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_a = (agent.actor_target(next_s) + smoothing).clamp(-1.0, 1.0)
        mild_max = agent.critic_target(next_s, next_a).amin(0)
        in_sample_max = agent.value(next_s)
        y = r + args.gamma * (1.0 - terminated) * (args.lam * mild_max + (1.0 - args.lam) * in_sample_max)
    q = agent.critic(s, a)
    critic_loss = (q - y).square().mean(1).sum()
    agent.critic_optimizer.minimise(critic_loss)

    metrics = {"value_loss": value_loss, "critic_loss": critic_loss}
    metrics |= {"q_values": q.mean(), "v_values": v.mean()}
    if update_actor:
        # actor (Eq. 14): maximise Q near dataset actions, nearer to those of high advantage
        pi = agent.actor(s)
        q_pi = agent.critic(s, pi).amin(0)
        with torch.no_grad():
            advantage = target_q - agent.value(s)  # V after its step, unlike v
            weight = (args.inverse_temperature * advantage).clamp(max=math.log(args.max_weight)).exp()
        penalty = (weight.unsqueeze(-1) * (pi - a).square()).mean()
        actor_loss = -q_pi.mean() / q_pi.abs().mean().detach() + args.nu * penalty
        agent.actor_optimizer.minimise(actor_loss)

        # target networks
        with torch.no_grad():
            for net, target in ((agent.critic, agent.critic_target), (agent.actor, agent.actor_target)):
                torch._foreach_lerp_([*target.parameters()], [*net.parameters()], args.target_update_rate)
        metrics |= {"actor_loss": actor_loss, "advantage_weight": weight.mean()}
    return {name: value.detach() for name, value in metrics.items()}


# ---- end of agent, losses, update ----
def actor_learning_rate(step, args):
    """Cosine from learning_rate to 0 over all actor updates, then 0 (Table 5); step counts from 1."""
    updates_done = step // args.policy_frequency - 1
    progress = min(updates_done * args.policy_frequency / args.gradient_steps, 1.0)
    return args.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


# ---- shared by all scripts: data ----
# arguments, some of other scripts: those in [0, 1], and those of at least 1
UNIT_INTERVAL = "lam", "lam_end", "expectile", "gamma", "gamma_online", "target_update_rate"
FROM_ONE = "gradient_steps", "batch_size", "policy_frequency", "eval_frequency", "eval_episodes", "max_weight"
COLUMNS = "observations", "actions", "rewards", "terminals", "timeouts", "next_observations"
D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
D4RL_ROBOTS = {  # environment, return of a random and of an expert policy
    "halfcheetah": ("HalfCheetah-v4", -280.178953, 12135.0),
    "hopper": ("Hopper-v4", -20.272305, 3234.3),
    "walker2d": ("Walker2d-v4", 1.629008, 4592.3),
}
D4RL_MAZES = {  # cell of the goal in metres, map of 4 m cells without the wall around it
    "umaze": ((0, 8), "... ##. ..."),
    "medium": ((20, 20), "..##.. ..#... #...## ..#... .#..#. ...#.."),
    "large": ((32, 24), "....#..... .##.#.#.#. ......#... .####.###. ..#.#..... #.#.#.#.## ..#...#..."),
}
# the first 8 digits of the sha256 of their files, from tensorflow_datasets
D4RL_HASHES = """
    halfcheetah-random-v2:25407aef halfcheetah-medium-v2:41324e84 halfcheetah-medium-replay-v2:48d494a4
    halfcheetah-medium-expert-v2:015db75d halfcheetah-full-replay-v2:27fdf7ea halfcheetah-expert-v2:d9fe53bb
    hopper-random-v2:63103ef7 hopper-medium-v2:5bdf1bc4 hopper-medium-replay-v2:e121c5f7
    hopper-medium-expert-v2:9d51ad87 hopper-full-replay-v2:56baf959 hopper-expert-v2:01aa219a
    walker2d-random-v2:4e863bb6 walker2d-medium-v2:cf00f43a walker2d-medium-replay-v2:e75de96a
    walker2d-medium-expert-v2:6b8d7f86 walker2d-full-replay-v2:f2720f9d walker2d-expert-v2:2985dc3d
    antmaze-umaze-v2:5ef15257 antmaze-umaze-diverse-v2:c771dd63 antmaze-medium-play-v2:c9fec1c1
    antmaze-medium-diverse-v2:ad9dcbac antmaze-large-play-v2:6d353df2 antmaze-large-diverse-v2:84f775eb
"""
D4RL_SHA256 = dict(entry.split(":") for entry in D4RL_HASHES.split())


class Batch(NamedTuple):
    """Transitions as float32 tensors: states as the networks see them, actions in [-1, 1]."""

    observations: torch.Tensor  # (B, state_dim)
    actions: torch.Tensor  # (B, action_dim)
    rewards: torch.Tensor  # (B,)
    next_observations: torch.Tensor  # (B, state_dim)
    terminated: torch.Tensor  # (B,), 1 where the episode ended for good; a timeout is 0


class InputError(ValueError):
    """Wrong input: the user sees its sentence and no traceback."""


def is_antmaze(args):
    return "antmaze" in args.env_id.lower()


def complete(args, defaults):
    """Set each argument that is None to its default and check the ranges. Raises InputError."""
    antmaze = is_antmaze(args)
    defaults.setdefault("normalize_states", not antmaze)
    defaults["eval_frequency"] = 50_000 if antmaze else 20_000
    defaults["eval_episodes"] = 100 if antmaze else 10
    for name, value in vars(args).items():
        value = defaults.get(name) if value is None else value
        low = 1 if name in FROM_ONE else 0
        high = 1 if name in UNIT_INTERVAL else math.inf
        if isinstance(value, int | float) and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} must be in [{low}, {high}], not {value}")
        setattr(args, name, value)
    if args.dataset_path:
        args.dataset_path = str(Path(args.dataset_path).expanduser().resolve())


def download_d4rl(env_id):
    """Path of a D4RL v2 name's file in D4RL's cache folder, downloaded once. Raises InputError."""
    file = f"gym_mujoco_v2/{env_id[:-3].replace('-', '_')}-v2.hdf5"
    if env_id.startswith("antmaze"):
        maze = {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}[env_id.split("-")[1]]
        starts = env_id != "antmaze-umaze-v2"
        goals = "diverse" in env_id
        file = f"ant_maze_v2/Ant_maze_{maze}_noisy_multistart_{starts}_multigoal_{goals}_sparse_fixed.hdf5"
    path = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser() / Path(file).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # under a temporary name until it is whole and its sha256 is right
            torch.hub.download_url_to_file(D4RL_URL + file, path, D4RL_SHA256[env_id])
        except (OSError, RuntimeError) as error:
            raise InputError(f"cannot download {D4RL_URL + file} ({error}): put it at {path}") from error
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(D4RL_SHA256[env_id]):
        raise InputError(f"{path} is not D4RL's file, its sha256 differs: delete it")
    return path


def read_hdf5(path, env):
    """The COLUMNS of a file in D4RL's schema, and which rows are transitions, (N,). Raises InputError."""
    try:
        with h5py.File(path) as file:
            names = COLUMNS if COLUMNS[5] in file else COLUMNS[:5]
            columns = [file[name].astype(np.float32)[:] for name in names]
    except (OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}): it needs {', '.join(COLUMNS[:5])}") from error
    s, a, r, terminals, timeouts, *stored = check_columns(path, columns, env)
    # as in d4rl.qlearning_dataset next observations are the next row's; the file's own are only compared
    next_s = np.roll(s, -1, 0)
    kept = timeouts == 0
    kept[-1:] = False
    if not timeouts.any():
        advice = "set timeouts to 1 in the last row of each episode that a time limit ended"
        print(f"Warning: {path} marks no timeouts, so rows of two episodes may be joined: {advice}")
    if stored:
        differs = (np.abs(stored[0] - next_s) > 1e-4).any(1) & kept & (terminals == 0)
        if 2 * differs.sum() > kept.sum():
            raise InputError(f"{path} is not in time order: next_observations are not the next rows'")
        if differs.any():
            print(f"Warning: {path} has {differs.sum():,} next_observations that are not the next row's")
    return (s, a, r, terminals, timeouts, next_s), kept


def open_minari(env_id):
    """A Minari dataset, from datasets/ beside this file, the disk or the network. Raises InputError."""
    folder = Path(globals().get("__file__", "")).resolve().parent / f"datasets/{env_id}/data"
    if env_id.startswith("dmg/") and not folder.exists():
        raise InputError(f"{env_id} is in the folder datasets/ of the repository: clone it, or give --env-id")
    if env_id in gym.registry:
        raise InputError(f"{env_id} is an environment: add --dataset-path")
    if not folder.exists():
        folder = minari.storage.local.get_dataset_path(env_id) / "data"
    try:
        if not folder.exists() and "/" in env_id:
            minari.download_dataset(env_id)
        metadata = json.loads((folder / "metadata.json").read_text())
        if not {"observation_space", "action_space"} <= metadata.keys():
            raise ValueError("it does not say its spaces")  # Minari would import what it names to find them
        source = minari.MinariDataset(folder)
    except Exception as error:  # of the network, the server or the files: they have no common class
        known = f"a D4RL name ({', '.join(D4RL_SHA256)}) or a Minari id like mujoco/hopper/medium-v0"
        advice = f"give {known}; if a download was interrupted, delete {folder.parent}"
        raise InputError(f"cannot load {env_id} ({type(error).__name__}: {error}): {advice}") from error
    spec = source._eval_env_spec or source.env_spec
    if spec is None:
        raise InputError(f"{env_id} has no environment to evaluate in")
    if spec.id not in gym.registry:
        import gymnasium_robotics  # noqa: F401  registers its environments; not at the top: it prints
    registered = gym.registry.get(spec.id)
    if registered is None or registered.entry_point != spec.entry_point:
        raise InputError(f"{env_id} needs {spec.id} ({spec.entry_point}): register it in this file")
    spec.kwargs.pop("render_mode", None)
    recorders = ":Monitor", ":RecordEpisodeStatistics", ":RecordVideo"
    wrappers = [x for x in spec.additional_wrappers if not x.entry_point.endswith(recorders)]
    for wrapper in wrappers:
        code = wrapper.entry_point
        if ":Normalize" in code or not code.startswith("gymnasium.wrappers."):
            raise InputError(f"{env_id} has no code or statistics for {code}: record it without")
    spec.additional_wrappers = tuple(wrappers)
    return source


def read_minari(env_id, env):
    """The COLUMNS of a Minari dataset, and that all rows are transitions, (N,). Raises InputError."""
    source = open_minari(env_id)
    episodes = []
    space = env.env.env.observation_space  # without our RescaleAction and FlattenObservation
    try:
        for x in source:
            observations = gym.vector.utils.iterate(space, x.observations)
            s = np.stack([gym.spaces.flatten(space, observation) for observation in observations])
            episodes.append((s[:-1], x.actions, x.rewards, x.terminations, x.truncations, s[1:]))
    except (OSError, KeyError) as error:
        folder = source.storage.data_path.parent
        raise InputError(f"{env_id} is incomplete ({error}): delete {folder} and try again") from error
    columns = [np.concatenate(x, dtype=np.float32) for x in zip(*episodes, strict=True)]
    return check_columns(env_id, columns, env), np.ones(len(columns[0]), bool)


def check_columns(name, columns, env):
    """The columns with the shapes of `env`, rewards, terminals and timeouts (N,). Raises InputError."""
    rows = len(columns[0])
    state, action = env.observation_space.shape, env.action_space.shape
    widths = state, action, (), (), (), state
    for k, x in enumerate(columns):
        shape = (rows, *widths[k])
        if len(x) != rows or x.size != math.prod(shape):
            raise InputError(f"{name} has {COLUMNS[k]} of shape {x.shape}, not {shape}")
        if not np.isfinite(x).all():
            advice = "remove each such row and mark the row before it as a timeout"
            raise InputError(f"{name} has NaN or infinite {COLUMNS[k]}: {advice}")
        columns[k] = x.reshape(shape)
    if not np.isin(columns[3:5], (0, 1)).all():
        raise InputError(f"{name} has terminals or timeouts other than 0 and 1")
    return columns


def load_dataset(args):
    """The dataset as a Batch, and the mean and std that normalised its states. Raises InputError."""
    env = make_env(args)
    box = env.env.action_space  # without our RescaleAction: the bounds of the dataset
    name = args.dataset_path or args.env_id
    if args.dataset_path or name in D4RL_SHA256:
        columns, kept = read_hdf5(args.dataset_path or download_d4rl(name), env)
    else:
        columns, kept = read_minari(name, env)
    s, a, r, terminated, timeouts, next_s = columns
    if not kept.any():
        raise InputError(f"{name} has no transition")
    a = (a - (box.high + box.low) / 2) / ((box.high - box.low) / 2)
    if np.abs(a).max() > 1 + 1e-3:
        raise InputError(f"{name} has actions outside the environment's {box.low} to {box.high}")
    if is_antmaze(args):
        if not np.isin(r, (0, 1)).all():
            raise InputError(f"{name} has AntMaze rewards that are not 1 at the goal and 0 elsewhere")
        terminated = r  # a recorded episode goes on after its goal
        r = r - 1  # 0 at the goal, -1 elsewhere
    s, a, r, next_s, terminated = (torch.from_numpy(x[kept]).float() for x in (s, a, r, next_s, terminated))
    ends = f"{terminated.sum():,.0f} terminals, {timeouts.sum():,.0f} timeouts"
    print(f"{name}: {len(r):,} transitions, {ends}, mean reward {r.mean():.3f}")
    std, mean = torch.std_mean(s.double(), 0, correction=0)
    mean = mean.float()
    std = (std + 1e-3).float()
    if not args.normalize_states:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    return Batch((s - mean) / std, a, r, (next_s - mean) / std, terminated), mean, std


# ---- end of data ----
# ---- shared by all scripts: environments ----
def legacy_inertia(env):
    """Give the robot of `env` MuJoCo 2.1.0's masses and inertias: else D4RL's agents fall."""
    spec = mujoco.MjSpec.from_file(env.fullpath)
    stock = spec.compile()  # gives the geoms their ids
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE:  # it weighed as much as a longer cylinder
            radius, half_length, _ = stock.geom_size[geom.id]
            geom.type, geom.size = mujoco.mjtGeom.mjGEOM_CYLINDER, [radius, half_length + radius / 2, 0]
            geom.pos, geom.quat, geom.fromto[:] = stock.geom_pos[geom.id], stock.geom_quat[geom.id], np.nan
    legacy = spec.compile()
    for field in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(env.model, field)[:] = getattr(legacy, field)
    mujoco.mj_setConst(env.model, mujoco.MjData(env.model))


class D4RLAntMaze(AntEnv):
    """D4RL's antmaze-*-v2: observation qpos (15) and qvel (14), reward 1 and end within 0.5 of the goal.

    Gymnasium's ant with D4RL's mazes, time step, contacts, torque, frame (the start cell is the origin, +y
    runs down the map), reset and goal noise (d4rl/locomotion/*.py).
    """

    def __init__(self, size, **options):
        self.goal_cell, self.map = D4RL_MAZES[size]
        seen = {"exclude_current_positions_from_observation": False, "include_cfrc_ext_in_observation": False}
        super().__init__(**seen, **options)
        legacy_inertia(self)

    def _initialize_simulation(self):
        spec = mujoco.MjSpec.from_file(self.fullpath)
        wall = {"type": mujoco.mjtGeom.mjGEOM_BOX, "size": [2, 2, 1], "contype": 1, "conaffinity": 1}
        cells = np.pad([list(row) for row in self.map.split()], 1, constant_values="#")
        for i, j in np.argwhere(cells == "#"):
            spec.worldbody.add_geom(pos=[4 * (j - 1), 4 * (i - 1), 1], **wall)
        model = spec.compile()
        model.opt.timestep = 0.02
        model.actuator_gear[:, 0] = 30
        model.geom_solimp[:, :3] = 0.8, 0.8, 0.01
        return model, mujoco.MjData(model)

    def reset_model(self):
        self.goal = self.goal_cell + self.np_random.uniform(0, 1, 2) + self.np_random.uniform(0, 0.5, 2)
        return super().reset_model()

    def step(self, action):
        self.do_simulation(action, self.frame_skip)
        reached = math.dist(self.data.qpos[:2], self.goal) <= 0.5
        return self.state_vector(), float(reached), reached, False, {}


def make_env(args, **options):
    """The evaluation environment, with vector observations and actions in [-1, 1]. Raises InputError."""
    mujoco.set_mju_user_warning(warnings.warn)  # not into the file MUJOCO_LOG.TXT
    warnings.filterwarnings("ignore", ".*settotalmass")  # of HalfCheetah's XML
    name = args.env_id
    if is_antmaze(args) and name not in D4RL_SHA256:
        import gymnasium_robotics  # noqa: F401  registers AntMaze

        options["continuing_task"] = False  # an episode ends at the goal
    try:
        if name in D4RL_SHA256 and is_antmaze(args):
            size = name.split("-")[1]
            env = TimeLimit(D4RLAntMaze(size, **options), 700 if size == "umaze" else 1000)
        elif name in D4RL_SHA256:
            with warnings.catch_warnings(action="ignore"):  # -v4 and its XML are out of date on purpose
                env = gym.make(D4RL_ROBOTS[name.split("-")[0]][0], **options)
                legacy_inertia(env.unwrapped)
        elif args.dataset_path or name in gym.registry:
            env = gym.make(name, **options)
        else:
            env = open_minari(name).recover_environment(eval_env=True, **options)
    except (gym.error.Error, ImportError) as error:
        raise InputError(f"cannot make the environment of {name}: {error}") from error
    if name not in D4RL_SHA256 and env.spec.max_episode_steps is None:
        warnings.warn(f"{name} has no time limit: episodes end after 1000 steps", stacklevel=1)
        env = TimeLimit(env, 1000)
    space, box = env.observation_space, env.action_space
    if not isinstance(box, gym.spaces.Box) or len(box.shape) != 1 or not box.is_bounded():
        raise InputError(f"{name} has actions of {box}; only a Box of one dimension with bounds works")
    if re.search(r"(Discrete|Binary|Text|Sequence|Graph|OneOf)\(", str(space)):
        raise InputError(f"{name} has observations of {space}; only Box, and Dict or Tuple of Box, work")
    return RescaleAction(FlattenObservation(env), np.float32(-1), np.float32(1))


# ---- end of environments ----
# ---- shared by all scripts: evaluation and run folder ----
EVAL_HEADER = "step,return_mean,return_std,normalized_score,length_mean,episodes,wall_seconds"


def evaluate(act, envs, seed):
    """Returns and lengths, (n,) each, of a whole episode in each of n envs, the k-th reset with seed + k."""
    returns, lengths = np.zeros((2, len(envs)))
    observations = np.stack([env.reset(seed=seed + k)[0] for k, env in enumerate(envs)])
    playing = set(range(len(envs)))
    while playing:
        actions = act(observations)  # (n, state_dim) -> (n, action_dim)
        for k in sorted(playing):
            observations[k], reward, terminated, truncated, _ = envs[k].step(actions[k])
            returns[k] += reward
            lengths[k] += 1
            if terminated or truncated:
                playing.remove(k)
    return returns, lengths


def normalized_score(args, mean_return):
    """100 (R - random) / (expert - random), AntMaze: percent of successes; None without references."""
    if is_antmaze(args):
        return 100 * mean_return
    if args.env_id in D4RL_SHA256:
        _, random, expert = D4RL_ROBOTS[args.env_id.split("-")[0]]
    elif args.dataset_path or args.env_id in gym.registry:
        return None
    else:
        metadata = open_minari(args.env_id).storage.metadata
        random, expert = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    return None if random is None or expert is None else 100 * (mean_return - random) / (expert - random)


def read_args(folder):
    """The arguments of a run of this script. Raises InputError."""
    try:
        saved = json.loads(Path(folder, "args.json").read_text())
        Path(folder, "checkpoint.pt").stat()  # raises OSError: killed before the first one
        return Args(**{name: saved[name] for name in vars(Args())})
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{folder} is no run of this script: {error}") from error


def set_up(args):
    """Print the arguments that are set and prepare torch; returns the device."""
    for name, value in vars(args).items():
        if value is not None and (args.track or not name.startswith("wandb")):
            print(f"{name:24}{value}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads such memory here
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))  # more stall on a busy CPU
    torch.manual_seed(args.seed)
    if not args.cuda or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_stream(torch.cuda.Stream())  # a CUDA graph cannot be captured on the default one
    return torch.device("cuda")


def open_run(args, first):
    """The run folder, new or resumed before step `first`, with args.json in it, and its TensorBoard log."""
    name = f"{re.sub('[/:]', '-', args.env_id)}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
    folder = Path(args.resume or f"runs/{name}")
    folder.mkdir(parents=True, exist_ok=bool(args.resume))
    versions = {module.__name__: module.__version__ for module in (torch, gym, mujoco, minari)}
    record = vars(args) | {"resume": None, "versions": versions}
    (folder / "args.json").write_text(json.dumps(record, indent=2))
    if args.track:
        import wandb

        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": folder.name}
        wandb.init(**names, id=folder.name, resume="allow", config=record, sync_tensorboard=True)
    return folder, SummaryWriter(folder, purge_step=first)  # hides what a killed run logged from there on


# ---- end of evaluation and run folder ----
# ---- shared by all scripts: speed ----
class Adam(nn.Module):
    """torch.optim.Adam as a function: the class cannot be part of a compiled update."""

    def __init__(self, net, learning_rate):
        super().__init__()
        self.net_parameters = list(net.parameters())
        # running means of the gradients (m) and of their squares (v)
        self.m = nn.ParameterList(map(torch.zeros_like, self.net_parameters)).requires_grad_(False)
        self.v = copy.deepcopy(self.m)
        self.steps = nn.ParameterList(torch.zeros(()) for _ in self.m).requires_grad_(False)
        # not in the checkpoint: it is an argument, which --resume may change
        self.register_buffer("learning_rate", torch.tensor(learning_rate), persistent=False)

    @torch.no_grad()
    def minimise(self, loss):
        """One step on the parameters of `net` alone: the other networks in the loss get no gradient."""
        gradients = torch.autograd.grad(loss, self.net_parameters)
        state = list(self.m), list(self.v), [], list(self.steps)  # [] would be amsgrad's
        options = {"lr": self.learning_rate, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
        options |= {"weight_decay": 0.0, "amsgrad": False, "maximize": False}
        compiling = torch.compiler.is_compiling()  # the compiler makes its own kernel
        options |= {"fused": not compiling, "capturable": compiling}
        adam(self.net_parameters, gradients, *state, **options)


def accelerate(step, args, device):
    """step(update_actor), which changes tensors in place, compiled and, on a GPU, as a CUDA graph."""
    if sys.platform == "linux":  # keep what a step frees: 15 % faster
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
    if args.compile:
        whole = hasattr(torch._dynamo.config, "trace_autograd_ops")  # else torch.autograd.grad splits it
        if whole:
            torch._dynamo.config.trace_autograd_ops = True
        step = torch.compile(step, fullgraph=whole, options={"cpp_wrapper": device.type == "cpu"})
    if device.type != "cuda" or not args.cudagraphs:
        return step
    calls = [0, 0]
    graphs = {}

    def launch(update_actor):
        calls[update_actor] += 1
        if calls[update_actor] < 4:  # warm up the libraries
            return step(update_actor)
        if update_actor not in graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                metrics = step(update_actor)  # recorded, not run
            graphs[update_actor] = graph, metrics
        graph, metrics = graphs[update_actor]
        graph.replay()
        return metrics

    return launch


# ---- end of speed ----
def main(args):
    """Train; with --resume, from the checkpoint on. Raises InputError; SystemExit(3) after a divergence."""
    device = set_up(args)
    dataset, mean, std = load_dataset(args)
    dataset = Batch(*(x.to(device) for x in dataset))
    q_limit = 1000 + 10 * dataset.rewards.abs().max().item() / (1.001 - args.gamma)  # above any return
    envs = [make_env(args) for _ in range(args.eval_episodes)]
    action_dim = dataset.actions.shape[1]
    agent = Agent(len(mean), action_dim, args)
    generator = torch.Generator(device).manual_seed(args.seed)  # of batches and noise, not of evaluation
    first = 0
    evaluations = []
    begun = time.time()
    if args.resume:
        checkpoint = torch.load(Path(args.resume, "checkpoint.pt"), map_location="cpu")
        agent.load_state_dict(checkpoint["agent"])
        if checkpoint["device"] == device.type:  # the other kind draws other random numbers
            generator.set_state(checkpoint["generator"])
        first, evaluations = checkpoint["step"] + 1, checkpoint["evaluations"]
        begun -= evaluations[-1][-1]  # the seconds until then
    agent.mean, agent.std = mean, std  # of these data, also where --resume changed them
    agent.to(device)
    index = torch.empty(args.batch_size, dtype=torch.int64, device=device)
    noise = torch.empty(args.batch_size, action_dim, device=device)

    def update_on_batch(update_actor):
        return update(agent, Batch(*(x[index] for x in dataset)), noise, args, update_actor)

    learn = accelerate(update_on_batch, args, device)
    folder, writer = open_run(args, first)
    if args.capture_video:
        env = make_env(args, render_mode="rgb_array")
        envs[0] = RecordVideo(env, f"{folder}/videos", lambda _: True, name_prefix=f"from-step-{first}")
    metrics = {}  # step 0 only evaluates
    steps = range(first, args.gradient_steps + 1)
    for step in tqdm(steps, initial=first, total=steps.stop, unit="step"):
        if step > 0:
            agent.actor_optimizer.learning_rate.fill_(actor_learning_rate(step, args))
            index.random_(len(dataset.rewards), generator=generator)
            noise.normal_(generator=generator)
            metrics |= learn(step % args.policy_frequency == 0)

        due = step % args.eval_frequency == 0 or step == args.gradient_steps
        if step > 0 and (due or step % 1000 == 0):
            logs = {f"losses/{name}": value.item() for name, value in metrics.items()}
            if not math.isfinite(sum(logs.values())) or abs(logs["losses/q_values"]) > q_limit:
                writer.add_scalar("eval/diverged", 1, step)
                writer.close()
                print(f"diverged at step {step:,}, {folder} has the last checkpoint: {logs}", file=sys.stderr)
                sys.exit(3)
            logs["charts/SPS"] = step / (time.time() - begun)
            logs["charts/actor_learning_rate"] = agent.actor_optimizer.learning_rate.item()
            for name, value in logs.items():
                writer.add_scalar(name, value, step)

        if due:
            returns, lengths = evaluate(agent.act, envs, 1000 * (args.seed + 1))  # the same episodes
            average, spread, length = map(float, (returns.mean(), returns.std(), lengths.mean()))
            score = normalized_score(args, average)
            writer.add_scalar("eval/episodic_return", average, step)
            writer.add_scalar("eval/episodic_length", length, step)
            message = f"step {step:,}: return {average:.1f} +- {spread:.1f}"
            if score is not None:
                writer.add_scalar("eval/normalized_score", score, step)
                message += f", score {score:.1f}"
            tqdm.write(message)
            writer.flush()
            evaluations.append([step, average, spread, score, length, len(envs), time.time() - begun])
            lines = [",".join(map(str, row)) for row in evaluations]
            (folder / "eval.csv").write_text("\n".join([EVAL_HEADER, *lines, ""]))
            state = {"step": step, "evaluations": evaluations, "device": device.type}
            state |= {"agent": agent.state_dict(), "generator": generator.get_state()}
            torch.save(state, folder / "checkpoint.tmp")
            os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")  # whole at every moment
    writer.close()
    envs[0].close()  # RecordVideo writes the last film
    column, name = (3, "normalized_score") if evaluations[-1][3] is not None else (1, "return_mean")
    last = [row[column] for row in evaluations[-5:]]
    print(f"{folder}: {name} {last[-1]:.1f}, mean of the last five {np.mean(last):.1f}")


if __name__ == "__main__" and "__file__" in globals():  # not when pasted into a notebook
    arguments = tyro.cli(Args)
    try:
        if arguments.resume:  # other flags change that run's arguments
            arguments = tyro.cli(Args, default=read_args(arguments.resume))
        main(arguments)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.13.0", "numpy>=2.0", "gymnasium[mujoco]>=1.4,<2", "gymnasium-robotics>=1.4.2,<2",
#   "minari[hdf5,hf]>=0.5.4,<0.6", "tyro>=1.0", "tensorboard>=2.20", "h5py>=3.8", "tqdm>=4.66", "pillow",
# ]
# ///
