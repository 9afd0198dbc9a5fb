"""Doubly Mild Generalization (DMG), offline then online, in one file.

Mao, Wang, Qu, Jiang, Ji, "Doubly Mild Generalization for Offline Reinforcement Learning", NeurIPS 2024,
https://arxiv.org/abs/2411.07934

    python dmg_finetune.py --env-id antmaze-umaze-v2
    python dmg_finetune.py --checkpoint runs/<a run of dmg_offline.py>

Arguments, networks, update (Algorithm 1), data, environments, evaluation, speed, replay, main. A block headed
"the same in ..." is shared with the project's other scripts.
The update equals the authors' published code to 1e-13 (README.md); tests/test_update.py derives it again.
The environments give 31 of the 33 SAC policies published for D4RL their published returns (README.md).
Report the last evaluation: mean and standard deviation over seeds (the printed +- is over episodes).
"""

import copy
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import re
import time
import warnings
from pathlib import Path
from typing import Literal

import gymnasium as gym
import h5py
import minari
import mujoco
import numpy as np
import torch
import tyro
from gymnasium.envs.mujoco import ant_v5, half_cheetah_v4, hopper_v4, walker2d_v4
from gymnasium.wrappers import FlattenObservation, RecordVideo, RescaleAction, TimeLimit
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclasses.dataclass
class Args:  # None: the default in the field's comment, by the dataset; see __post_init__
    # ---- data: the same in all four scripts ----
    env_id: str = "walker2d-medium-v2"  # D4RL v2 name, Minari id, or the environment of dataset_path
    dataset_path: str | None = None  # your HDF5 file in D4RL's schema; with a D4RL name, instead of its file
    normalize_states: bool | None = None  # yes, by the first data's mean and std, then kept; AntMaze, IQL: no
    # ---- DMG, offline then online ----
    offline_steps: int = 1_000_000  # updates on the dataset alone
    online_steps: int = 1_000_000  # environment steps after that, each with an update
    checkpoint: str | None = None  # run of DMG to start from: its agent and arguments, not its online rows
    from_scratch: bool = False  # TD3: no dataset or offline steps, raw states, both lam 1, both nu 0
    learning_starts: int | None = None  # first online steps, random, without update: 0, from scratch 25k
    exploration_noise: float = 0.1  # standard deviation of the noise on online actions in [-1, 1]
    gamma_online: float | None = None  # discount factor online, in [0, 1]: gamma, on antmaze-large 0.995
    lam_end: float = 0.5  # what lam tends to online, in [0, 1]
    nu_end: float = 0.005  # what nu tends to online
    lam: float = 0.25  # mixture coefficient (lambda), in [0, 1]: share of the target that may generalize
    nu: float | None = None  # penalty coefficient (nu): 0.1; 10 if env_id or file says expert; AntMaze 0.5
    expectile: float | None = None  # expectile of the in-sample maximum (tau), in [0, 1]: 0.7, AntMaze 0.9
    in_sample: Literal["iql", "xql", "sql"] = "iql"  # how V learns the in-sample maximum (Table 3)
    in_sample_temperature: float | None = None  # xql's beta: 5; sql's alpha: 2, on expert data 5
    inverse_temperature: float | None = None  # advantage weights' inverse temperature (alpha): 3, AntMaze 10
    max_weight: float | None = None  # upper clip of the advantage weights, at least 1: 3, AntMaze 100
    policy_frequency: int = 2  # critic updates per update of actor and targets
    policy_noise: float = 0.2  # standard deviation of the target policy's noise; actions are in [-1, 1]
    noise_clip: float = 0.5  # clip of that noise
    gamma: float = 0.99  # discount factor (gamma), in [0, 1]
    target_update_rate: float = 0.005  # Polyak rate of the target networks (xi), in [0, 1]
    batch_size: int = 256  # transitions per update
    learning_rate: float = 3e-4  # Adam's; offline the actor's falls to 0 by a cosine
    # ---- run: the same in all four scripts ----
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    eval_frequency: int | None = None  # steps between evaluations and checkpoints: 20k, AntMaze 50k
    eval_episodes: int | None = None  # whole episodes per evaluation: 10, AntMaze 100
    seed: int = 0  # of networks, batches, noise and episodes
    resume: str | None = None  # run folder to continue from its checkpoint; other flags change its arguments
    cuda: bool = True  # train on the GPU if there is one
    cudagraphs: bool = True  # on a GPU, replay the update as CUDA graphs; freezes args' numbers: see update
    compile: bool = False  # torch.compile the update; freezes args' numbers; needs torch 2.13, on a CPU g++
    torch_deterministic: bool = True  # deterministic kernels: one seed, the same bits on the same machine
    capture_video: bool = False  # film the first episode of each evaluation (needs moviepy)
    track: bool = False  # mirror the log to Weights & Biases (needs wandb, takes WANDB_PROJECT, WANDB_ENTITY)

    def __post_init__(self):
        """Set what is None by the dataset (App. C.1, Table 5). Raises ValueError for what cannot work."""
        names = f"{self.env_id} {Path(self.dataset_path or '').name}".lower()
        expert = "expert" in re.findall("[a-z]+", names)
        defaults = {"nu": 10.0 if expert else 0.1, "expectile": 0.7}
        defaults |= {"inverse_temperature": 3.0, "max_weight": 3.0}
        defaults |= {"normalize_states": True, "eval_frequency": 20_000, "eval_episodes": 10}
        if is_antmaze(self):
            defaults = {"nu": 0.5, "expectile": 0.9, "inverse_temperature": 10.0, "max_weight": 100.0}
            defaults |= {"normalize_states": False, "eval_frequency": 50_000, "eval_episodes": 100}
        defaults["in_sample_temperature"] = 2.0 if self.in_sample == "sql" and not expert else 5.0
        large = is_antmaze(self) and "large" in self.env_id.lower()
        defaults["gamma_online"] = 0.995 if large else self.gamma
        defaults["learning_starts"] = 25_000 if self.from_scratch else 0
        if self.from_scratch:
            if self.checkpoint or self.dataset_path:
                raise ValueError("from_scratch uses no checkpoint and no dataset_path: leave them out")
            self.offline_steps = 0
            self.lam = self.lam_end = 1.0
            self.nu = self.nu_end = 0.0
            self.normalize_states = False
        at_least_one = "policy_frequency", "max_weight", "batch_size", "eval_frequency", "eval_episodes"
        unit_interval = "lam", "lam_end", "expectile", "gamma", "gamma_online", "target_update_rate"
        fill_and_check(self, defaults, at_least_one, unit_interval, needs_data=not self.from_scratch)
        if self.checkpoint and not self.resume and not Path(self.checkpoint, "checkpoint.pt").is_file():
            raise ValueError(f"{self.checkpoint} is no run with a checkpoint")
        if 0 < self.online_steps <= self.learning_starts:
            raise ValueError(f"learning_starts, {self.learning_starts}, must be less than online_steps")


# ---- networks and optimizer: the same in all four scripts ----
def mlp(n_in, n_out):
    hidden = nn.Linear(n_in, 256), nn.ReLU(inplace=True), nn.Linear(256, 256), nn.ReLU(inplace=True)
    return nn.Sequential(*hidden, nn.Linear(256, n_out))


class TwinCritic(nn.Module):
    """Q1 and Q2: (B, state_dim), (B, action_dim) -> (2, B)."""

    def __init__(self, state_dim, action_dim):
        super().__init__()
        self.q1 = mlp(state_dim + action_dim, 1)
        self.q2 = mlp(state_dim + action_dim, 1)

    def forward(self, s, a):
        sa = torch.cat([s, a], -1)
        return torch.stack([self.q1(sa), self.q2(sa)]).squeeze(-1)


def adam(net, args):  # to be used with minimize alone: a plain backward() would add to what is in .grad
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)  # once: --compile and CUDA graphs keep its address
    lr = torch.tensor(args.learning_rate)  # CUDA graphs freeze numbers; main's `with torch.device` places it
    return torch.optim.Adam(net.parameters(), lr, fused=not args.compile, capturable=lr.is_cuda)


def minimize(loss, optimizer):
    """zero_grad, backward and step for the optimizer's parameters alone: other networks get no gradient."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = torch.autograd.grad(loss, parameters)  # not backward(), which would split a compiled update
    torch._foreach_copy_([parameter.grad for parameter in parameters], gradients)  # in place for a graph
    optimizer.step()


# ---- value loss: the same in dmg_offline.py, dmg_finetune.py and iql.py ----
def in_sample_value_loss(target_q, v, args):
    """Loss that draws V(s), (B,), towards the largest Q'(s, a), (B,), of the data's actions (DMG Eq. 15)."""
    u = target_q - v
    if args.in_sample == "iql":  # expectile
        return ((args.expectile - (u < 0).to(u)).abs() * u.square()).mean()
    if args.in_sample == "xql":  # Gumbel regression; z clipped, all divided by e^(largest z), as published
        z = (u / args.in_sample_temperature).clamp(max=7)
        largest = z.max().clamp(min=-1).detach()
        return ((z.exp() - z - 1) * (-largest).exp()).mean()
    t = u / (2 * args.in_sample_temperature) + 1  # sql
    return (t.clamp(min=0).square() + v / args.in_sample_temperature).mean()


# ---- agent and update: the same in dmg_offline.py and dmg_finetune.py ----
class Agent(nn.Module):
    """The networks of Algorithm 1, their optimizers, and the mean and std that normalize states."""

    def __init__(self, state_dim, action_dim, args):
        super().__init__()
        self.actor = nn.Sequential(mlp(state_dim, action_dim), nn.Tanh())  # (B, state) -> (B, action)
        self.critic = TwinCritic(state_dim, action_dim)
        self.value = nn.Sequential(mlp(state_dim, 1), nn.Flatten(0))  # (B, state) -> (B,)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("std", torch.ones(state_dim))
        self.actor_optimizer = adam(self.actor, args)
        self.critic_optimizer = adam(self.critic, args)
        self.value_optimizer = adam(self.value, args)
        self.optimizers = self.actor_optimizer, self.critic_optimizer, self.value_optimizer  # saved by main

    def normalize(self, observations):
        """Observations of the environment as the networks see them, both (n, state_dim)."""
        return (torch.as_tensor(observations).to(self.mean) - self.mean) / self.std

    @torch.no_grad()
    def act(self, observations):
        """Actions in [-1, 1], (n, action_dim), for observations of the environment, (n, state_dim)."""
        return self.actor(self.normalize(observations)).cpu().numpy()


def update(agent, batch, noise, args, update_actor):
    """One iteration of Algorithm 1. noise: (B, action_dim), standard normal. Returns detached scalars.

    CUDA graphs and --compile allow no .item() here and freeze args' numbers: fill a tensor in place instead.
    """
    s, a, r, next_s, terminated = batch  # (B, state), (B, action), (B,), (B, state), (B,)

    # in-sample maximum (Eq. 15): V(s) is drawn towards the largest Q'(s, a) of the dataset's actions
    with torch.no_grad():
        target_q = agent.critic_target(s, a).amin(0)
    v = agent.value(s)
    value_loss = in_sample_value_loss(target_q, v, args)
    minimize(value_loss, agent.value_optimizer)

    # critic (Eq. 16): a share lam of the target may generalize to the actor's action, the rest is in-sample
    with torch.no_grad():
        smoothing = (noise * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_a = (agent.actor_target(next_s) + smoothing).clamp(-1.0, 1.0)
        mild_max = agent.critic_target(next_s, next_a).amin(0)
        in_sample_max = agent.value(next_s)
        y = r + args.gamma * (1.0 - terminated) * (args.lam * mild_max + (1.0 - args.lam) * in_sample_max)
    q = agent.critic(s, a)
    critic_loss = (q - y).square().mean(1).sum()
    minimize(critic_loss, agent.critic_optimizer)

    metrics = {"value_loss": value_loss, "critic_loss": critic_loss}
    metrics |= {"q_values": q.mean(), "v_values": v.mean()}
    if update_actor:
        # actor (Eq. 14): maximize Q near dataset actions, nearer to those of high advantage
        pi = agent.actor(s)
        q_pi = agent.critic(s, pi).amin(0)
        with torch.no_grad():
            advantage = target_q - agent.value(s)  # V after its step, unlike v
            # exp(alpha A), at most max_weight: its exponent is clipped, or exp could overflow
            weight = (args.inverse_temperature * advantage).clamp(max=math.log(args.max_weight)).exp()
        penalty = (weight.unsqueeze(-1) * (pi - a).square()).mean()
        q_scale = q_pi.abs().mean().detach()  # as in TD3+BC
        actor_loss = -q_pi.mean() / q_scale + args.nu * penalty
        minimize(actor_loss, agent.actor_optimizer)

        # target networks: only in the actor's steps, as published (Algorithm 1: every step)
        with torch.no_grad():
            for net, target in ((agent.critic, agent.critic_target), (agent.actor, agent.actor_target)):
                for parameter, target_parameter in zip(net.parameters(), target.parameters()):
                    target_parameter.lerp_(parameter, args.target_update_rate)
        metrics |= {"actor_loss": actor_loss, "advantage_weight": weight.mean()}
    return {name: value.detach() for name, value in metrics.items()}


# ---- schedules, exploration, the arguments of a checkpoint ----
def actor_learning_rate(step, args):
    """Cosine from learning_rate to 0 over the offline actor updates (Table 5), constant online."""
    progress = 0.0
    if step <= args.offline_steps:
        done = step // args.policy_frequency - 1  # actor updates before this one
        progress = done * args.policy_frequency / args.offline_steps
    return args.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def online_schedule(t, args):
    """lam, nu, gamma at online step t. Every 1000 steps lam_end and nu_end come 1 % nearer (App. C.2)."""
    left = 0.99 ** (t // 1000)
    lam = args.lam_end + (args.lam - args.lam_end) * left
    nu = args.nu_end + (args.nu - args.nu_end) * left
    return {"lam": lam, "nu": nu, "gamma": args.gamma_online}


def explore(agent, observation, t, args):
    """Action of online step t in [-1, 1], (action_dim,): the actor's with noise, at first uniform."""
    action = torch.as_tensor(agent.act(observation[None])[0]).to(agent.mean)
    if t <= args.learning_starts:
        action.uniform_(-1, 1)
    else:
        action += args.exploration_noise * torch.randn_like(action)
    return action.clamp(-1, 1).cpu().numpy()


def checkpoint_args(folder):
    """The arguments of the DMG run in `folder`; its steps so far are the offline steps."""
    args = read_args(folder)
    args.offline_steps = torch.load(f"{folder}/checkpoint.pt", map_location="cpu")["step"]
    vars(args).update(checkpoint=folder, exp_name=Args.exp_name)
    return args


# ---- arguments: the same in all four scripts ----
def is_antmaze(args):  # the word antmaze, no "dense" behind it: antmaze-umaze-v2, x:AntMaze_UMaze-v5
    return "antmaze" in re.findall("[a-z]+(?!.*dense)", args.env_id.lower())


def is_environment(env_id):
    return ":" in env_id or env_id in gym.registry  # gym.make imports the module of module:Env-v0


def fill_and_check(args, defaults, at_least_one, unit_interval, needs_data=True):
    """Set what is None. Raises ValueError (tyro: no traceback) for what cannot work, numbers below 0 too."""
    for name, value in vars(args).items():
        value = defaults.get(name) if value is None else value
        low = 1 if name in at_least_one else 0
        high = 1 if name in unit_interval else math.inf
        if isinstance(value, int | float) and not low <= value <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], not {value}")
        setattr(args, name, value)
    for file in (args.dataset_path, args.resume and f"{args.resume}/checkpoint.pt"):
        if file and not Path(file).is_file():
            raise ValueError(f"there is no file {file}")
    if is_environment(args.env_id):
        if needs_data and not args.dataset_path:
            raise ValueError(f"{args.env_id} is an environment: give its data with --dataset-path")
    elif not ("/" in args.env_id or args.env_id in D4RL_FILES or args.env_id in minari.list_local_datasets()):
        nearest = difflib.get_close_matches(args.env_id, [*D4RL_FILES, *gym.registry], 1, 0)[0]
        raise ValueError(f"no D4RL name, Minari id or environment is {args.env_id}: is it {nearest}?")


# ---- data: the same in all four scripts ----
D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
D4RL_ROBOTS = {  # environment, return of a random and of an expert policy (d4rl/infos.py)
    "halfcheetah": (half_cheetah_v4.HalfCheetahEnv, -280.178953, 12135.0),
    "hopper": (hopper_v4.HopperEnv, -20.272305, 3234.3),
    "walker2d": (walker2d_v4.Walker2dEnv, 1.629008, 4592.3),
}
D4RL_MAZES = {  # corner of the goal's area in meters, map of 4 m cells without the wall around it
    "umaze": ((0, 8), "... ##. ..."),
    "medium": ((20, 20), "..##.. ..#... #...## ..#... .#..#. ...#.."),
    "large": ((32, 24), "....#..... .##.#.#.#. ......#... .####.###. ..#.#..... #.#.#.#.## ..#...#..."),
}
D4RL_HASHES = """
    halfcheetah-random-v2:25407aef halfcheetah-medium-v2:41324e84 halfcheetah-medium-replay-v2:48d494a4
    halfcheetah-medium-expert-v2:015db75d halfcheetah-full-replay-v2:27fdf7ea halfcheetah-expert-v2:d9fe53bb
    hopper-random-v2:63103ef7 hopper-medium-v2:5bdf1bc4 hopper-medium-replay-v2:e121c5f7
    hopper-medium-expert-v2:9d51ad87 hopper-full-replay-v2:56baf959 hopper-expert-v2:01aa219a
    walker2d-random-v2:4e863bb6 walker2d-medium-v2:cf00f43a walker2d-medium-replay-v2:e75de96a
    walker2d-medium-expert-v2:6b8d7f86 walker2d-full-replay-v2:f2720f9d walker2d-expert-v2:2985dc3d
    antmaze-umaze-v2:5ef15257 antmaze-umaze-diverse-v2:c771dd63 antmaze-medium-play-v2:c9fec1c1
    antmaze-medium-diverse-v2:ad9dcbac antmaze-large-play-v2:6d353df2 antmaze-large-diverse-v2:84f775eb
"""  # after each name the first 8 digits of its file's sha256, from tensorflow_datasets
D4RL_FILES = dict(entry.split(":") for entry in D4RL_HASHES.split())


def download_d4rl(name):
    """Path of the file of a D4RL v2 name in D4RL's cache folder, downloaded once."""
    if name.startswith("antmaze"):
        maze = {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}[name.split("-")[1]]
        starts, goals = name != "antmaze-umaze-v2", "diverse" in name
        file = f"ant_maze_v2/Ant_maze_{maze}_noisy_multistart_{starts}_multigoal_{goals}_sparse_fixed.hdf5"
    else:
        file = f"gym_mujoco_v2/{name[:-3].replace('-', '_')}-v2.hdf5"
    path = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser() / Path(file).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # into a temporary file, renamed when it is whole
            torch.hub.download_url_to_file(D4RL_URL + file, path, D4RL_FILES[name])
        except OSError as error:
            raise ValueError(f"cannot download {D4RL_URL + file} ({error}): put it at {path}") from None
    return path


def read_hdf5(path):
    """s, a, r, next_s, terminated in D4RL's schema. Without next_observations: as d4rl.qlearning_dataset."""
    with h5py.File(path) as file:
        s, a = file["observations"][:], file["actions"][:]
        r, terminals = np.ravel(file["rewards"]), np.ravel(file["terminals"])  # some are (N, 1)
        timeouts = np.ravel(file.get("timeouts", np.zeros(len(s))))
        stored = "next_observations" in file
        next_s = file["next_observations"][:] if stored else np.roll(s, -1, 0)  # else the next row's
    kept = timeouts == 0  # as in d4rl, also where next_observations are stored
    if not stored:
        kept[-1:] = False
        if not timeouts.any() and not terminals.all():
            print(f"Warning: {path} marks no timeouts: rows of two episodes may be joined")
    lost = ((terminals == 1) | (r == 1))[~kept].sum()  # r == 1: AntMaze's success
    if lost:
        print(f"Warning: {path}: {lost} rows dropped, as in d4rl, are terminal or have reward 1")
    return [x[kept] for x in (s, a, r, next_s, terminals)]


@functools.cache  # opened once
def open_minari(env_id):
    """A Minari dataset, downloaded once. Raises ValueError if its environment cannot be made."""
    dataset = minari.load_dataset(env_id, download=True)
    spec = dataset._eval_env_spec or dataset.env_spec  # the first has no public name
    if spec is None or not len(dataset):
        raise ValueError(f"{env_id} has no environment to evaluate in, or no episodes")
    if spec.id not in gym.registry:
        import gymnasium_robotics  # noqa: F401  registers its environments; not at the top: it prints
    spec.kwargs.pop("render_mode", None)
    spec.additional_wrappers = tuple(  # no recorders
        x for x in spec.additional_wrappers if not re.match("Monitor|Record", x.name)
    )
    # the dataset names code: nothing may run but registered environments and wrappers that can be made again
    allowed = [environment.entry_point for environment in gym.registry.values()]
    for part in (spec, *spec.additional_wrappers):
        harmless = re.match(r"gymnasium\.wrappers\.(?!.*(Normalize|ClipAction))", part.entry_point)
        if part.entry_point not in allowed and not harmless:
            raise ValueError(f"{env_id} was recorded with {part.entry_point}, which cannot be made again")
    return dataset


def read_minari(env_id, env):
    """s, a, r, next_s, terminated of a Minari dataset, its observations, of env's space, as vectors."""
    dataset = open_minari(env_id)
    space, recorded = env.observation_space, dataset.observation_space
    if gym.spaces.flatdim(recorded) != gym.spaces.flatdim(space) or dataset.action_space != env.action_space:
        spaces = f"{recorded}, {dataset.action_space}; its environment: {space}, {env.action_space}"
        raise ValueError(f"{env_id} was recorded in other spaces: {spaces}")
    episodes = []
    for episode in dataset:
        observations = gym.vector.utils.iterate(space, episode.observations)  # of a Dict: a dict for each row
        s = np.stack([gym.spaces.flatten(space, x) for x in observations])
        episodes.append((s[:-1], episode.actions, episode.rewards, s[1:], episode.terminations))
    return [np.concatenate(column) for column in zip(*episodes)]


def load_dataset(args):
    """s, a, r, next_s, terminated of all transitions, float32: states as recorded, actions in [-1, 1]."""
    env = make_raw_env(args)
    space, box = env.observation_space, env.action_space
    name = args.dataset_path or args.env_id
    # five arrays of your own can stand here: columns = s, a, r, next_s, terminated, one row a transition
    if args.dataset_path or name in D4RL_FILES:
        columns = read_hdf5(args.dataset_path or download_d4rl(name))
    else:
        columns = read_minari(name, env)

    # data that would train silently wrong are refused; reshape refuses columns of other lengths or widths
    rows = len(columns[0])
    state_shape = (gym.spaces.flatdim(space),)
    shapes = state_shape, box.shape, (), state_shape, ()
    columns = [x.astype(np.float32).reshape(rows, *shape) for x, shape in zip(columns, shapes)]
    s, a, r, next_s, terminated = columns
    if is_antmaze(args):
        terminated = r  # whatever the file says: 1 at the goal, where D4RL's recorded episodes do not end
        r = r - 1  # 0 at the goal, -1 elsewhere
    next_s[terminated == 1] = 0  # for the check below; often NaN: a copy learning from next_s must skip these
    if not rows or not all(np.isfinite(x).all() for x in columns):
        raise ValueError(f"{name} has no transitions, or numbers that are not finite")
    a = (a - (box.high + box.low) / 2) / ((box.high - box.low) / 2)
    if not 0.01 < np.abs(a).max() < 1.001:  # within bounds of 1e6, say, all actions would be 0
        raise ValueError(f"{name} has actions that do not fit the environment's {box.low} to {box.high}")
    if not np.isin(terminated, (0, 1)).all():
        raise ValueError(f"{name} has terminals, or rewards of AntMaze, other than 0 and 1")
    print(f"{name}: {rows:,} transitions, {terminated.sum():,.0f} terminal, mean reward {r.mean():.3f}")
    return [torch.from_numpy(x).float() for x in (s, a, r, next_s, terminated)]


# ---- environments: the same in all four scripts ----
def legacy_physics(model, xml):
    """MuJoCo 2.1.0's masses of capsules (with others D4RL's agents fall) and its distances of contacts."""
    spec = mujoco.MjSpec.from_file(xml)
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE:  # was a cylinder, longer by half a radius at each end
            stock = model.geom(geom.name)
            radius, half_length, _ = stock.size
            geom.type, geom.size = mujoco.mjtGeom.mjGEOM_CYLINDER, [radius, half_length + radius / 2, 0]
            geom.pos, geom.quat, geom.fromto[:] = stock.pos, stock.quat, np.nan  # else fromto wins
    legacy = spec.compile()
    for field in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(model, field)[:] = getattr(legacy, field)
    mujoco.mj_setConst(model, mujoco.MjData(model))
    model.geom_margin[model.geom_bodyid > 0] = 0  # the floor's alone: 2.1.0 took the larger, 3.5 the sum


class D4RLAntMaze(ant_v5.AntEnv):
    """D4RL's antmaze-*-v2 (d4rl/locomotion/*.py). The start cell is the origin, +y runs down the map."""

    def __init__(self, size, **options):
        self.goal_corner, self.map = D4RL_MAZES[size]
        super().__init__(
            exclude_current_positions_from_observation=False, include_cfrc_ext_in_observation=False, **options
        )

    def _initialize_simulation(self):
        spec = mujoco.MjSpec.from_file(self.fullpath)
        wall = {"type": mujoco.mjtGeom.mjGEOM_BOX, "size": [2, 2, 1], "conaffinity": 1}
        cells = np.pad([list(row) for row in self.map.split()], 1, constant_values="#")
        for i, j in np.argwhere(cells == "#"):
            spec.worldbody.add_geom(pos=[4 * (j - 1), 4 * (i - 1), 1], **wall)
        model = spec.compile()
        model.opt.timestep = 0.02
        model.actuator_gear[:, 0] = 30
        model.geom_solimp[:, :3] = 0.8, 0.8, 0.01
        return model, mujoco.MjData(model)

    def reset_model(self):
        place, noise = self.np_random.uniform(0, 1, 2), self.np_random.uniform(0, 0.5, 2)  # as D4RL draws it
        self.goal = self.goal_corner + place + noise
        return super().reset_model()

    def step(self, action):
        self.do_simulation(action, self.frame_skip)
        reached = math.dist(self.data.qpos[:2], self.goal) <= 0.5
        return self._get_obs(), float(reached), reached, False, {}


def make_raw_env(args, **options):
    """The environment with the spaces that the dataset has."""
    mujoco.set_mju_user_warning(warnings.warn)  # not into the file MUJOCO_LOG.TXT
    warnings.filterwarnings("ignore", ".*settotalmass")  # of HalfCheetah's XML
    if args.env_id in D4RL_FILES:
        robot, task = args.env_id.split("-")[:2]
        env = D4RLAntMaze(task, **options) if robot == "antmaze" else D4RL_ROBOTS[robot][0](**options)
        legacy_physics(env.model, env.fullpath)
        return TimeLimit(env, 700 if task == "umaze" else 1000)
    if is_antmaze(args):
        options["continuing_task"] = False  # an episode ends at the goal
    if is_environment(args.env_id):
        env = gym.make(args.env_id, **options)
    else:
        env = open_minari(args.env_id).recover_environment(eval_env=True, **options)
    return env if getattr(env.spec, "max_episode_steps", None) else TimeLimit(env, 1000)


def make_env(args, **options):
    """The environment with observations as vectors and actions in [-1, 1]."""
    env = FlattenObservation(make_raw_env(args, **options))
    box = env.action_space
    if "f" not in str(box.dtype) or not np.all(box.low < box.high):
        raise ValueError(f"{args.env_id} has actions of {box}: only floats between two bounds work")
    return RescaleAction(env, np.float32(-1), np.float32(1))


# ---- evaluation: the same in all four scripts ----
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
    """100 (R - random) / (expert - random), AntMaze: percent of successes; NaN without references."""
    if is_antmaze(args):
        return 100 * mean_return
    if args.env_id in D4RL_FILES:
        _, random, expert = D4RL_ROBOTS[args.env_id.split("-")[0]]
    elif is_environment(args.env_id):
        return math.nan
    else:
        metadata = open_minari(args.env_id).storage.metadata
        random, expert = metadata.get("ref_min_score", math.nan), metadata.get("ref_max_score", math.nan)
    return 100 * (mean_return - random) / (expert - random)


def read_args(folder):
    """The arguments of the run in `folder`, not checked again: its dataset may be elsewhere by now."""
    args = object.__new__(Args)
    vars(args).update(json.loads(Path(folder, "args.json").read_text()))
    return args


# ---- speed: the same in dmg_offline.py, dmg_finetune.py and td3bc.py ----
def accelerate(agent, args):
    """update as learn(batch, noise, update_actor), compiled if asked, on a GPU as CUDA graphs."""

    def learn(batch, noise, update_actor):
        return update(agent, batch, noise, args, update_actor)

    for optimizer in agent.optimizers:  # a step without decorators, which cost 3 % and split compiled updates
        step = torch.no_grad()(inspect.unwrap(type(optimizer).step))
        optimizer.step = step.__get__(optimizer)  # bound as a method; registered hooks are skipped
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # from torch 2.13: takes torch.autograd.grad in
        torch._inductor.config.cpp_wrapper = not agent.mean.is_cuda  # 5 % faster on a CPU
        learn = torch.compile(learn, fullgraph=True)
    if not (agent.mean.is_cuda and args.cudagraphs):
        return learn
    calls = [0, 0]  # without and with the actor's update
    graphs = {}

    def replay_graph(batch, noise, update_actor):
        calls[update_actor] += 1
        if calls[update_actor] < 6:  # the first five of each kind load libraries and make Adam's state
            return learn(batch, noise, update_actor)
        if update_actor not in graphs:
            inputs = copy.deepcopy([*batch, noise])
            *own_batch, own_noise = inputs
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                metrics = learn(own_batch, own_noise, update_actor)  # recorded, not run
            graphs[update_actor] = graph, inputs, metrics
        graph, inputs, metrics = graphs[update_actor]
        torch._foreach_copy_(inputs, [*batch, noise])
        graph.replay()
        return metrics

    return replay_graph


# ---- replay: the same in dmg_finetune.py and iql.py ----
class Replay:
    """The dataset's rows and, behind them, every online transition in the order of time."""

    def __init__(self, dataset, env, agent, args):
        self.env = gym.wrappers.RecordEpisodeStatistics(env, stats_key="replay")
        self.returns = self.env.return_queue  # of whole online episodes
        self.agent = agent
        self.args = args
        self.first = self.size = len(dataset[0])
        rows = [torch.cat([x, x.new_zeros(args.online_steps, *x.shape[1:])]) for x in dataset]
        self.rows = [x.to(agent.mean.device) for x in rows]
        self.episodes = 0  # that have ended
        self.begin_episode()

    def begin_episode(self):
        """Reset with a seed of the episode's own, far from the evaluation's."""
        seed = 10_000_000 * (self.args.seed + 1) + self.episodes
        self.observation, _ = self.env.reset(seed=seed)

    def step(self, action):
        """Take action (action_dim,), add the transition. A timeout is not terminal. AntMaze: r 0 or -1."""
        observation, reward, terminated, truncated, _ = self.env.step(action)
        s, next_s = self.agent.normalize(np.stack([self.observation, observation]))
        r = float(reward) - is_antmaze(self.args)
        row = s, torch.as_tensor(action), r, next_s, float(terminated)
        for column, x in zip(self.rows, row):
            column[self.size] = x
        self.size += 1
        self.observation = observation
        if terminated or truncated:
            self.episodes += 1
            self.begin_episode()

    def state(self):
        rows = [x[self.first : self.size].cpu().clone() for x in self.rows]  # not views of all rows
        return {"episodes": self.episodes, "rows": rows}

    def restore(self, state):
        """Keep every saved transition. The episode that was not finished ends where it was saved."""
        count = len(state["rows"][0])
        self.size += count
        for column, x in zip(self.rows, state["rows"]):
            column[self.first : self.size] = x
        self.episodes = state["episodes"] + (count > 0)
        self.begin_episode()


# ---- main ----
def main(args):
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(args.torch_deterministic)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # several stall on a busy CPU
    torch.manual_seed(args.seed)
    device, device_module = "cpu", torch  # the second has the random state of batches and noise
    if args.cuda and torch.cuda.is_available():
        device, device_module = "cuda", torch.cuda
        torch.cuda.set_stream(torch.cuda.Stream())  # a CUDA graph cannot be captured on the default one

    # environments, data, and the agent, which normalizes states by these data
    envs = [make_env(args) for _ in range(args.eval_episodes)]
    (state_dim,) = envs[0].observation_space.shape
    (action_dim,) = envs[0].action_space.shape
    shapes = [state_dim], [action_dim], [], [state_dim], []
    data = [torch.empty(0, *shape) for shape in shapes] if args.from_scratch else load_dataset(args)
    s, a, r, next_s, terminated = data
    with torch.device(device):
        agent = Agent(state_dim, action_dim, args)
    if args.normalize_states:
        std, mean = torch.std_mean(s.double(), 0, correction=0)
        agent.mean.copy_(mean)
        agent.std.copy_(std + 1e-3)
    # resume, or start from a checkpoint: networks, optimizers and random numbers
    so_far = 0
    total_steps = args.offline_steps + args.online_steps
    source = args.resume or args.checkpoint
    if source:
        checkpoint = torch.load(f"{source}/checkpoint.pt", map_location="cpu")
        so_far = checkpoint["step"]
        if args.resume and "online" not in checkpoint:
            raise ValueError(f"{source} has no online steps to resume: give it as checkpoint")
        agent.load_state_dict(checkpoint["agent"])  # with the mean and std that its networks know
        online_rows = len(checkpoint["online"]["rows"][0]) if args.resume else 0
        if so_far > total_steps or online_rows != max(0, so_far - args.offline_steps):
            raise ValueError(f"{source} has done {so_far} steps: give other offline_steps or online_steps")
        for optimizer, state in zip(agent.optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})  # its moments, args' lr
        if checkpoint["origin"] == f"{device}, seed {args.seed}":  # else new random numbers
            device_module.set_rng_state(checkpoint["random"])
    first_step = so_far + 1 if args.resume else so_far  # a run that is not resumed first evaluates
    dataset = agent.normalize(s), a, r, agent.normalize(next_s), terminated
    replay = Replay(dataset, make_env(args), agent, args)
    if args.resume:
        replay.restore(checkpoint["online"])
    in_force = copy.copy(args)  # what update reads; lam, nu, gamma change online: tensors, never frozen
    for name in ("lam", "nu", "gamma"):
        setattr(in_force, name, torch.tensor(float(getattr(args, name)), device=device))
    learn = accelerate(agent, in_force)  # update; a CUDA graph or --compile freezes the other numbers

    # run folder: args.json, eval.csv, events of TensorBoard, films
    env_name = re.sub("[/:]", "-", args.env_id)
    folder = Path(args.resume or f"runs/{env_name}__{args.exp_name}__{args.seed}__{time.time_ns()}")
    versions = {module.__name__: module.__version__ for module in (torch, gym, mujoco, minari)}
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    record = json.dumps(vars(args) | {"resume": None, "versions": versions, "script": script}, indent=2)
    print(record)
    if args.track:
        import wandb

        wandb.init(id=folder.name, resume="allow", config=vars(args), sync_tensorboard=True)
    writer = SummaryWriter(folder, purge_step=first_step)  # hides what a killed run logged from there on
    Path(f"{folder}/args.json").write_text(record)
    eval_csv = open(f"{folder}/eval.csv", "a", 1)  # written line by line
    if not args.resume:
        print("step,return_mean,return_std,normalized_score,length_mean", file=eval_csv)
    if args.capture_video:
        env = make_env(args, render_mode="rgb_array")
        envs[0] = RecordVideo(env, f"{folder}/videos", lambda _: True, name_prefix=f"from-step-{first_step}")

    always_evaluated = so_far, args.offline_steps, total_steps
    metrics = {}
    message = "all steps are done"  # where a finished run is resumed
    start_time = time.time()
    for step in tqdm(range(first_step, total_steps + 1), unit="step"):
        logs = {}
        t = step - args.offline_steps  # online steps, this one included
        if t > 0:
            for name, value in online_schedule(t, args).items():
                getattr(in_force, name).fill_(value)
            replay.step(explore(agent, replay.observation, t, args))
        if step > so_far and not 0 < t <= args.learning_starts:  # not while actions are random
            lr = actor_learning_rate(step, args)
            agent.actor_optimizer.param_groups[0]["lr"].fill_(lr)
            index = torch.randint(replay.size, [args.batch_size], device=device)
            batch = [x.index_select(0, index) for x in replay.rows]
            noise = torch.randn(args.batch_size, action_dim, device=device)
            metrics |= learn(batch, noise, step % args.policy_frequency == 0)

        evaluate_now = step % args.eval_frequency == 0 or step in always_evaluated
        if metrics and (evaluate_now or step % 1000 == 0):
            logs = {f"losses/{name}": value.item() for name, value in metrics.items()}
            # a mean Q beyond about ten times any return has diverged; 1000 leaves room for small rewards
            q_limit = 1000 + 10 * replay.rows[2].abs().max() / (1.001 - in_force.gamma)
            if not math.isfinite(sum(logs.values())) or abs(logs.get("losses/q_values", 0)) > q_limit:
                writer.add_scalar("eval/diverged", 1, step)
                writer.close()
                print(f"{step},nan,nan,nan,nan", file=eval_csv)
                raise FloatingPointError(f"diverged at step {step}, last checkpoint in {folder}: {logs}")
            logs["charts/actor_learning_rate"] = lr
            logs |= {"dmg/lam": in_force.lam.item(), "dmg/nu": in_force.nu.item()}
            if replay.returns:
                logs["charts/episodic_return"] = replay.returns[-1]
            logs["charts/SPS"] = (step - first_step) / (time.time() - start_time)

        if evaluate_now:
            agent.eval()  # for a copy with dropout
            returns, lengths = evaluate(agent.act, envs, 1000 * (args.seed + 1))  # always the same episodes
            agent.train()
            score = normalized_score(args, returns.mean())
            print(f"{step},{returns.mean()},{returns.std()},{score},{lengths.mean()}", file=eval_csv)
            logs |= {"eval/episodic_return": returns.mean(), "eval/episodic_length": lengths.mean()}
            message = f"step {step:,}: return {returns.mean():.1f} +- {returns.std():.1f}"
            if not math.isnan(score):
                logs["eval/normalized_score"] = score
                message += f", score {score:.1f}"
            tqdm.write(message)
        for name, value in logs.items():
            writer.add_scalar(name, value, step)
        if evaluate_now:
            writer.flush()
            checkpoint = {"step": step, "agent": agent.state_dict(), "origin": f"{device}, seed {args.seed}"}
            checkpoint |= {"random": device_module.get_rng_state(), "online": replay.state()}
            checkpoint["optimizers"] = [optimizer.state_dict()["state"] for optimizer in agent.optimizers]
            torch.save(checkpoint, f"{folder}/checkpoint.tmp")
            os.replace(f"{folder}/checkpoint.tmp", f"{folder}/checkpoint.pt")  # never half-written
    writer.close()
    envs[0].close()  # RecordVideo writes the last film
    print(f"{folder}: {message}")


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    if arguments.resume:  # the flags given now change that run's arguments
        arguments = tyro.cli(Args, default=read_args(arguments.resume))
    elif arguments.checkpoint:
        arguments = tyro.cli(Args, default=checkpoint_args(arguments.checkpoint))
    main(arguments)

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.6", "numpy>=2.0", "gymnasium[mujoco]>=1.4,<2", "gymnasium-robotics>=1.4.2,<2",
#   "minari[hdf5,hf]>=0.5.4,<0.6", "tyro>=1.0", "tensorboard>=2.20", "h5py>=3.8", "tqdm>=4.66", "pillow",
# ]
# ///
