"""benchmark/regenerate_d4rl.py: D4RL's arithmetic and rows, the same bytes from a seed, inert pickles."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import regenerate_d4rl as d4rl
import torch

POLICIES = Path(__file__).resolve().parent.parent.parent / "shared/policies"
published = pytest.mark.skipif(not POLICIES.exists(), reason="needs the published policies in ../shared")


def weights(n_in, n_out, seed=0):
    """A policy of 16 hidden units with random weights."""
    rng, found = np.random.default_rng(seed), {}
    layers = ("fc0", n_in, 16), ("fc1", 16, 16), ("last_fc", 16, n_out), ("last_fc_log_std", 16, n_out)
    for name, i, o in layers:
        found[f"{name}__weight"] = rng.normal(size=(o, i)).astype(np.float32) / i**0.5
        found[f"{name}__bias"] = np.full(o, -1, np.float32)
    return found


@pytest.fixture
def policies(tmp_path):
    np.savez(tmp_path / "ant_goal.npz", **weights(29, 8))
    np.savez(tmp_path / "a.npz", **weights(11, 3))
    np.savez(tmp_path / "b.npz", **weights(11, 3, 1))
    return tmp_path


def regenerate(name, folder, **flags):
    args = d4rl.Args(name, str(folder), out=str(folder / "out.hdf5"), **flags)
    d4rl.regenerate(args)
    with h5py.File(args.out) as file:
        rows = {key: file[key][()] for key in file if key != "infos"}
        goals = file["infos/goal"][()] if "infos" in file else None
        return rows | {"goal": file.attrs.get("goal"), "goals": goals}


def test_cells_are_those_of_d4rl():
    """4 m each, the cell (1, 1) from the origin; positions below zero are clipped to it."""
    for xy, cell in {(0, 0): (1, 1), (3.9, 4.1): (2, 1), (-3, 8): (3, 1), (8.5, 0.2): (1, 3)}.items():
        assert d4rl.cell_of(xy) == cell
    assert d4rl.corner((3, 2)).tolist() == [4, 8]


def test_waypoints_lead_along_the_u():
    maze = d4rl.Maze("antmaze-umaze-v2", np.random.default_rng(0))
    way, cell = [], (1, 1)
    while cell != (3, 1):
        cell = maze.next_cell(cell, (3, 1))
        way.append(cell)
    assert way == [(1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]
    assert maze.next_cell((0, 3), (3, 1)) == (1, 3)  # a wall, by the arithmetic: into the next free cell
    maze.goal = np.array([0.3, 8.4])
    assert maze.waypoint([0.5, 8.5]) is maze.goal
    x, y = np.array([maze.waypoint([0.5, 0.5]) for _ in range(50)]).T
    assert (x >= 4).all() and (x < 5).all() and (y >= 0).all() and (y < 1).all() and len(set(x)) == 50


@pytest.mark.parametrize("name", [name for name in d4rl.dmg.D4RL_SHA256 if "antmaze" in name])
def test_starts_and_goals_are_in_d4rls_ranges(name):
    maze = d4rl.Maze(name, np.random.default_rng(0))
    starts, goals = set(), set()
    for _ in range(500):
        state = maze.reset()
        assert state.shape == (29,) and 0.6 < state[2] < 0.9
        cell = d4rl.cell_of(state[:2])
        if maze.start_cells:
            assert (d4rl.corner(cell) <= state[:2]).all() and (state[:2] <= d4rl.corner(cell) + 1).all()
        else:
            assert np.abs(state[:2]).max() <= 0.1
        goal = d4rl.cell_of(maze.goal)
        assert (maze.goal - d4rl.corner(goal) <= 1.5).all()
        starts.add(cell), goals.add(goal)
    play = "play" in name or name == "antmaze-umaze-v2"
    assert goals == set(d4rl.GOAL_CELLS[name.split("-")[1]] if play else maze.free)
    away = set(maze.free) - (goals if play else set())
    assert starts == ({(1, 1)} if name == "antmaze-umaze-v2" else away)


def test_rows_of_a_maze_and_the_same_seed_the_same_bytes(policies):
    rows = regenerate("antmaze-umaze-v2", policies, steps=1500, goal=(0.4, 0.3))  # this ant does not walk
    assert np.array_equal(rows["goal"], [0.4, 0.3])
    xy, timeouts = rows["observations"][:, :2], rows["timeouts"]
    assert np.flatnonzero(timeouts).tolist() == list(range(700, len(xy), 701))
    assert regenerate("antmaze-umaze-diverse-v2", policies, steps=1100)["timeouts"].argmax() == 1000
    steps = np.linalg.norm(np.diff(xy, axis=0), axis=1)
    assert steps[~timeouts[:-1]].max() < 5  # D4RL's own check
    near = np.linalg.norm(xy[1:] - rows["goal"], axis=1) <= 0.5
    assert np.array_equal(rows["rewards"][:-1], near) and np.array_equal(rows["rewards"], rows["terminals"])
    assert rows["rewards"].dtype == np.float32 and timeouts.dtype == bool
    changes = np.flatnonzero((np.diff(rows["goals"], axis=0) != 0).any(1))
    assert changes.tolist() == np.flatnonzero(timeouts[:-1]).tolist()
    assert np.abs(rows["actions"]).max() <= 1 and 0 < rows["rewards"].sum() < 1400
    drawn = regenerate("antmaze-umaze-v2", policies, steps=1500)
    assert all(np.array_equal(drawn[key], rows[key]) for key in ("observations", "actions", "goals"))
    assert (drawn["goal"] > [0, 8]).all() and (drawn["goal"] < [1.5, 9.5]).all()
    again = regenerate("antmaze-umaze-v2", policies, steps=1500)
    assert all(x.tobytes() == again[key].tobytes() for key, x in drawn.items())
    other = regenerate("antmaze-umaze-v2", policies, steps=1500, seed=5)
    assert not np.array_equal(rows["observations"], other["observations"])
    assert {path.name for path in policies.glob("out*")} == {"out.hdf5"}


@published
def test_d4rls_ant_arrives(tmp_path):
    args = d4rl.Args("antmaze-umaze-v2", str(POLICIES), out=str(tmp_path / "out.hdf5"), steps=1500)
    columns, attributes = d4rl.collect_maze(args)
    xy = np.array(columns["observations"])[:, :2]
    to_goal = np.linalg.norm(xy - np.array(columns["infos/goal"]), axis=1)
    assert to_goal[:701].min() < 1 and to_goal[0] > 7 and columns["rewards"].sum() > 0
    assert np.abs(attributes["goal"] - [0.75, 8.75]).max() <= 0.75


def test_rows_of_a_robot_in_equal_parts(policies):
    rows = regenerate("hopper-medium-v2", policies, sac=("a", "b"), steps=401)
    s, next_s, timeouts = rows["observations"], rows["next_observations"], rows["timeouts"]
    assert len(s) == 400 and (timeouts[199] or rows["terminals"][199])
    inside = ~(timeouts | rows["terminals"])
    assert np.array_equal(s[1:][inside[:-1]], next_s[:-1][inside[:-1]])
    assert not (timeouts & rows["terminals"]).any() and rows["terminals"].any() and inside[-1] == 0
    first = regenerate("hopper-medium-v2", policies, sac=("a",), steps=200)
    assert np.array_equal(first["actions"], rows["actions"][:200])
    args = d4rl.dmg.Args(env_id="hopper-medium-v2", dataset_path=str(policies / "out.hdf5"))
    batch, _, _ = d4rl.dmg.load_dataset(args)
    assert len(batch.rewards) == 200 - first["timeouts"].sum() - (1 - first["timeouts"][-1])


def test_published_pickles_are_read_and_run_nothing(tmp_path):
    """deep_ope's dict of arrays, torch 1.x's format of D4RL's ant, and one that names foreign code."""
    arrays = weights(29, 8)
    named = {key.replace("__", "/"): x for key, x in arrays.items()} | {"nonlinearity": "relu"}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(named, 2).replace(b"numpy._core", b"numpy.core"))
    net = torch.nn.Module()
    for key in ("fc0", "fc1", "last_fc", "last_fc_log_std"):
        layer = torch.nn.Linear(*arrays[f"{key}__weight"].shape[::-1])
        layer.weight.data = torch.from_numpy(arrays[f"{key}__weight"])
        layer.bias.data = torch.from_numpy(arrays[f"{key}__bias"])
        net.add_module(key, layer)
    saved = {"exploration/policy": net}
    torch.save(saved, tmp_path / "ant_hierarch_pol.pkl", _use_new_zipfile_serialization=False)
    for names in (["a"], ["ant_goal", "ant_hierarch_pol"]):
        np.testing.assert_equal(dict(d4rl.read_policy(tmp_path, *names)), arrays)

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"fc0/weight": np.ones((1, 1)), "evil": Evil()}, 2))
    pickle.loads((tmp_path / "evil.pkl").read_bytes())
    assert (tmp_path / "ran").exists()  # a plain reader runs it
    (tmp_path / "ran").unlink()
    with pytest.raises(Exception):  # noqa: B017  an array is missing or the pickle is refused
        d4rl.sample(d4rl.read_policy(tmp_path, "evil"), np.zeros(1), None)
    assert not (tmp_path / "ran").exists()


def test_wrong_input_is_named(tmp_path):
    for name, sac in (("hopper-medium-v2", ()), ("antmaze-umaze-v2", ("a",)), ("Hopper-v4", ("a",))):
        with pytest.raises(d4rl.dmg.InputError, match=name):
            d4rl.Args(name, str(tmp_path), sac)
    with pytest.raises(d4rl.dmg.InputError, match="ant_hierarch_pol"):
        d4rl.regenerate(d4rl.Args("antmaze-umaze-v2", str(tmp_path)))
