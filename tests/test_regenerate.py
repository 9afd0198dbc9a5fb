"""benchmark/regenerate_d4rl.py: D4RL's arithmetic, goals, rows, the same bytes from a seed, inert pickles."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import regenerate_d4rl as d4rl
import torch
from conftest import refusal

POLICIES = Path(__file__).resolve().parent.parent.parent / "shared/policies"
GOALS = {"umaze": (1.28, 9.53), "umaze-diverse": (1.0, 9.9), "medium-play": (20.52, 20.80)}
GOALS |= {"medium-diverse": (20.4, 21.4), "large-play": (33.58, 25.18), "large-diverse": (33.52, 25.33)}


def weights(n_in, n_out, seed=0):
    """A policy of 16 hidden units with random weights."""
    rng, found, last = np.random.default_rng(seed), {}, (16, n_out)
    for name, i, o in ("fc0", n_in, 16), ("fc1", 16, 16), ("last_fc", *last), ("last_fc_log_std", *last):
        found[f"{name}__weight"] = rng.normal(size=(o, i)).astype(np.float32) / i**0.5
        found[f"{name}__bias"] = np.full(o, -1, np.float32)
    return found


@pytest.fixture
def policies(tmp_path):
    for name, shape in {"ant_goal": (29, 8), "a": (11, 3), "b": (11, 3, 1)}.items():
        np.savez(tmp_path / f"{name}.npz", **weights(*shape))
    return tmp_path


def regenerate(name, folder, **flags):
    args = d4rl.Args(name, str(folder), out=str(folder / "out.hdf5"), **flags)
    d4rl.regenerate(args)
    with h5py.File(args.out) as file:
        rows = {"goals": file["infos/goal"][()]} if "infos" in file else {}
        return rows | {key: file[key][()] for key in file if key != "infos"} | dict(file.attrs)


def test_cells_are_those_of_d4rl_and_waypoints_lead_along_the_u():
    """Cells of 4 m, (1, 1) from the origin; positions below zero are clipped to it."""
    for xy, cell in {(0, 0): (1, 1), (3.9, 4.1): (2, 1), (-3, 8): (3, 1), (8.5, 0.2): (1, 3)}.items():
        assert d4rl.cell_of(xy) == cell
    assert d4rl.corner((3, 2)).tolist() == [4, 8]
    maze = d4rl.Maze("antmaze-umaze-v2", np.random.default_rng(0))
    way = [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]
    assert [maze.next_cell(cell, (3, 1)) for cell in way[:-1]] == way[1:]
    assert maze.next_cell((0, 3), (3, 1)) == (1, 3)  # a wall, by the arithmetic: into the next free cell
    maze.goal = np.array([0.3, 8.4])
    assert maze.waypoint([0.5, 8.5]) is maze.goal
    places = np.array([maze.waypoint([0.5, 0.5]) for _ in range(50)])
    assert (places >= [4, 0]).all() and (places < [5, 1]).all() and len(set(places[:, 0])) == 50


def test_actions_are_sampled_from_the_policy_and_a_mazes_have_noise_of_a_fifth(policies):
    w, h = weights(11, 3), np.random.default_rng(1).normal(size=(5000, 11))
    x, linear = h, lambda name, h: h @ w[f"{name}__weight"].T + w[f"{name}__bias"]
    h = linear("fc1", linear("fc0", h).clip(0)).clip(0)
    z = np.arctanh(d4rl.sample(w, x, np.random.default_rng(0))) - linear("last_fc", h)
    z /= np.exp(linear("last_fc_log_std", h).clip(-20, 2))
    assert abs(z.mean()) < 0.03 and z.std() == pytest.approx(1, rel=0.03)
    still = {name: 0 * x for name, x in weights(29, 8).items()} | {"last_fc_log_std__bias": np.full(8, -20.0)}
    np.savez(policies / "ant_goal.npz", **still)
    actions = regenerate("antmaze-umaze-v2", policies, steps=500)["actions"]
    assert abs(actions.mean()) < 0.02 and actions.std() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("kind", GOALS)
def test_starts_goals_and_the_rewarded_goal_are_d4rls_and_the_ant_is_the_evaluations(kind, policies):
    name, starts, goals = f"antmaze-{kind}-v2", set(), set()
    assert regenerate(name, policies, steps=2)["goal"].tolist() == list(GOALS[kind])
    maze = d4rl.Maze(name, np.random.default_rng(0))
    evaluated = d4rl.dmg.make_raw_env(d4rl.dmg.Args(name)).unwrapped.model
    assert np.array_equal(maze.env.model.body_inertia, evaluated.body_inertia)
    assert not np.allclose(maze.env.model.body_inertia, d4rl.dmg.D4RLAntMaze("umaze").model.body_inertia)
    for _ in range(500):
        state = maze.reset()
        assert state.shape == (29,) and 0.6 < state[2] < 0.9
        cell, goal = d4rl.cell_of(state[:2]), d4rl.cell_of(maze.goal)
        low, high = (0, 1) if maze.start_cells else (-0.1, 0.1)
        assert low <= min(state[:2] - d4rl.corner(cell)) and max(state[:2] - d4rl.corner(cell)) <= high
        assert min(maze.goal - d4rl.corner(goal)) >= 0 and max(maze.goal - d4rl.corner(goal)) <= 3
        starts.add(cell), goals.add(goal)
    assert goals == set(d4rl.GOAL_CELLS[name.split("-")[1]])
    assert starts == ({(1, 1)} if name == "antmaze-umaze-v2" else set(maze.free) - goals)


def test_rows_of_a_maze_and_the_same_seed_the_same_bytes(policies):
    rows = regenerate("antmaze-umaze-v2", policies, steps=1500, goal=(0.4, 0.3))  # this ant does not walk
    xy, timeouts = rows["observations"][:, :2], rows["timeouts"]
    assert np.flatnonzero(timeouts).tolist() == [700, 1401] and timeouts.dtype == bool
    assert regenerate("antmaze-umaze-diverse-v2", policies, steps=1100)["timeouts"].argmax() == 1000
    assert np.linalg.norm(np.diff(xy, axis=0), axis=1)[~timeouts[:-1]].max() < 5  # D4RL's own check
    near = np.linalg.norm(xy[1:] - [0.4, 0.3], axis=1) <= 0.5
    assert np.array_equal(rows["rewards"][:-1], near) and np.array_equal(rows["rewards"], rows["terminals"])
    assert (np.diff(rows["goals"], axis=0).any(1) == timeouts[:-1]).all()
    assert np.abs(rows["actions"]).max() <= 1 and 0 < rows["rewards"].sum() < 1400
    again, other = (regenerate("antmaze-umaze-v2", policies, steps=200, seed=seed) for seed in (0, 5))
    for key in ("observations", "actions", "goals"):
        assert rows[key][:200].tobytes() == again[key].tobytes() != other[key].tobytes()
    kinds = [f"antmaze-medium-{kind}-v2" for kind in ("play", "diverse", "diverse")]
    play, diverse, again = (regenerate(kind, policies, steps=2)["observations"].tobytes() for kind in kinds)
    assert diverse == again != play
    assert {path.name for path in policies.glob("out*")} == {"out.hdf5"}


def test_commanded_goals_are_those_of_d4rls_own_file_and_wider_than_its_code(monkeypatch):
    """Mean and deviation of the audit's 1,426 goals to three standard errors of 1,000, and their range."""

    def like_the_audits(goals):
        moments, ends = [*goals.mean(0), *goals.std(0)], [*goals.min(0), *goals.max(0)]
        near = np.allclose(moments, [1.516, 9.489, 0.63, 0.63], rtol=0, atol=0.06)
        return near and np.allclose(ends, [0.06, 8.08, 2.97, 10.9], rtol=0, atol=0.15)

    def ours():
        maze = d4rl.Maze("antmaze-umaze-v2", np.random.default_rng(0))
        return np.array([(maze.reset(), maze.goal)[1] for _ in range(1000)])

    audit = np.loadtxt(d4rl.AUDIT, delimiter=",")
    assert len(audit) == 1426 and like_the_audits(audit) and like_the_audits(ours())
    monkeypatch.setattr(d4rl, "GOAL_NOISE", 0.5)  # as published
    assert not like_the_audits(ours())


@pytest.mark.skipif(not POLICIES.exists(), reason="needs the published policies in ../shared")
def test_d4rls_ant_arrives():
    columns, _ = d4rl.collect_maze(d4rl.Args("antmaze-umaze-v2", str(POLICIES), steps=1500))
    xy = np.array(columns["observations"])[:, :2]
    to_goal = np.linalg.norm(xy - np.array(columns["infos/goal"]), axis=1)
    assert to_goal[:701].min() < 1 and to_goal[0] > 7 and columns["rewards"].sum() > 0


def test_rows_of_a_robot_in_equal_parts(policies):
    rows = regenerate("hopper-medium-v2", policies, sac=("a", "b"), steps=401)
    s, next_s, timeouts = rows["observations"], rows["next_observations"], rows["timeouts"]
    assert len(s) == 400 and (timeouts[199] or rows["terminals"][199])
    inside = ~(timeouts | rows["terminals"])
    assert np.array_equal(s[1:][inside[:-1]], next_s[:-1][inside[:-1]])
    assert not (timeouts & rows["terminals"]).any() and rows["terminals"].any() and inside[-1] == 0
    first = regenerate("hopper-medium-v2", policies, sac=("a",), steps=200)
    assert np.array_equal(first["actions"], rows["actions"][:200])
    args = d4rl.dmg.Args("hopper-medium-v2", str(policies / "out.hdf5"))
    assert len(d4rl.dmg.load_dataset(args)[2]) == 200 - first["timeouts"].sum()


def test_published_pickles_are_read_and_run_nothing(tmp_path):
    """deep_ope's dict of arrays, torch 1.x's format of D4RL's ant, and one that names foreign code."""
    arrays = weights(29, 8)
    named = {key.replace("__", "/"): x for key, x in arrays.items()} | {"nonlinearity": "relu"}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(named, 2).replace(b"numpy._core", b"numpy.core"))
    layers = {key[:-8]: torch.nn.Linear(*x.shape[::-1]) for key, x in arrays.items() if "weight" in key}
    net = torch.nn.ModuleDict(layers)
    net.load_state_dict({key.replace("__", "."): torch.from_numpy(x) for key, x in arrays.items()})
    ant = {"exploration/policy": net}
    torch.save(ant, tmp_path / "ant_hierarch_pol.pkl", _use_new_zipfile_serialization=False)
    for names in (["a"], ["ant_goal", "ant_hierarch_pol"]):
        np.testing.assert_equal(dict(d4rl.read_policy(tmp_path, *names)), arrays)

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"fc0/weight": np.ones((1, 1)), "evil": Evil()}, 2))
    pickle.loads((tmp_path / "evil.pkl").read_bytes())
    (tmp_path / "ran").unlink()  # a plain reader runs it
    with pytest.raises(Exception):  # noqa: B017  an array is missing or the pickle is refused
        d4rl.sample(d4rl.read_policy(tmp_path, "evil"), np.zeros(1), None)
    assert not (tmp_path / "ran").exists()


def test_wrong_input_is_named(tmp_path):
    wrong = ("hopper-medium-v2", ()), ("antmaze-umaze-v2", ("a",)), ("Hopper-v4", ("a",))
    for name, sac in (*wrong, ("halfcheetah-medium-v2", ("walker_online_3",))):
        assert name in refusal(d4rl.Args, name, str(tmp_path), sac)
    assert "ant_hierarch_pol" in refusal(d4rl.regenerate, d4rl.Args("antmaze-umaze-v2", str(tmp_path)))
