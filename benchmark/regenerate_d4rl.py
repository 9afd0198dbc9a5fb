"""D4RL's datasets made again from the policies that made them: an HDF5 file in D4RL's schema.

    python benchmark/regenerate_d4rl.py antmaze-umaze-v2 --policies FOLDER
    python benchmark/regenerate_d4rl.py hopper-medium-v2 --policies FOLDER --sac hopper_online_3

FOLDER has D4RL's ant_hierarch_pol.pkl and deep_ope's hopper_online_3.pkl (README.md) (nothing
in them is executed), or .npz files of their weights. A million rows take 10 to 40 minutes on one core.
"""

import dataclasses
import os
import pickle
import sys
from pathlib import Path

import h5py
import mujoco
import numpy as np
import tyro
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dmg_offline as dmg

GOAL_CELLS = {  # row and column of the goals, in the play and in the diverse set (README.md)
    "umaze": [(3, 1)],
    "medium": [(2, 6), (5, 1), (6, 5)],
    "large": [(1, 6), (3, 5), (3, 10), (5, 2), (7, 4), (7, 6), (7, 9)],
}
# x and y in meters of the goal that a set's rewards are for (README.md): umaze-diverse's and medium-diverse's
# are a public project's estimates of D4RL's own; with the others a set has about D4RL's number of rewards
REWARDED_GOALS = {
    "antmaze-umaze-v2": (1.28, 9.53),
    "antmaze-umaze-diverse-v2": (1.0, 9.9),
    "antmaze-medium-play-v2": (20.52, 20.80),
    "antmaze-medium-diverse-v2": (20.4, 21.4),
    "antmaze-large-play-v2": (33.58, 25.18),
    "antmaze-large-diverse-v2": (33.52, 25.33),
}
# D4RL's own umaze file has goals up to 3 m from the corner of their cell; its published code draws 0.5 here
GOAL_NOISE = 2
AUDIT = Path(__file__).with_name("results") / "antmaze_umaze_v2_goals.csv"


@dataclasses.dataclass
class Args:
    name: tyro.conf.Positional[str]  # a D4RL v2 name: one of the six mazes, or of a robot with --sac
    policies: str = "."  # folder of the policies
    sac: tuple[str, ...] = ()  # file names without extension of a robot's policies, which make equal parts
    out: str | None = None  # the file (None: the name and .hdf5)
    steps: int = 1_000_000  # rows
    goal: tuple[float, float] | None = None  # of a maze's rewards, x and y in meters (None: REWARDED_GOALS)
    seed: int = 0
    goals_picture: str | None = None  # draw the goals of D4RL's own umaze and of ours here, collect nothing

    def __post_init__(self):
        names = [name for name in dmg.D4RL_FILES if ("antmaze" in name) == (not self.sac)]
        if self.name not in names:
            raise ValueError(f"{self.name} is none of {', '.join(names)} (robots need --sac)")
        robots = [robot for robot in ("halfcheetah", "hopper", "walker") if robot in " ".join(self.sac)]
        if self.sac and (self.goal or not all(map(self.name.startswith, robots))):
            raise ValueError(f"{self.name} takes policies of its own robot and no goal")
        self.out = self.out or f"{self.name}.hdf5"


class Inert:
    """Stands for every class and function that a pickle names: keeps its state, runs nothing."""

    def __init__(self, *_): ...

    def __setstate__(self, state):
        self.state = state


class Reader(pickle.Unpickler):
    """Reads arrays and plain containers; in torch's old format a tensor stays a reference to its storage."""

    known = {
        "collections.OrderedDict": dict,
        "_codecs.encode": str.encode,
        "torch._utils._rebuild_tensor_v2": lambda *parts: parts[:4],  # storage, offset, size, stride
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "numpy.core.multiarray._reconstruct": np._core.multiarray._reconstruct,
    }

    def find_class(self, module, name):
        return self.known.get(f"{module}.{name}") or type(name, (Inert,), {})

    def persistent_load(self, pid):
        return pid[1] if pid[0] == "module" else pid[2]  # a class, or the key of a storage


def read_ant(file):
    """Weights of D4RL's goal-reaching ant, pickled by torch 1.x: the storages' bytes follow the pickle."""
    _, _, saved, keys = (Reader(file).load() for _ in range(4))  # first two: protocol, system
    storages = {key: file.read(4 * int.from_bytes(file.read(8), "little")) for key in keys}
    weights = {}
    for name, module in saved["exploration/policy"].state["_modules"].items():
        for kind, (key, offset, size, stride) in module.state["_parameters"].items():
            strides = [4 * s for s in stride]
            weights[f"{name}__{kind}"] = np.ndarray(size, np.float32, storages[key], 4 * offset, strides)
    return weights


def read_policy(folder, *names):
    """float64 weights {layer__weight, layer__bias} of the first of these names, .npz or .pkl."""
    paths = [path for name in names for path in sorted(Path(folder).glob(f"{name}.*"))]
    if not paths:
        raise ValueError(f"{folder} has no {' or '.join(names)}, neither .npz nor .pkl")
    with paths[0].open("rb") as file:
        saved = np.load(file) if paths[0].suffix == ".npz" else Reader(file).load()  # load refuses pickles
        saved = read_ant(file) if isinstance(saved, int) else saved  # torch's magic number
        arrays = {key.replace("/", "__"): x for key, x in saved.items() if np.ndim(x)}
    return {key: x.astype(np.float64) for key, x in arrays.items()}


def outputs(weights, x, activation):
    """Mean and log of the standard deviation of the actions in states x, (state_dim,) or (n, state_dim)."""

    def linear(layer, x):
        return x @ weights[f"{layer}__weight"].T + weights[f"{layer}__bias"]

    h = activation(linear("fc1", activation(linear("fc0", x))))
    return linear("last_fc", h), linear("last_fc_log_std", h)


def sample(weights, x, rng, lowest=-20):
    """An action of a SAC policy: tanh of a Gaussian, the log of its deviation clipped to [lowest, 2]."""
    mean, log_std = outputs(weights, x, lambda h: np.maximum(h, 0))
    std = np.exp(np.clip(log_std, lowest, 2))
    return np.tanh(mean + std * rng.standard_normal(mean.shape))


def cell_of(xy):
    """Row and column by D4RL's arithmetic, which may name a wall."""
    return int(1 + max(xy[1], 1e-4) / 4), int(1 + max(xy[0], 1e-4) / 4)


def corner(cell):
    """x and y, in meters, where a cell begins."""
    return 4.0 * np.array([cell[1] - 1, cell[0] - 1])


class Maze:
    """D4RL's maze for collecting: the start and the goal of an episode, and the way to the goal."""

    def __init__(self, name, rng):
        from gymnasium_robotics.envs.maze import maps  # not at the top: it prints

        size = name.split("-")[1]
        grid = {"umaze": maps.U_MAZE, "medium": maps.MEDIUM_MAZE, "large": maps.LARGE_MAZE}[size]
        self.env = dmg.make_raw_env(dmg.Args(name)).unwrapped  # with D4RL's inertia
        self.rng = rng
        self.free = [tuple(cell) for cell in np.argwhere(np.array(grid) != 1).tolist()]
        self.goal_cells = GOAL_CELLS[size]
        self.start_cells = []  # none: the origin
        if name != "antmaze-umaze-v2":  # D4RL starts in none of the goal cells
            self.start_cells = [cell for cell in self.free if cell not in self.goal_cells]

    def reset(self):
        """The first state of an episode, (29,)."""
        env, rng = self.env, self.rng
        qpos = env.model.qpos0 + rng.uniform(-0.1, 0.1, env.model.nq)
        qvel = 0.1 * rng.standard_normal(env.model.nv)
        if self.start_cells:
            start = corner(rng.choice(self.start_cells))
            qpos[:2] = np.maximum(start + 2 * rng.uniform(0, 0.5, 2), 0)
        mujoco.mj_resetData(env.model, env.data)
        env.set_state(qpos, qvel)
        goal_corner = corner(rng.choice(self.goal_cells))
        self.goal = np.maximum(goal_corner + rng.uniform(0, 1, 2) + rng.uniform(0, GOAL_NOISE, 2), 0)
        return env.state_vector()

    def next_cell(self, here, target):
        """The cell after `here` on a shortest way, by D4RL's breadth-first search from the target."""
        queue = [target] if here != target else []
        for i, j in queue:  # it grows
            for near in ((i, j - 1), (i, j + 1), (i + 1, j), (i - 1, j)):
                if near == here:
                    return i, j
                if near in self.free and near not in queue:
                    queue.append(near)
        return target

    def waypoint(self, xy):
        """Where the ant is sent: the goal, or a place drawn anew in the next cell on the way."""
        target = cell_of(self.goal)
        cell = self.next_cell(cell_of(xy), target)
        return self.goal if cell == target else corner(cell) + self.rng.uniform(0, 1, 2)


def collect_maze(args):
    """Columns of a maze's set: the ant with action noise 0.2, the rewards of one goal, terminal = reward."""
    diverse = "diverse" in args.name
    rng = np.random.default_rng(args.seed + 1000 * diverse)  # else a diverse set had the play set's rows
    weights = read_policy(args.policies, "ant_goal", "ant_hierarch_pol")
    maze = Maze(args.name, rng)
    limit = 700 if args.name == "antmaze-umaze-v2" else 1000  # D4RL's umaze-diverse has 1,036 episodes
    columns = {name: [] for name in ("observations", "actions", "infos/goal", "timeouts")}
    state, t = maze.reset(), 0
    for _ in trange(args.steps):
        direction = maze.waypoint(state[:2]) - state[:2]
        direction = direction / max(np.linalg.norm(direction), 1e-8) * 10
        action = sample(weights, np.concatenate([state[2:], direction]), rng)
        action = np.clip(action + 0.2 * rng.standard_normal(8), -1, 1)
        timeout = t >= limit  # the row after the last step, as D4RL records it
        for column, x in zip(columns.values(), (state, action, maze.goal, timeout), strict=True):
            column.append(x)
        maze.env.do_simulation(action, maze.env.frame_skip)
        state = maze.env.state_vector()
        t += 1
        if timeout:
            state, t = maze.reset(), 0
    goal = args.goal or REWARDED_GOALS[args.name]
    xy = np.array(columns["observations"], np.float32)[1:, :2]
    near = np.append(np.linalg.norm(xy - goal, axis=1) <= 0.5, 0.0)
    return columns | {"rewards": near, "terminals": near}, {"goal": goal}


def collect_locomotion(args):
    """Columns of a robot's set: sampled actions in the environment that D4RL's scores mean."""
    rng = np.random.default_rng(args.seed)
    n = args.steps // len(args.sac)
    env = dmg.make_env(dmg.Args(env_id=args.name))
    names = "observations actions rewards terminals timeouts next_observations"
    columns = {name: [] for name in names.split()}
    for part, policy in enumerate(args.sac):
        weights = read_policy(args.policies, policy)
        state, _ = env.reset(seed=args.seed * 1000 + part)
        for k in trange(n, desc=policy):
            action = sample(weights, state, rng).astype(np.float32)
            after, reward, terminated, truncated, _ = env.step(action)
            timeout = (truncated or k == n - 1) and not terminated  # two parts do not join
            row = state, action, reward, terminated, timeout, after
            for column, x in zip(columns.values(), row, strict=True):
                column.append(x)
            state = env.reset()[0] if terminated or truncated else after
    return columns, {}


def draw_goals(path):
    """The commanded goals of D4RL's own umaze file and as many of ours, in its last corridor."""
    import matplotlib.pyplot as plt

    audit = np.loadtxt(AUDIT, delimiter=",")
    maze = Maze("antmaze-umaze-v2", np.random.default_rng(0))
    ours = np.array([(maze.reset(), maze.goal)[1] for _ in audit])
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.3), sharey=True, layout="constrained")
    for axis, goals, name in zip(axes, (audit, ours), ("D4RL's own file", "made again"), strict=True):
        for i, j in np.argwhere(np.pad([[0, 0, 0], [1, 1, 0], [0, 0, 0]], 1, constant_values=1)):
            axis.add_patch(plt.Rectangle(corner((i, j)) - 2, 4, 4, color="0.8"))  # a wall
        axis.scatter(*goals.T, s=4, color="#c0504d")
        for width, line, label in (1.5, "--", "range in D4RL's code"), (3, "-", "range in this project"):
            box = {"fill": False, "linestyle": line, "linewidth": 2, "label": label, "zorder": 3}
            axis.add_patch(plt.Rectangle(corner((3, 1)), width, width, **box))
        axis.set(xlim=(-3, 7), ylim=(5, 12), aspect="equal", xlabel="x (m)", ylabel="y (m)")
        axis.set_title(f"{name}: {len(goals):,} goals in umaze's last corridor")
        axis.legend(loc="lower right")
    figure.savefig(path, dpi=100)


def regenerate(args):
    """Write the file; it has its name only when all is in it."""
    collect = collect_locomotion if args.sac else collect_maze
    columns, attributes = collect(args)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(f"{args.out}.tmp", "w") as file:
        for name, rows in columns.items():
            x = np.array(rows)
            x = x if x.dtype == bool else x.astype(np.float32)
            file.create_dataset(name, data=x, compression="gzip")
        file.attrs.update(attributes, made=repr(args))
    os.replace(f"{args.out}.tmp", args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    draw_goals(arguments.goals_picture) if arguments.goals_picture else regenerate(arguments)
