"""Doubly Mild Generalization (DMG), offline and then online, in one file.

Mao, Wang, Qu, Jiang, Ji, "Doubly Mild Generalization for Offline Reinforcement Learning", NeurIPS 2024,
https://arxiv.org/abs/2411.07934, App. C.2. `update` is Algorithm 1, as in dmg_offline.py. Online, each environment
step adds a transition beside the dataset's and takes one gradient step, while lam rises and nu falls towards ordinary
online RL. Their limit, lam = 1 and nu = 0 without a dataset, is TD3: --from-scratch.

    python dmg_finetune.py --env-id antmaze-umaze-v2
    python dmg_finetune.py --checkpoint runs/<a run of dmg_offline.py>
    python dmg_finetune.py --env-id HalfCheetah-v5 --from-scratch --online-steps 200000
"""

import copy
import ctypes
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NamedTuple, get_type_hints

import gymnasium as gym
import h5py
import minari
import mujoco
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.envs.mujoco import MujocoEnv
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    # ---- shared by all scripts: common arguments ----
    env_id: str = "dmg/halfcheetah/medium-replay-v0"
    """a D4RL v2 name, a Minari id (this one ships in datasets/), or a Gymnasium id together with --dataset-path"""
    dataset_path: str | None = None
    """your own HDF5 file in D4RL's schema; with a D4RL name it is read in place of the downloaded file"""
    seed: Annotated[int, "[0, 1e9]"] = 0
    """seed of networks, batches, noise and evaluation episodes"""
    num_seeds: Annotated[int, "[1, inf)"] = 1
    """train this many agents side by side in one process, seeds seed, seed + 1, ..., each in its own run folder"""
    cuda: bool = True
    """train on the GPU if there is one"""
    torch_deterministic: bool = True
    """use deterministic kernels, so that one seed gives the same bits again on the same machine"""
    compile: bool = False
    """compile the update into machine code of its own (needs a C++ compiler; a minute at the first start)"""
    cudagraphs: bool = True
    """on a GPU, launch the whole update as one CUDA graph"""
    matmul_precision: Literal["highest", "high", "medium"] = "medium"
    """torch.set_float32_matmul_precision; on a CPU without AMX "medium" is float32 too, on a GPU it is TF32"""
    eval_frequency: Annotated[int | None, "[1, inf)"] = None
    """gradient steps between evaluations, each with a checkpoint (default: 20,000; AntMaze 50,000)"""
    eval_episodes: Annotated[int | None, "[1, 1e6]"] = None
    """whole episodes per evaluation (default: 10; AntMaze 100)"""
    resume: str | None = None
    """run folder to continue exactly where its checkpoint stands, with that run's arguments"""
    eval_only: bool = False
    """with --resume: score the saved agent, write nothing"""
    capture_video: bool = False
    """record the first episode of each evaluation into the run folder (needs moviepy)"""
    track: bool = False
    """mirror the TensorBoard log to Weights & Biases (needs wandb)"""
    wandb_project_name: str = "dmg"
    """project of --track"""
    wandb_entity: str | None = None
    """team of --track"""
    batch_size: Annotated[int, "[1, 1e6]"] = 256
    """transitions per gradient step"""
    learning_rate: Annotated[float, "(0, inf)"] = 3e-4
    """Adam's step size for every network"""
    gamma: Annotated[float, "[0, 1)"] = 0.99
    """discount factor"""
    target_update_rate: Annotated[float, "(0, 1]"] = 0.005
    """Polyak rate of the target networks (xi)"""
    # ---- end of common arguments ----
    offline_steps: Annotated[int, "[0, inf)"] = 1_000_000
    """gradient steps on the dataset alone"""
    online_steps: Annotated[int, "[0, inf)"] = 1_000_000
    """environment steps after that, with one gradient step each"""
    checkpoint: str | None = None
    """run folder of dmg_offline.py to go on from, with that run's arguments, in place of the offline steps"""
    from_scratch: bool = False
    """TD3 without a dataset: offline steps 0, lam 1, nu 0, learning starts 25,000; --env-id may be any Gymnasium id"""
    learning_starts: Annotated[int | None, "[0, inf)"] = None
    """first online steps with uniformly random actions and no gradient step (default: 0; --from-scratch 25,000)"""
    exploration_noise: Annotated[float, "[0, inf)"] = 0.1
    """standard deviation of the noise on online actions, in units of the action range [-1, 1]"""
    save_dataset: str | None = None
    """at the end, write the online transitions as the Minari dataset of this id (my/hopper/medium-replay-v0)"""
    lam: Annotated[float, "[0, 1]"] = 0.25
    """mixture coefficient (lambda): weight of the mildly generalized maximum in the Bellman target"""
    lam_end: Annotated[float, "[0, 1]"] = 0.5
    """what lam tends to online"""
    nu: Annotated[float | None, "[0, inf)"] = None
    """penalty coefficient (nu) (default: 0.1; 10 if the dataset's name holds "expert"; AntMaze 0.5)"""
    nu_end: Annotated[float, "[0, inf)"] = 0.005
    """what nu tends to online"""
    gamma_online: Annotated[float | None, "[0, 1)"] = None
    """discount factor online (default: gamma; antmaze-large 0.995)"""
    expectile: Annotated[float | None, "(0, 1)"] = None
    """expectile of the in-sample maximum (tau) (default: 0.7; AntMaze 0.9)"""
    in_sample: Literal["iql", "xql", "sql"] = "iql"
    """how V tends to the in-sample maximum: expectile, Gumbel regression or sparse Q-learning (Table 3)"""
    in_sample_temperature: Annotated[float | None, "(0, inf)"] = None
    """beta of xql, alpha of sql (default: xql 5; sql 2, or 5 if the dataset's name holds "medium-expert")"""
    inverse_temperature: Annotated[float | None, "[0, inf)"] = None
    """inverse temperature of the advantage weights (alpha) (default: 3; AntMaze 10)"""
    max_weight: Annotated[float | None, "(0, inf)"] = None
    """upper clip of the advantage weights (default: 3; AntMaze 100)"""
    policy_frequency: Annotated[int, "[1, inf)"] = 2
    """critic updates per update of actor and targets"""
    policy_noise: Annotated[float, "[0, inf)"] = 0.2
    """standard deviation of the target policy's smoothing noise, in units of the action range [-1, 1]"""
    noise_clip: Annotated[float, "[0, inf)"] = 0.5
    """clip of the smoothing noise, same unit"""


# ---- shared by all scripts: networks ----
class Batch(NamedTuple):
    """Transitions as float32 tensors: states as the networks see them, actions in [-1, 1]."""

    observations: torch.Tensor  # (B, state_dim)
    actions: torch.Tensor  # (B, action_dim)
    rewards: torch.Tensor  # (B,)
    next_observations: torch.Tensor  # (B, state_dim)
    terminated: torch.Tensor  # (B,), 1 where the episode ended for good; a timeout is 0


class Linear(nn.Module):
    """nn.Linear, (B, n_in) -> (B, n_out), or two side by side, (2, B, n_in) -> (2, B, n_out)."""

    def __init__(self, n_in: int, n_out: int, *nets: int):
        super().__init__()
        bound = n_in**-0.5  # nn.Linear's initialisation
        self.weight = nn.Parameter(torch.empty(*nets, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*nets, *[1] * len(nets), n_out).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.shape[-1] == 1:  # slow as a matrix product
            return (x * self.weight.mT).sum(-1, keepdim=True) + self.bias
        if torch.compiler.is_compiling():  # the bias joins the next loop
            return x @ self.weight + self.bias
        return (torch.baddbmm if x.ndim == 3 else torch.addmm)(self.bias, x, self.weight)


def mlp(n_in: int, n_out: int, *nets: int) -> list[nn.Module]:
    return [Linear(n_in, 256, *nets), nn.ReLU(True), Linear(256, 256, *nets), nn.ReLU(True), Linear(256, n_out, *nets)]


class TwinCritic(nn.Module):
    """Q1 and Q2: (B, state_dim), (B, action_dim) -> (2, B)."""

    def __init__(self, state_dim: int, action_dim: int):
        super().__init__()
        self.net = nn.Sequential(*mlp(state_dim + action_dim, 1, 2))

    def forward(self, s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([s, a], -1).expand(2, -1, -1)).squeeze(-1)


# ---- end of networks ----
# ---- shared by DMG and IQL: value loss ----
def in_sample_value_loss(target_q: torch.Tensor, v: torch.Tensor, args: Args) -> torch.Tensor:
    """Loss of V(s), (B,), that draws it to the maximum of Q'(s, a), (B,), over the dataset's actions (Eq. 15)."""
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
    """The networks of Algorithm 1, their optimisers, and the mean and std that normalise raw states."""

    def __init__(self, state_dim: int, action_dim: int, args: Args, device: torch.device | str = "cpu"):
        super().__init__()
        self.actor = nn.Sequential(*mlp(state_dim, action_dim), nn.Tanh())  # (B, state_dim) -> (B, action_dim)
        self.critic = TwinCritic(state_dim, action_dim)
        self.value = nn.Sequential(*mlp(state_dim, 1), nn.Flatten(0))  # (B, state_dim) -> (B,)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("std", torch.ones(state_dim))
        self.to(device)
        self.optimizers = [Adam(net, args.learning_rate) for net in (self.actor, self.critic, self.value)]
        self.actor_optimizer, self.critic_optimizer, self.value_optimizer = self.optimizers


def update(agent: Agent, batch: Batch, noise: torch.Tensor, args: Args, update_actor: bool) -> dict[str, torch.Tensor]:
    """One iteration of Algorithm 1 on `batch`; noise: (B, action_dim), standard normal. Returns detached scalars."""
    s, a, r, next_s, terminated = batch

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

    metrics = {"value_loss": value_loss, "critic_loss": critic_loss, "q_values": q.mean(), "v_values": v.mean()}
    if update_actor:
        # actor (Eq. 14): maximise Q near dataset actions, nearer to those of high advantage
        pi = agent.actor(s)
        q_pi = agent.critic(s, pi).amin(0)
        with torch.no_grad():
            advantage = target_q - agent.value(s)
            weight = (args.inverse_temperature * advantage).clamp(max=math.log(args.max_weight)).exp()
        penalty = (weight.unsqueeze(-1) * (pi - a).square()).mean()
        actor_loss = -q_pi.mean() / q_pi.abs().mean().detach() + args.nu * penalty
        agent.actor_optimizer.minimise(actor_loss)

        # target networks
        with torch.no_grad():
            for net, target in ((agent.critic, agent.critic_target), (agent.actor, agent.actor_target)):
                torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), args.target_update_rate)
        metrics |= {"actor_loss": actor_loss, "advantage_weight": weight.mean()}
    return {name: value.detach() for name, value in metrics.items()}


# ---- end of agent, losses, update ----
def actor_learning_rate(step: int, args: Args) -> float:
    """Cosine from learning_rate to 0 over all offline actor updates (Table 5), learning_rate online; from step 1 on."""
    updates_done, all_updates = step // args.policy_frequency - 1, max(args.offline_steps // args.policy_frequency, 1)
    progress = min(updates_done / all_updates, 1.0) if step <= args.offline_steps else 0.0
    return args.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def online_args(args: Args, t: int) -> Args:
    """The arguments in force after t online steps: lam and nu near their ends by 0.99 each 1000 steps (App. C.2)."""
    left = 0.99 ** (t // 1000)
    lam, nu = args.lam_end - (args.lam_end - args.lam) * left, args.nu_end + (args.nu - args.nu_end) * left
    return dataclasses.replace(args, lam=lam, nu=nu, gamma=args.gamma_online)


# ---- shared by the online scripts: replay and exploration ----
class Replay:
    """The dataset's rows and then, never over them, each new transition, in the order in which they came."""

    def __init__(self, dataset: Batch, online_steps: int, device: torch.device | str):
        self.first, self.size = len(dataset.rewards), 0  # first: row of the first online transition
        self.rows = Batch(*(torch.empty(self.first + online_steps, *x.shape[1:], device=device) for x in dataset))
        self.extend(dataset)

    def extend(self, rows: Batch | list[torch.Tensor]) -> None:
        end = self.size + len(rows[0])
        for column, x in zip(self.rows, rows, strict=True):
            column[self.size : end] = x
        self.size = end


class Explorer:
    """Acts in the environment and fills the replay. Each episode has its own seed: seed and actions bring it back."""

    def __init__(self, env: gym.Env, replay: Replay, agent: Agent, args: Args):
        self.env, self.replay, self.agent, self.args = env, replay, agent, args
        self.episodes: list[list] = []  # [row after its last transition, return, length] of those that ended

    def seed(self, episode: int) -> int:
        return 10_000_000 * (self.args.seed + 1) + episode  # far from the evaluation's

    def normalise(self, observation: np.ndarray) -> torch.Tensor:
        s = torch.as_tensor(observation, dtype=torch.float32, device=self.agent.mean.device)
        return (s - self.agent.mean) / self.agent.std

    def begin(self) -> None:
        self.start = self.episodes[-1][0] if self.episodes else self.replay.first
        observation, _ = self.env.reset(seed=self.seed(len(self.episodes)))
        self.state = self.normalise(observation)

    def end(self) -> None:
        start, size = self.start, self.replay.size
        rewards = self.replay.rows.rewards[start:size].double() + is_antmaze(self.args)
        self.episodes.append([size, rewards.sum().item(), size - start])

    def step(self, action: torch.Tensor) -> None:
        """One transition into the replay: a success is terminal with reward 0 in AntMaze, a timeout never terminal."""
        observation, reward, terminated, truncated, _ = self.env.step(action.cpu().numpy())
        next_state = self.normalise(observation)
        scalars = torch.tensor([[reward - is_antmaze(self.args)], [terminated]])
        self.replay.extend([self.state[None], action[None], scalars[0], next_state[None], scalars[1]])
        self.state = next_state
        if terminated or truncated:
            self.end()
            self.begin()

    def recent(self) -> dict[str, float]:
        """Mean return and length of the episodes that ended in the last 1000 steps."""
        ended = [episode for episode in self.episodes if episode[0] > self.replay.size - 1000]
        means = np.mean(ended, 0) if ended else ()
        return dict(zip(("charts/episodic_return", "charts/episodic_length"), means[1:], strict=False))

    def restore(self, rows: list[torch.Tensor], episodes: list[list]) -> None:
        """Continue after these online rows: the environment plays the unfinished episode's actions again."""
        self.replay.extend(rows)
        self.episodes = episodes
        self.begin()
        last, over = self.replay.size - 1, False
        for action in self.replay.rows.actions[self.start : self.replay.size]:
            observation, _, terminated, truncated, _ = self.env.step(action.cpu().numpy())
            self.state, over = self.normalise(observation), terminated or truncated
            if over:
                break
        if over or (last >= self.start and not self.state.equal(self.replay.rows.next_observations[last])):
            print("this environment does not repeat itself: the unfinished episode is cut and a new one begins")
            self.end()
            self.begin()


# ---- end of replay and exploration ----
NORMALIZE_STATES = True  # but for AntMaze


# ---- shared by all scripts: data, environments, evaluation, run folder ----
class Stop(Exception):
    """Ends the program: Stop(sentence, exit code). Codes: 2 wrong input, 3 divergence, 128 + n after signal n."""


def require(condition: bool, sentence: str, code: int = 2) -> None:
    if not condition:
        raise Stop(sentence, code)


def expect(condition: bool, reason: str) -> None:
    """`require` inside of `explain`, which says what it is about and what to do."""
    if not condition:
        raise ValueError(reason)


@contextmanager
def explain(what: str, advice: str = "", kind: type[Exception] = Exception) -> Iterator[None]:
    """Whatever a library raises over a file, a network or an environment becomes one sentence."""
    try:
        yield
    except Stop:
        raise
    except kind as error:
        error = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides a full disk
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise Stop(f"{what}: {reason}. {advice}".strip(), 2) from error


D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
EXP_NAME = Path(__file__).stem
CHECKPOINT_FORMAT = 3  # of `save` in train_seed
EVAL_COLUMNS = ("step", "return_mean", "return_std", "normalized_score", "length_mean", "episodes", "wall_seconds")
REFERENCES = {"halfcheetah": (-280.178953, 12135.0), "hopper": (-20.272305, 3234.3), "walker2d": (1.629008, 4592.3)}
# the D4RL v2 names without "-v2", and 16 digits of the sha256 of their files, from tensorflow_datasets
D4RL_FILES = """
    halfcheetah-random:25407aef85b5d16c halfcheetah-medium:41324e8487a9556d halfcheetah-medium-replay:48d494a4770c11f4
    halfcheetah-medium-expert:015db75dae5bbe8e halfcheetah-expert:d9fe53bb994eb1e2 hopper-random:63103ef7059db4c0
    hopper-medium:5bdf1bc4a713c829 hopper-medium-replay:e121c5f7c9857a30 hopper-medium-expert:9d51ad87f8c905be
    hopper-expert:01aa219a5f8eea5e walker2d-random:4e863bb6090cf4a4 walker2d-medium:cf00f43add04c17f
    walker2d-medium-replay:e75de96a4f77acf7 walker2d-medium-expert:6b8d7f868c45bbae walker2d-expert:2985dc3d436a8baa
    antmaze-umaze:5ef15257771c50ef antmaze-umaze-diverse:c771dd63963cd7d9 antmaze-medium-play:c9fec1c1daad97c7
    antmaze-medium-diverse:ad9dcbac05d1f874 antmaze-large-play:6d353df245782992 antmaze-large-diverse:84f775eb7956ea9c
"""
D4RL_SHA256 = {f"{name}-v2": digest for name, digest in (x.split(":") for x in D4RL_FILES.split())}


def download_d4rl(env_id: str) -> Path:
    """The verified file of a D4RL v2 name in D4RL's cache folder, downloaded if it is not there. Raises Stop."""
    file = f"gym_mujoco_v2/{env_id[:-3].replace('-', '_')}-v2.hdf5"
    if env_id.startswith("antmaze"):
        size, diverse = env_id.split("-")[1], "diverse" in env_id
        maze = {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}[size]
        starts = diverse or size != "umaze"
        file = f"ant_maze_v2/Ant_maze_{maze}_noisy_multistart_{starts}_multigoal_{diverse}_sparse_fixed.hdf5"
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    path = folder / Path(file).name
    ways_on = f"Put {path.name} into {folder}, or give --dataset-path, or a Minari id such as mujoco/hopper/medium-v0."
    with explain(f"cannot fetch {D4RL_URL + file} to {folder}", ways_on):
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # under a temporary name until it is whole and its hash is right
            torch.hub.download_url_to_file(D4RL_URL + file, str(path), D4RL_SHA256[env_id])
        with path.open("rb") as opened:
            right = hashlib.file_digest(opened, "sha256").hexdigest().startswith(D4RL_SHA256[env_id])
    require(right, f"{path} is not D4RL's file, its sha256 differs: delete it to download it again. {ways_on}")
    return path


@contextmanager
def open_hdf5(path: str | Path, advice: str) -> Iterator[Callable[[str], np.ndarray]]:
    """A function from an array's name in the file to its numbers as float32. Raises Stop, over the body's errors too.

    Nothing outside the file is read, no array that is not wholly in it, and none that unpacks to 100 times its size.
    """

    def read(name: str) -> np.ndarray:
        x = file
        for part in name.split("/"):
            expect(isinstance(x.get(part, getlink=True), h5py.HardLink), f"'{name}' is missing or a link")
            x = x[part]
        expect(x.dtype.kind in "biuf", f"'{name}' holds no numbers but {x.dtype}")
        expect(not x.is_virtual and not x.external, f"'{name}' is stored in another file")
        large = max(4 * x.size, math.prod(x.chunks or ()) * x.dtype.itemsize) > limit
        expect(not large, f"'{name}' of shape {x.shape} is over 100 times as large as the file")
        chunks = math.prod(-(-n // size) for n, size in zip(x.shape, x.chunks or (), strict=False))
        whole = x.id.get_num_chunks() >= chunks if x.chunks else x.id.get_storage_size() >= x.nbytes
        expect(whole, f"'{name}' of shape {x.shape} has rows that were never written")
        return x.astype(np.float32)[()]

    with explain(f"cannot read {path}", advice):
        expect(Path(path).is_file(), "there is no such file")  # a pipe would be waited for
        limit = 100 * Path(path).stat().st_size
        with h5py.File(path) as file:
            yield read


def read_hdf5(path: str | Path) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Rows of a file in D4RL's schema as numpy arrays, timeouts (N,), and which d4rl.qlearning_dataset keeps (N,).

    The next observation is that of the next row, so the last row and the rows at a timeout have none. Raises Stop.
    """
    advice = "D4RL's schema: observations (N, o), actions (N, a), and rewards, terminals, timeouts (N,)."
    with open_hdf5(path, advice) as read:
        s, a, *columns = map(read, ("observations", "actions", "rewards", "terminals", "timeouts"))
    n, shapes = len(s) if s.ndim else 0, [x.shape for x in (s, a, *columns)]
    fits = s.ndim == a.ndim == 2 and len(a) == n and all(x.shape in ((n,), (n, 1)) for x in columns)
    require(fits, f"{path} has shapes {shapes}. {advice}")
    r, terminals, timeouts = (x.reshape(n) for x in columns)
    keep = (timeouts != 1) & (np.arange(n) < n - 1)
    return Batch(s, a, r, np.concatenate([s[1:], s[:1]]), terminals), timeouts, keep


class MinariSet(NamedTuple):
    """A Minari dataset on disk."""

    folder: Path
    spec: gym.envs.registration.EnvSpec  # of the evaluation environment
    references: tuple[float, float] | None  # the returns that mean a score of 0 and of 100
    episodes: int


def minari_spec(saved: dict) -> gym.envs.registration.EnvSpec:
    """The environment that a file describes: registered code only, and no paths among the file's arguments for it."""
    if saved["id"] not in gym.registry:
        import gymnasium_robotics  # noqa: F401  registers its environments; not at the top: it prints

    spec, wrappers = gym.registry.get(saved["id"]), saved["additional_wrappers"]
    known = spec is not None and spec.entry_point == saved["entry_point"]
    advice = "import what registers it at the top of this script"
    expect(known, f"its environment {saved['id']} ({saved['entry_point']}) is not registered: {advice}")
    harmless = re.compile(r"gymnasium\.wrappers\.(common|stateful_\w+|transform_\w+):[A-Z]\w+")
    expect(all(harmless.fullmatch(x["entry_point"]) for x in wrappers), f"its environment has wrappers {wrappers}")
    arguments = json.dumps([saved["kwargs"], [x["kwargs"] for x in wrappers]])
    plain = all(re.fullmatch(r"(\w[\w. -]*)?", x) for x in re.findall('"(.*?)"', arguments))
    expect(plain, f"its environment's arguments name paths: {arguments}")
    changes = {name: saved[name] for name in ("kwargs", "max_episode_steps")}
    wrappers = tuple(gym.envs.registration.WrapperSpec(**x) for x in wrappers)
    return dataclasses.replace(spec, **changes, additional_wrappers=wrappers)


def open_minari(args: Args) -> MinariSet | None:
    """The Minari dataset of --env-id, downloaded if it is not there; None for other kinds of id. Raises Stop."""
    name = args.env_id
    if name in D4RL_SHA256 or args.dataset_path:
        return None
    with explain(f"cannot look for the Minari dataset {name}", "Choose a folder with MINARI_DATASETS_PATH."):
        valid = minari.dataset.minari_dataset.DATASET_ID_RE.fullmatch(name)  # leads out of no folder
        shipped = Path(__file__).resolve().parent / "datasets"
        here = valid and (shipped / name / "data").exists()
        root = shipped if here else minari.storage.datasets_root_dir.get_dataset_path()
        folder = root / name / "data"
        found = {x.parent.relative_to(base).as_posix() for base in (shipped, root) for x in base.rglob("data")}
    near = difflib.get_close_matches(name, {*D4RL_SHA256, *gym.registry, *found} - {name})
    near = f"did you mean {' or '.join(near)}? " if near else ""
    known = f"{near}Give a D4RL v2 name ({', '.join(D4RL_SHA256)}), a Minari id (mujoco/hopper/medium-v0)"
    require(valid and ("/" in name or folder.exists()), f"unknown --env-id {name}: {known} or --dataset-path.")
    ways_on = f"{near}Put its main_data.hdf5 and metadata.json into {folder}, or use a D4RL name, or --dataset-path."
    with explain(f"cannot load the Minari dataset {name}", ways_on):
        if not folder.exists():
            minari.download_dataset(name)
        file = folder / "metadata.json"
        expect(file.is_file() and file.stat().st_size < 2**24, f"{file} is missing or too large")
        metadata = json.loads(file.read_text())
        low, high = references = metadata.get("ref_min_score"), metadata.get("ref_max_score")
        expect(high is None or -math.inf < low < high < math.inf, f"its reference scores are {references}")
        spec = minari_spec(json.loads(metadata.get("eval_env_spec") or metadata["env_spec"]))
        return MinariSet(folder, spec, None if high is None else references, int(metadata["total_episodes"]))


def read_minari(source: MinariSet, space: gym.Space) -> tuple[Batch, np.ndarray, np.ndarray]:
    """As read_hdf5, observations flattened as FlattenObservation does; no row lacks its next observation."""

    def flatten(space: gym.Space, name: str) -> np.ndarray:
        if isinstance(space, gym.spaces.Dict):
            return np.concatenate([flatten(sub, f"{name}/{key}") for key, sub in space.items()], -1)
        x = read(name)
        return x.reshape(len(x), -1)

    episodes = []
    with open_hdf5(source.folder / "main_data.hdf5", "Is the Minari dataset complete?") as read:
        for i in range(source.episodes):
            a, r, terminals = (read(f"episode_{i}/{name}") for name in ("actions", "rewards", "terminations"))
            s, n = flatten(space, f"episode_{i}/observations"), len(a)
            fits = len(s) == n + 1 and r.shape == terminals.shape == (n,)
            expect(fits, f"it lacks the last state of episode {i}, or its columns differ in length")
            episodes.append((s[:-1], a, r, s[1:], terminals, (terminals == 0) & (np.arange(n) == n - 1)))
        *rows, timeouts = map(np.concatenate, zip(*episodes, strict=True))
    return Batch(*rows), timeouts, np.ones(len(timeouts), bool)


def is_antmaze(args: Args) -> bool:
    return "antmaze" in args.env_id.lower().replace("_", "")


def load_dataset(args: Args, source: MinariSet | None, env: gym.Env) -> tuple[Batch, np.ndarray, np.ndarray]:
    """The dataset as a Batch of tensors, and the mean and std, (state_dim,), that normalised its states. Raises Stop.

    AntMaze: reward 0 and terminal at the goal, -1 elsewhere (App. C.1).
    """
    name, box = args.dataset_path or args.env_id, env.unwrapped.action_space
    if source is not None:
        rows, timeouts, keep = read_minari(source, env.unwrapped.observation_space)
    else:
        rows, timeouts, keep = read_hdf5(args.dataset_path or download_d4rl(name))
    require(keep.any(), f"{name} holds no transition.")
    for key, shape in (("observations", env.observation_space.shape), ("actions", box.shape)):
        found = getattr(rows, key).shape[1:]
        require(found == shape, f"{name} has {key} of shape {found}, its environment has {shape}.")
    flags = np.isin([rows.terminated, timeouts], (0, 1)).all()
    require(flags, f"{name} has terminals or timeouts other than 0 and 1.")
    for key, x in rows._asdict().items():
        require(np.isfinite(x).all(), f"{name} has NaN, Inf or numbers beyond float32 in {key}: remove these rows.")
    s, a, r, next_s, terminals = (x[keep] for x in rows)
    a = ((a - (box.high + box.low) / 2) / ((box.high - box.low) / 2)).astype(np.float32)
    require(np.abs(a).max() <= 1 + 1e-3, f"{name} has actions outside the environment's {box.low} to {box.high}.")
    mean, std, ends = np.zeros(s.shape[1]), np.ones(s.shape[1]), timeouts == 1
    if is_antmaze(args):
        require(np.isin(r, (0, 1)).all(), f"{name} has AntMaze rewards that are not 1 at the goal and 0 elsewhere.")
        r, terminals = r - 1, r  # the goal is terminal, yet the recorded episode may go on: it ends at the timeout
    else:
        ends |= rows.terminated == 1
    if NORMALIZE_STATES and not is_antmaze(args):
        mean, std = s.mean(0, dtype=np.float64), s.std(0, dtype=np.float64) + 1e-3
    returns = np.diff(np.cumsum(rows.rewards, dtype=np.float64)[ends], prepend=0)
    print(
        f"{name}: {len(r):,} transitions, {ends.sum():,} whole episodes, {int(terminals.sum()):,} terminals, "
        f"{int(timeouts.sum()):,} timeouts, mean return {returns.sum() / max(1, len(returns)):.2f}, "
        f"rewards {rows.rewards.min():.2f} to {rows.rewards.max():.2f}"
    )
    mean, std = mean.astype(np.float32), std.astype(np.float32)
    batch = Batch((s - mean) / std, a, r, (next_s - mean) / std, terminals)
    return Batch(*map(torch.from_numpy, batch)), mean, std


def legacy_inertia(model: mujoco.MjModel, spec: mujoco.MjSpec) -> None:
    """Give `model`, compiled from `spec`, the masses and inertias of MuJoCo 2.1.0, where D4RL's scores were taken.

    A capsule then weighed as a cylinder half a radius longer at each end; exact ones make D4RL's policies fall.
    """
    spec.compile()  # gives the geoms their ids
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE:
            radius, half_length, _ = model.geom_size[geom.id]
            geom.type, geom.size = mujoco.mjtGeom.mjGEOM_CYLINDER, [radius, half_length + radius / 2, 0]
            geom.pos, geom.quat, geom.fromto[:] = model.geom_pos[geom.id], model.geom_quat[geom.id], np.nan
    legacy = spec.compile()
    for field in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(model, field)[:] = getattr(legacy, field)
    mujoco.mj_setConst(model, mujoco.MjData(model))


class D4RLAntMaze(MujocoEnv):
    """D4RL's antmaze-*-v2: observation qpos (15) and qvel (14), reward 1 and the end within 0.5 of the goal.

    Gymnasium's ant in Gymnasium-Robotics' mazes with D4RL's time step, contacts, torque, frame (the start cell is the
    origin, +y runs down the map), reset and goal noise (d4rl/locomotion/{ant,maze_env,goal_reaching_env}.py).
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 10}

    def __init__(self, maze: str, render_mode: str | None = None):
        self.maze = maze
        space = gym.spaces.Box(-np.inf, np.inf, (29,), np.float64)
        view = {"distance": 70.0, "elevation": -90.0}  # the whole maze from above
        super().__init__("ant.xml", 5, space, render_mode, camera_id=-1, default_camera_config=view)

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        from gymnasium_robotics.envs.maze.maps import LARGE_MAZE, MEDIUM_MAZE, U_MAZE  # not at the top: it prints

        mazes = {"umaze": (U_MAZE, (0, 8)), "medium": (MEDIUM_MAZE, (20, 20)), "large": (LARGE_MAZE, (32, 24))}
        maze, self.goal_cell = mazes[self.maze]
        spec = mujoco.MjSpec.from_file(self.fullpath)
        spec.option.timestep = 0.02
        for motor in spec.actuators:
            motor.gear[0] = 30
        wall = {"type": mujoco.mjtGeom.mjGEOM_BOX, "size": [2, 2, 1], "contype": 1, "conaffinity": 1}
        for i, j in np.argwhere(np.array(maze) == 1):
            spec.worldbody.add_geom(pos=[4 * (j - 1), 4 * (i - 1), 1], **wall)
        for geom in spec.geoms:
            geom.solimp[:3] = 0.8, 0.8, 0.01
        spec.worldbody.add_site(name="goal", pos=[*self.goal_cell, 0.5], size=[0.5, 0.5, 0.5], rgba=[1, 0, 0, 1])
        model = spec.compile()
        legacy_inertia(model, spec)
        return model, mujoco.MjData(model)

    def reset_model(self) -> np.ndarray:
        self.goal = self.goal_cell + self.np_random.uniform(0, 1, 2) + self.np_random.uniform(0, 0.5, 2)
        self.model.site("goal").pos[:2] = self.goal
        qpos = self.init_qpos + self.np_random.uniform(-0.1, 0.1, self.model.nq)
        self.set_state(qpos, self.init_qvel + 0.1 * self.np_random.standard_normal(self.model.nv))
        return self.state_vector()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.do_simulation(action, self.frame_skip)
        reached = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= 0.5)
        return self.state_vector(), float(reached), reached, False, {}


def make_env(args: Args, source: MinariSet | None, render_mode: str | None = None) -> gym.Env:
    """The evaluation environment of --env-id, with vector observations and actions in [-1, 1]. Raises Stop."""
    family, kind = args.env_id.split("-")[:2] if args.env_id in D4RL_SHA256 else ("", "")
    options = {"render_mode": render_mode} if render_mode else {}
    ignored = warnings.catch_warnings(action="ignore")  # -v4 and its XML are out of date on purpose
    mujoco.set_mju_user_warning(lambda text: "settotalmass" in text or print(text, file=sys.stderr))
    with explain(f"cannot make the environment of {args.env_id}"), ignored:
        if family == "antmaze":
            env = gym.wrappers.TimeLimit(D4RLAntMaze(kind, **options), 700 if kind == "umaze" else 1000)
        elif family:
            names = {"halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4"}
            env = gym.make(names[family], **options)
            legacy_inertia(env.unwrapped.model, mujoco.MjSpec.from_file(env.unwrapped.fullpath))
        else:
            if is_antmaze(args):
                import gymnasium_robotics  # noqa: F401  registers AntMaze

                options["continuing_task"] = False  # the episode ends at the goal: a success counts once
            env = gym.make(source.spec if source else args.env_id, **options)
    box = env.action_space
    bounded = isinstance(box, gym.spaces.Box) and len(box.shape) == 1 and box.is_bounded()
    require(bounded, f"{args.env_id} has the action space {box}; a bounded vector (Box) is needed.")
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    if (box.low != -1).any() or (box.high != 1).any():
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env


def evaluate(act: Callable, envs: list[gym.Env], episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths, (episodes,) each, of the first episode after a reset with seed, seed + 1, ...

    act: raw observations (n, state_dim) -> actions (n, action_dim), for n = len(envs) episodes at a time. Each is
    played to its end and counted, so short ones have no advantage. A plain list: a vector environment takes longer.
    """
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    for first in range(0, episodes, len(envs)):
        playing = {k: env for k, env in enumerate(envs) if first + k < episodes}
        observations = np.zeros((len(envs), *envs[0].observation_space.shape))
        for k, env in playing.items():
            observations[k], _ = env.reset(seed=seed + first + k)
        while playing:
            actions = act(observations)
            for k, env in list(playing.items()):
                observations[k], reward, terminated, truncated, _ = env.step(actions[k])
                returns[first + k] += reward
                lengths[first + k] += 1
                if terminated or truncated:
                    del playing[k]
    return returns, lengths


def reference_returns(args: Args, source: MinariSet | None) -> tuple[float, float]:
    """The returns that mean a score of 0 and of 100; (0, 100), the return itself, where there is no reference."""
    if is_antmaze(args):
        return 0.0, 1.0  # success in percent
    if source and source.references:
        return source.references
    env_id = source.spec.id if source else args.env_id
    return REFERENCES.get(env_id.lower().split("-")[0], (0.0, 100.0))


def normalized_score(args: Args, source: MinariSet | None, returns: np.ndarray) -> np.ndarray:
    """100 (R - random) / (expert - random), in percent; AntMaze: success rate."""
    random, expert = reference_returns(args, source)
    return 100 * (returns - random) / (expert - random)


def write(path: Path, writer: Callable[[BinaryIO], object]) -> None:
    """writer(temporary file), then a rename, so that `path` is whole at every moment. Raises Stop."""
    temporary = path.with_name(path.name + ".tmp")
    with explain(f"cannot write {path}"):
        try:
            with temporary.open("wb") as file:
                writer(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def new_run_folder(args: Args) -> Path:
    """runs/{env_id}__{exp_name}__{seed}__{time}, with args.json in it."""
    folder, second = None, int(time.time())
    while folder is None:
        path = Path("runs", f"{args.env_id.replace('/', '-')}__{EXP_NAME}__{args.seed}__{second}")
        with explain(f"cannot make {path}"), suppress(FileExistsError):
            path.mkdir(parents=True)
            folder = path
        second += 1  # another run began in the same second
    record = dataclasses.asdict(args) | {module.__name__: module.__version__ for module in (torch, gym, mujoco, minari)}
    with suppress(OSError):  # no git
        git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        record["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    write(folder / "args.json", lambda file: file.write(json.dumps(record, indent=2).encode()))
    return folder


def load_checkpoint(folder: str, script: str = EXP_NAME) -> dict:
    """What `train` of `script` saved in a run folder, with those of its arguments that this script has. Raises Stop."""
    with explain(f"cannot load {folder}", "Give a folder of runs/ that holds a checkpoint.pt."):
        try:
            checkpoint = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # its text advises to run the code in the file
            raise ValueError("it is damaged, or holds more than tensors and numbers") from None
        found, args, version = checkpoint["script"], checkpoint["args"], checkpoint.get("format", 1)
        require(found == script, f"{folder} was written by {found}.py, one of {script}.py is needed.")
        expect(version == CHECKPOINT_FORMAT, f"it has format {version}, this script reads {CHECKPOINT_FORMAT}")
        known = args if script == EXP_NAME else vars(Args()).keys() & args
        return checkpoint | {"args": Args(**{name: args[name] for name in known})}


# ---- end of data, environments, evaluation, run folder ----
# ---- shared by all scripts: speed and seeds ----
class Adam:
    """Adam with all that changes in tensors, as a compiled update or a CUDA graph needs it."""

    def __init__(self, net: nn.Module, learning_rate: float):
        self.parameters = list(net.parameters())
        self.m, self.v = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.step, self.learning_rate = (self.m[0].new_tensor(x) for x in (0.0, learning_rate))

    def minimise(self, loss: torch.Tensor) -> None:
        """One step on the parameters of `net`; other networks that the loss passes through get no gradient."""
        gradients = [x.contiguous() for x in torch.autograd.grad(loss, self.parameters)]  # as the kernel reads them
        with torch.no_grad():
            self.step += 1
            if not torch.compiler.is_compiling():  # one pass over the memory, one kernel on a GPU
                lists = self.parameters, gradients, self.m, self.v, [], [self.step] * len(self.m)
                rest = {"weight_decay": 0.0, "amsgrad": False, "maximize": False}
                torch._fused_adam_(*lists, lr=self.learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, **rest)
                return
            # torch cannot compile that; beta**step as an exp: a power would be taken again in every loop
            bias1, bias2 = (1 - (self.step.double() * math.log(beta)).exp() for beta in (0.9, 0.999))
            torch._foreach_lerp_(self.m, gradients, 1 - 0.9)
            torch._foreach_mul_(self.v, 0.999)
            torch._foreach_addcmul_(self.v, gradients, gradients, 1 - 0.999)
            divisor = torch._foreach_sqrt(self.v)
            torch._foreach_mul_(divisor, (1 / bias2.sqrt()).to(loss.dtype))
            torch._foreach_add_(divisor, 1e-8)
            torch._foreach_mul_(divisor, (bias1 / self.learning_rate).to(loss.dtype))
            torch._foreach_addcdiv_(self.parameters, self.m, divisor, -1)

    def state(self) -> list[torch.Tensor]:
        return [self.step, *self.m, *self.v]


def capture(step: Callable[[], dict]) -> Callable[[], dict]:
    """A function that replays the GPU's work of `step` as one CUDA graph; capturing runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        metrics = step()

    def replay() -> dict:
        graph.replay()
        return metrics

    return replay


def accelerate(step: Callable[[bool], dict], args: Args, device: torch.device) -> Callable[[bool], dict]:
    """`step(update_actor)` without Python's and the launches' overhead; it must change tensors in place only.

    With --compile it is one compiled function for either value. On a GPU it is a CUDA graph for either, captured at
    the fourth call, when three plain ones have warmed up the libraries; where that fails, it goes on without.
    """
    with suppress(AttributeError, TypeError):  # glibc alone: keep what a step frees, a new page costs more than its use
        for option, size in ((-3, 2**25), (-1, 2**30)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad inside the compiled function
        cpu, plain = device.type == "cpu", step
        # nothing but update_actor changes between two calls: one function for either value, and no checks at each call
        options = {"cpp_wrapper": cpu, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        options |= {"pattern_matcher": not cpu}  # it makes `x @ weight + bias` an addmm, which on a CPU copies the bias
        form = {"fullgraph": True, "isolate_recompiles": True}
        # torch.compile takes entries out of options: a dictionary for each
        compiled = [torch.compile(f, **form, options={**options}) for f in (lambda: plain(False), lambda: plain(True))]

        def step(update_actor: bool) -> dict:
            with explain("--compile failed", "It needs a C++ compiler (g++ or clang++): install one or leave it out."):
                return compiled[update_actor]()

    if device.type != "cuda" or not args.cudagraphs:
        return step
    calls, replays = [0, 0], {}

    def launch(update_actor: bool) -> dict:
        calls[update_actor] += 1
        if calls[update_actor] == 4:
            try:
                replays[update_actor] = capture(lambda: step(update_actor))
            except RuntimeError as error:
                tqdm.write(f"no CUDA graph, training goes on without it: {error}")
        return replays[update_actor]() if update_actor in replays else step(update_actor)

    return launch


def take_turns(runs: list[Iterator[None]]) -> None:
    """Advance each run by a step in turn until all have ended; one that stops leaves the others on. Raises Stop."""
    stops: list[Stop] = []
    while runs:
        for run in list(runs):
            try:
                if next(run, "ended") == "ended":
                    runs.remove(run)
            except Stop as stop:
                stops.append(stop)
                runs.remove(run)
    if stops:
        raise Stop("\n".join(stop.args[0] for stop in stops), max(stop.args[1] for stop in stops))


# ---- end of speed and seeds ----
def check_save_dataset(args: Args) -> None:
    """Refuse at the start what --save-dataset could not write at the end. Raises Stop."""
    if args.save_dataset:
        name = args.save_dataset
        with explain(f"--save-dataset {name} is not a Minari id", "Give one such as my/hopper/medium-replay-v0."):
            minari.dataset.minari_dataset.parse_dataset_id(name)
        with explain(f"--save-dataset {name} cannot be written"):
            path = minari.storage.datasets_root_dir.get_dataset_path(name)
        require(not path.exists(), f"--save-dataset {name}: {path} exists already; delete it or choose another id.")
        require(args.online_steps > 0, "--save-dataset writes online transitions: --online-steps 0 makes none.")
        require(args.num_seeds == 1, "--save-dataset writes the transitions of one agent: leave out --num-seeds.")
        recoverable = args.env_id not in D4RL_SHA256
        require(recoverable, f"--save-dataset needs a Gymnasium or Minari id: no set can recover {args.env_id}.")


def write_dataset(args: Args, explorer: Explorer, references: tuple[float | None, float | None]) -> None:
    """The online transitions as the Minari dataset of --save-dataset, float32 and compressed, whole or not at all.

    references: the returns that mean a score of 0 and 100, if known. Actions have the environment's units. Raises Stop.
    """
    replay, agent, env = explorer.replay, explorer.agent, explorer.env
    box, space = env.unwrapped.action_space, env.unwrapped.observation_space

    def nest(space: gym.Space, x: np.ndarray) -> np.ndarray | dict:
        if not isinstance(space, gym.spaces.Dict):
            return x.reshape(-1, *space.shape)
        ends = np.cumsum([gym.spaces.flatdim(sub) for sub in space.values()])
        return {
            key: nest(sub, part) for (key, sub), part in zip(space.items(), np.split(x, ends[:-1], -1), strict=True)
        }

    def episodes() -> Iterator[minari.data_collector.EpisodeBuffer]:
        starts = [replay.first] + [end for end, *_ in explorer.episodes]
        for number, (start, end) in enumerate(itertools.pairwise([*starts, replay.size])):
            if start < end:
                s, a, r, next_s, terminated = (x[start:end] for x in replay.rows)
                s = torch.cat([s, next_s[-1:]]) * agent.std + agent.mean
                s, a, r, terminated = (x.cpu().numpy() for x in (s, a, r + is_antmaze(args), terminated == 1))
                a = (a * (box.high - box.low) / 2 + (box.high + box.low) / 2).astype(np.float32)
                truncated = ~terminated & (np.arange(len(a)) == len(a) - 1)
                yield minari.data_collector.EpisodeBuffer(
                    seed=explorer.seed(number), observations=nest(space, s), actions=a, rewards=r,
                    terminations=terminated, truncations=truncated,
                )  # fmt: skip

    def compress(old: h5py.Group, new: h5py.Group) -> None:
        new.attrs.update(old.attrs)
        for name, x in old.items():
            if isinstance(x, h5py.Group):
                compress(x, new.create_group(name, track_order=True))
            else:
                new.create_dataset(name, data=x[()], chunks=x.shape, compression="gzip", shuffle=True)

    spec = copy.copy(env.spec)
    spec.additional_wrappers = ()  # without them, as the transitions are recorded
    with explain(f"cannot write the Minari dataset {args.save_dataset}"):
        path, root = (minari.storage.datasets_root_dir.get_dataset_path(name) for name in (args.save_dataset, None))
        room = 3 * sum(x[replay.first : replay.size].nbytes for x in replay.rows) + 20_000 * (
            1 + len(explorer.episodes)
        )
        free = shutil.disk_usage(root).free  # a disk that fills up under it crashes HDF5
        expect(free > room, f"No space left for it in {root}: it may take {room:,} bytes, {free:,} are free")
        beside = tempfile.TemporaryDirectory(prefix=".", dir=root)
    with explain(f"cannot write {path}"), warnings.catch_warnings(action="ignore"), beside as temporary:
        os.environ["MINARI_DATASETS_PATH"] = temporary  # Minari would write in place
        try:
            dataset = minari.create_dataset_from_buffers(
                args.save_dataset, episodes(), env=spec, algorithm_name=EXP_NAME,
                ref_min_score=references[0], ref_max_score=references[1],
            )  # fmt: skip
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(root)
        file = dataset.storage.data_path / "main_data.hdf5"
        with h5py.File(file.with_suffix(".tmp"), "w", libver="latest", track_order=True) as new:
            for name in (f"episode_{i}" for i in range(len(dataset))):
                with h5py.File(file) as old:  # opened anew each time: HDF5 keeps memory for every array it has read
                    compress(old[name], new.create_group(name, track_order=True))
        os.replace(file.with_suffix(".tmp"), file)
        dataset.storage.update_metadata({"dataset_size": dataset.storage.get_size()})
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(Path(temporary, args.save_dataset), path)
    print(f"wrote {len(dataset):,} episodes, {dataset.total_steps:,} transitions, to {path}")


def train(args: Args, checkpoint: dict | None = None, catch_signals: Callable[[], list[int]] = list) -> None:
    """Train, from `checkpoint` on if there is one, until done or a signal number is in the list of catch_signals().

    Raises Stop: wrong input, divergence (the last good checkpoint stays), a signal (after a checkpoint).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads such memory here
    torch.set_float32_matmul_precision(args.matmul_precision)
    if checkpoint:
        env_id = checkpoint["args"].env_id
        require(
            env_id == args.env_id, f"{args.resume or args.checkpoint} was trained on {env_id}, not on {args.env_id}."
        )
    plain = args.from_scratch and ("/" not in args.env_id or args.env_id in gym.registry)
    source = None if plain else open_minari(args)
    data = None
    if not args.eval_only:
        check_save_dataset(args)
        data = None if args.from_scratch else load_dataset(args, source, make_env(args, source))
    signals = [] if args.eval_only else catch_signals()  # loading ends at once, training with a checkpoint
    seeds = [dataclasses.replace(args, seed=args.seed + i, num_seeds=1) for i in range(args.num_seeds)]
    take_turns([train_seed(x, source, data, checkpoint, signals) for x in seeds])


def train_seed(
    args: Args, source: MinariSet | None, data: tuple | None, checkpoint: dict | None, signals: list[int]
) -> Iterator[None]:
    """The training of one seed on `data` as load_dataset gives it, a gradient step at each `next`."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    envs = [make_env(args, source) for _ in range(min(args.eval_episodes, 10))]
    (state_dim,), (action_dim,) = envs[0].observation_space.shape, envs[0].action_space.shape
    agent = Agent(state_dim, action_dim, args, device)
    generator = torch.Generator(device).manual_seed(args.seed)  # batches and noise: evaluation does not touch it
    step, evaluations, started, eval_seed = 0, [], time.time(), 1000 * (args.seed + 1)
    if checkpoint:
        unfit = f"{args.resume or args.checkpoint} does not fit {args.env_id}"
        with explain(unfit, "Is it damaged, or have the data or the environment changed?"):
            agent.load_state_dict(checkpoint["agent"])
            for optimizer, state in zip(agent.optimizers, checkpoint["optimizers"], strict=True):
                torch._foreach_copy_(optimizer.state(), state)
            if checkpoint.get("device", device.type) == device.type:  # another kind has other random numbers
                generator.set_state(checkpoint["generator"])
        step = checkpoint["step"]
    if args.resume:
        evaluations, started = checkpoint["evaluations"], started - checkpoint["seconds"]
        taken = len(checkpoint["online"][0][0])
        fits = max(step - args.offline_steps, 0) == taken <= args.online_steps
        require(fits, f"{args.resume} has taken {taken:,} online steps: what is behind it cannot be changed any more.")

    def heed_signals() -> None:
        if signals:
            losses()  # a diverged agent must not replace the last good one
            save()
            raise Stop(f"stopped at step {step:,}: go on with --resume {folder}", 128 + signals[0])

    @torch.no_grad()
    def act(observations: np.ndarray) -> np.ndarray:
        heed_signals()
        s = torch.as_tensor(observations, dtype=torch.float32, device=device)
        return agent.actor((s - agent.mean) / agent.std).cpu().numpy()

    def score_agent() -> list:
        returns, lengths = evaluate(act, envs, args.eval_episodes, eval_seed)
        mean, std, score = returns.mean().item(), returns.std().item(), normalized_score(args, source, returns).mean()
        tqdm.write(f"seed {args.seed}, step {step:,}: return {mean:.1f} +- {std:.1f}, score {score:.1f}")
        return [step, mean, std, score.item(), lengths.mean().item(), len(returns), time.time() - started]

    if args.eval_only:
        score_agent()
        return
    if args.from_scratch:
        widths = {"observations": (state_dim,), "actions": (action_dim,), "next_observations": (state_dim,)}
        digest, dataset = "", Batch(*(torch.empty(0, *widths.get(name, ())) for name in Batch._fields))
    else:
        dataset, mean, std = data
        digest = hashlib.sha256(dataset.observations.numpy()).hexdigest()
        same = not checkpoint or checkpoint["digest"] == digest
        trained_on = f"the dataset that {args.resume or args.checkpoint} was trained on"
        require(same, f"{args.dataset_path or args.env_id} is not {trained_on}.")
        agent.mean.copy_(torch.from_numpy(mean))
        agent.std.copy_(torch.from_numpy(std))
    with explain(f"cannot hold {args.online_steps:,} online steps in memory"):
        replay = Replay(dataset, args.online_steps, device)
    explorer = Explorer(make_env(args, source), replay, agent, args)
    explorer.restore(*(checkpoint["online"] if args.resume else ([x[:0] for x in dataset], [])))
    del dataset
    folder = Path(args.resume) if args.resume else new_run_folder(args)
    print(f"run folder: {folder}")

    def log(values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def losses() -> dict[str, float]:
        if stream:
            stream.synchronize()
        values = {f"losses/{name}": value.item() for name, value in metrics.items()}
        q = abs(values.get("losses/q_values", 0.0))
        # Adam's small steps keep a runaway Q finite for long: ten times the largest return has diverged too
        ran_away = q > 1000 and q > 10 * replay.rows.rewards[: replay.size].abs().max().item() / (1 - in_force.gamma)
        if ran_away or not all(map(math.isfinite, values.values())):
            log({"eval/diverged": 1})
            raise Stop(f"diverged at step {step:,}: {values}; the last good checkpoint stays in {folder}", 3)
        return values

    def save() -> None:
        state = {"script": EXP_NAME, "args": dataclasses.asdict(args) | {"resume": None}, "step": step}
        state |= {"agent": agent.state_dict(), "optimizers": [x.state() for x in agent.optimizers]}
        state |= {"generator": generator.get_state(), "evaluations": evaluations, "seconds": time.time() - started}
        online = [x[replay.first : replay.size].cpu().clone() for x in replay.rows]
        state |= {
            "device": device.type,
            "metrics": metrics,
            "digest": digest,
            "format": CHECKPOINT_FORMAT,
            "online": (online, explorer.episodes),
        }
        csv = "".join(",".join(map(str, row)) + "\n" for row in [EVAL_COLUMNS, *evaluations])
        writer.flush()  # what the checkpoint makes past must be on the disk before it, or a kill between loses it
        write(folder / "eval.csv", lambda file: file.write(csv.encode()))
        write(folder / "checkpoint.pt", lambda file: torch.save(state, file))

    def film() -> None:
        if not args.capture_video:
            return
        with explain(f"cannot film into {folder / 'videos'}", "It takes moviepy and OpenGL (MUJOCO_GL=egl or osmesa)."):
            env = make_env(args, source, "rgb_array")
            env = gym.wrappers.RecordVideo(env, str(folder / "videos"), name_prefix=f"step-{step}")
            evaluate(act, [env], 1, eval_seed)
            env.close()

    if args.track:
        with explain("--track needs Weights & Biases (pip install wandb, wandb login)"):
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": folder.name}
            wandb.init(**names, config=vars(args), sync_tensorboard=True)
    metrics, timed_step, timed = checkpoint["metrics"] if args.resume else {}, step, time.time()
    begun, lr = step, agent.actor_optimizer.learning_rate
    total, in_force = args.offline_steps + args.online_steps, args
    index = torch.empty(args.batch_size, dtype=torch.int64, device=device)
    noise = torch.empty(args.batch_size, action_dim, device=device)

    def learn_with(args: Args) -> Callable[[bool], dict]:
        return accelerate(
            lambda actor: update(agent, Batch(*(x[index] for x in replay.rows)), noise, args, actor), args, device
        )

    changing = {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("lam", "nu", "gamma")}
    learn_offline, learn_online = learn_with(args), learn_with(dataclasses.replace(args, **changing))
    stream = torch.cuda.Stream() if device.type == "cuda" else None  # one for each seed: they run side by side
    # purge_step hides what a killed run logged past its checkpoint
    bar = tqdm(total=total, initial=step, unit=" steps", desc=f"{device} seed {args.seed}")
    unwritable = explain(f"cannot write to {folder}", "Is the disk full?", OSError)
    with bar, unwritable, SummaryWriter(str(folder), purge_step=step + 1) as writer:
        if not args.resume:
            table = "".join(f"|{name}|{value}|\n" for name, value in vars(args).items())
            writer.add_text("hyperparameters", "|argument|value|\n|-|-|\n" + table)
            save()
        film()  # before any step: shows at once what it lacks
        while True:
            t, finished = step - args.offline_steps, step >= total  # t: online steps taken
            due = finished or t == 0 or (step > 0 and (t if t > 0 else step) % args.eval_frequency == 0)
            due = due and step not in (row[0] for row in evaluations[-1:])
            if step > begun and (due or step % 1000 == 0):
                log(losses() | explorer.recent())
                sps = (step - timed_step) / (time.time() - timed)
                log({"charts/SPS": sps, "charts/actor_learning_rate": lr.item()})
                log({"dmg/lam": in_force.lam, "dmg/nu": in_force.nu})
                timed_step, timed = step, time.time()
            if due:
                evaluations.append(score_agent())
                _, mean, _, score, length, *_ = evaluations[-1]
                log({"eval/episodic_return": mean, "eval/normalized_score": score, "eval/episodic_length": length})
                log({"eval/success_rate": score} if is_antmaze(args) else {})
                bar.set_postfix(score=f"{score:.1f}")
                save()
                film()
                timed_step, timed = step, time.time()
            if finished:
                break
            heed_signals()

            step += 1
            with torch.cuda.stream(stream):
                lr.fill_(actor_learning_rate(step, args))
                if t >= 0:
                    in_force = online_args(args, t)
                    for name, x in changing.items():
                        x.fill_(getattr(in_force, name))
                    if t < args.learning_starts:
                        action = 2 * torch.rand(action_dim, generator=generator, device=device) - 1
                    else:
                        exploration = args.exploration_noise * torch.randn(
                            action_dim, generator=generator, device=device
                        )
                        with torch.no_grad():
                            action = (agent.actor(explorer.state[None])[0] + exploration).clamp(-1, 1)
                    explorer.step(action)
                if 0 <= t < args.learning_starts:
                    metrics.clear()
                else:
                    index.random_(replay.size, generator=generator)
                    noise.normal_(generator=generator)
                    metrics |= (learn_offline if t < 0 else learn_online)(step % args.policy_frequency == 0)
            bar.update()
            yield
    if args.save_dataset:
        references = reference_returns(args, source)
        if references == (0, 100):  # none is known: a random policy's return, and the last agent's if it is better
            uniform, last = np.random.default_rng(args.seed), evaluations[-1][1]
            returns, _ = evaluate(
                lambda s: uniform.uniform(-1, 1, (len(s), action_dim)), envs, args.eval_episodes, eval_seed
            )
            references = (returns.mean().item(), last) if last > returns.mean() else (None, None)
        write_dataset(args, explorer, references)


def resolve(args: Args) -> Args:
    """Fill in the defaults that depend on the dataset (App. C, Table 5) and check the ranges. Raises Stop."""
    alone = not (args.from_scratch and (args.dataset_path or args.checkpoint))
    require(alone, "--from-scratch takes no data: leave out --dataset-path and --checkpoint.")
    limit = {"offline_steps": 0, "lam": 1.0, "lam_end": 1.0, "nu": 0.0, "nu_end": 0.0} if args.from_scratch else {}
    for name, x in limit.items():
        flag, given = name.replace("_", "-"), getattr(args, name)
        require(given in (x, getattr(Args, name)), f"--from-scratch is TD3, which sets --{flag} {x}: leave it out.")
    args = dataclasses.replace(args, **limit)
    name = Path(args.env_id).name + Path(args.dataset_path or "").name
    defaults = {"nu": 10.0 if "expert" in name else 0.1, "expectile": 0.7}
    defaults |= {"inverse_temperature": 3.0, "max_weight": 3.0, "eval_frequency": 20_000, "eval_episodes": 10}
    if is_antmaze(args):
        defaults = {"nu": 0.5, "expectile": 0.9, "inverse_temperature": 10.0, "max_weight": 100.0}
        defaults |= {"eval_frequency": 50_000, "eval_episodes": 100}
    sql = 5.0 if "medium-expert" in name else 2.0
    defaults |= {"in_sample_temperature": sql if args.in_sample == "sql" else 5.0}
    defaults |= {"learning_starts": 25_000 if args.from_scratch else 0}
    defaults |= {"gamma_online": 0.995 if is_antmaze(args) and "large" in args.env_id.lower() else args.gamma}
    args = dataclasses.replace(args, **{name: x for name, x in defaults.items() if getattr(args, name) is None})
    for name, hint in get_type_hints(Args, include_extras=True).items():
        for span in getattr(hint, "__metadata__", ()):
            x, (low, high) = getattr(args, name), map(float, span[1:-1].split(","))
            inside = low <= x <= high and (x > low or span[0] == "[") and (x < high or span[-1] == "]")
            require(inside, f"--{name.replace('_', '-')} {x} is outside {span}.")
    require(bool(args.resume) or not args.eval_only, "--eval-only scores a saved agent: add --resume runs/<name>.")
    alone = args.num_seeds == 1 or not (args.resume or args.checkpoint)
    require(alone, "--num-seeds starts new agents: --resume and --checkpoint go on with one, leave it out.")
    return args


def main() -> int:
    """Train or resume by the command line; a Stop becomes its sentence on stderr and its exit code."""
    signals: list[int] = []

    def catch_signals() -> list[int]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: (signals.append(number), signal.signal(number, signal.SIG_DFL)))
        return signals  # a second signal ends at once

    args, checkpoint = tyro.cli(Args), None
    try:
        if args.resume:
            checkpoint = load_checkpoint(args.resume)
            args = tyro.cli(Args, default=checkpoint["args"])
        elif args.checkpoint:
            checkpoint = load_checkpoint(args.checkpoint, "dmg_offline")
            given, done = args.offline_steps, checkpoint["step"]
            require(given in (done, Args.offline_steps), "--checkpoint stands for the offline steps: leave these out.")
            args = dataclasses.replace(tyro.cli(Args, default=checkpoint["args"]), offline_steps=done)
        args = resolve(args)
        print(", ".join(f"{name}={value}" for name, value in vars(args).items()))
        train(args, checkpoint, catch_signals)
        return 0
    except Stop as stop:
        print(stop.args[0], file=sys.stderr)
        return stop.args[1]
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
