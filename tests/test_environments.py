"""The evaluation environments: D4RL's physics where the name is D4RL's, stock Gymnasium elsewhere."""

import tempfile
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest

import dmg_offline
from dmg_offline import Args, make_env

# D4RL's evaluation maps (d4rl/locomotion/maze_env.py), rows from top to bottom
MAPS = {
    "umaze": "11111 1r001 11101 1g001 11111",
    "medium": "11111111 1r011001 10010001 11000111 10010001 10100101 100010g1 11111111",
    "large": "111111111111 1r0001000001 101101010101 100000010001 101111011101 100101000001 110101010111"
    " 100100010g01 111111111111",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*settotalmass")  # in HalfCheetah's own XML
STANDING = np.array([0, 0, 4, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1.0])  # above the walls: falls straight


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """MuJoCo leaves a log in the working folder, Gymnasium-Robotics its XML in the temporary one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def make(env_id, dataset_path=None):
    return make_env(Args(env_id=env_id, dataset_path=dataset_path))


def xy(cell):
    """Where D4RL puts the centre of a map cell (i, j)."""
    return 4.0 * (cell[1] - 1), 4.0 * (cell[0] - 1)


def at(model, qpos):
    """MuJoCo's data at qpos and its mass matrix there."""
    data = mujoco.MjData(model)
    data.qpos[:] = qpos
    mujoco.mj_forward(model, data)
    mujoco.mj_fullM(model, data, matrix := np.zeros((model.nv, model.nv)))
    return data, matrix


def legacy_mass_matrix(model, qpos, density, total_mass):
    """Mass matrix at qpos, and inverse weights of the dofs there, summed geom by geom.

    A capsule of radius r and half-length h is a cylinder of length 2 h + r.
    """
    (data, _), matrix, whole = at(model, qpos), np.zeros((model.nv, model.nv)), 0
    for g in np.flatnonzero(model.geom_bodyid > 0):
        (r, h, _), body, rotation = model.geom_size[g], model.geom_bodyid[g], data.geom_xmat[g].reshape(3, 3)
        if model.geom_type[g] == mujoco.mjtGeom.mjGEOM_CAPSULE:
            length = 2 * h + r
            mass = density * np.pi * r**2 * length
            across = (3 * r**2 + length**2) / 12
            inertia = mass * np.diag([across, across, r**2 / 2])
        else:
            assert model.geom_type[g] == mujoco.mjtGeom.mjGEOM_SPHERE
            mass = density * 4 / 3 * np.pi * r**3
            inertia = mass * 2 / 5 * r**2 * np.eye(3)
        linear, angular = np.zeros((2, 3, model.nv))
        mujoco.mj_jac(model, data, linear, angular, data.geom_xpos[g], body)
        matrix += mass * linear.T @ linear + angular.T @ rotation @ inertia @ rotation.T @ angular
        whole += mass
    scale = total_mass / whole if total_mass else 1
    matrix = scale * matrix + np.diag(model.dof_armature)
    dof_weight = np.linalg.inv(matrix).diagonal().copy()
    if model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE:  # its three axes share one weight
        dof_weight[:6] = np.repeat(dof_weight[:6].reshape(2, 3).mean(1), 3)
    return matrix, dof_weight


@pytest.mark.parametrize("env_id, stock_id, density, total_mass, difference", [
    ("hopper-medium-replay-v2", "Hopper-v4", 1000, None, 0.3),
    ("walker2d-medium-v2", "Walker2d-v4", 1000, None, 0.3),
    ("halfcheetah-medium-expert-v2", "HalfCheetah-v4", 1000, 14, 0.01),
    ("antmaze-medium-play-v2", "Ant-v4", 5, None, 0.01),
])  # fmt: skip
def test_mass_matrix_is_the_legacy_one(env_id, stock_id, density, total_mass, difference):
    model, stock = make(env_id).unwrapped.model, gym.make(stock_id).unwrapped.model
    qpos = stock.qpos0 + np.random.default_rng(0).uniform(-0.5, 0.5, stock.nq)
    if stock.nq > stock.nv:
        qpos[3:7] /= np.linalg.norm(qpos[3:7])
    expected, _ = legacy_mass_matrix(stock, qpos, density, total_mass)
    np.testing.assert_allclose(at(model, qpos)[1], expected, rtol=0, atol=1e-12 * abs(expected).max())
    assert np.abs(at(stock, qpos)[1] - expected).max() > difference

    # the contact solver's weights, which only mj_setConst renews
    _, dof_weight = legacy_mass_matrix(stock, stock.qpos0, density, total_mass)
    np.testing.assert_allclose(model.dof_invweight0, dof_weight, rtol=1e-9)
    assert np.abs(stock.dof_invweight0 / dof_weight - 1).max() > 0.005


def test_only_d4rl_names_get_legacy_inertia_and_nothing_else_differs():
    stock, own = gym.make("Hopper-v4"), make("Hopper-v4", "own.hdf5").unwrapped.model
    d4rl = make("hopper-medium-v2", "own.hdf5")
    assert d4rl.spec.id == stock.spec.id and d4rl.spec.max_episode_steps == 1000
    stock, d4rl = stock.unwrapped.model, d4rl.unwrapped.model
    for name in ("body_mass", "body_inertia", "body_ipos", "body_iquat", "dof_invweight0", "body_invweight0"):
        np.testing.assert_array_equal(getattr(own, name), getattr(stock, name), name)
    for name in ("geom_size", "geom_pos", "geom_quat", "geom_friction", "jnt_range", "actuator_gear"):
        np.testing.assert_array_equal(getattr(d4rl, name), getattr(stock, name), name)
    assert d4rl.body_mass.sum() < 0.97 * stock.body_mass.sum()


def place(env, distance, angle, speed=0.0):
    """The ant `distance` from the goal, at rest or moving away from it."""
    direction = np.array([np.cos(angle), np.sin(angle)])
    qpos, qvel = STANDING.copy(), np.zeros(14)
    qpos[:2], qvel[:2] = env.goal + distance * direction, speed * direction
    env.set_state(qpos, qvel)
    return env.step(np.zeros(8))


@pytest.mark.parametrize("name", [name for name in dmg_offline.D4RL_SHA256 if "antmaze" in name])
def test_antmaze_map_and_time_limit(name):
    env, maze = make(name), name.split("-")[1]
    limit, cells = 700 if maze == "umaze" else 1000, np.array([list(row) for row in MAPS[maze].split()])
    model = env.unwrapped.model
    walls = model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    expected = sorted(xy(cell) for cell in np.argwhere(cells == "1"))
    assert sorted(map(tuple, model.geom_pos[walls, :2])) == expected and (model.geom_pos[walls, 2] == 1).all()
    assert (model.geom_size[walls] == (2, 2, 1)).all() and (model.geom_bodyid[walls] == 0).all()

    start, goal = (np.array(xy(np.argwhere(cells == letter)[0])) for letter in "rg")
    observation, _ = env.reset(seed=0)
    offset = env.unwrapped.goal - goal
    assert np.abs(observation[:2] - start).max() <= 0.1 and (offset >= 0).all() and (offset <= 1.5).all()

    for step in range(1, limit + 1):
        observation, reward, terminated, truncated, _ = env.step(np.zeros(8, np.float32))
        assert (reward, terminated, truncated) == (0, False, step == limit)


def test_antmaze_interface():
    env = make("antmaze-umaze-v2")
    assert env.observation_space.shape == (29,) and env.action_space == gym.spaces.Box(-1, 1, (8,))
    env.reset(seed=0)
    observation, *_ = env.step(np.ones(8, np.float32))
    data = env.unwrapped.data
    np.testing.assert_array_equal(observation, np.concatenate([data.qpos, data.qvel]))
    np.testing.assert_array_equal(data.qfrc_actuator[6:], np.full(8, 30))  # N m, one motor per joint
    assert (env.unwrapped.model.geom_solimp[:, :3] == [0.8, 0.8, 0.01]).all()
    assert data.time == pytest.approx(0.1) and env.unwrapped.dt == pytest.approx(0.1)


def test_antmaze_reset():
    env = make("antmaze-large-play-v2").unwrapped
    resets = [(env.reset(seed=None if k else 7)[0], env.goal) for k in range(1000)]
    observations, goals = zip(*resets, strict=True)
    qpos, qvel = np.split(np.array(observations), [15], axis=1)
    noise = qpos - [0, 0, 0.75, 1, *np.zeros(11)]
    assert np.abs(noise).max() <= 0.1 and (np.abs(noise).max(0) > 0.095).all()  # uniform, in every coordinate
    np.testing.assert_allclose(qvel.std(0), 0.1, atol=0.01)
    assert np.abs(qvel.mean(0)).max() < 0.015 and np.abs(qvel).max() > 0.3  # normal

    offset = np.array(goals) - (32, 24)  # U(0, 1) + U(0, 0.5) per axis
    assert (offset >= 0).all() and (offset <= 1.5).all() and len(np.unique(offset)) == 2000
    np.testing.assert_allclose(offset.mean(0), 0.75, atol=0.04)
    np.testing.assert_allclose(offset.std(0), np.sqrt((1 + 0.25) / 12), atol=0.03)

    np.testing.assert_array_equal(env.reset(seed=7)[0], observations[0])
    np.testing.assert_array_equal(env.goal, goals[0])


@pytest.mark.parametrize("angle", [0, 2, 4])
def test_antmaze_ends_within_half_a_metre_of_the_goal(angle):
    env = make("antmaze-umaze-v2").unwrapped
    env.reset(seed=1)
    assert place(env, 0.51, angle, speed=-1)[1:4] == (1, True, False)  # what counts is where it ends
    assert place(env, 0.49, angle, speed=1)[1:4] == (0, False, False)


def test_gymnasium_robotics_antmaze_is_flat_and_ends_at_the_goal():
    env = make("AntMaze_UMaze-v5", "any.hdf5")
    flat, _ = env.reset(seed=0)
    u = env.unwrapped
    np.testing.assert_array_equal(flat[:4], [*u.data.qpos[:2], *u.goal])
    np.testing.assert_array_equal(flat[4:31], [*u.data.qpos[2:], *u.data.qvel])
    assert env.step(np.zeros(8, np.float32))[1:4] == (0, False, False)
    u.goal = u.data.qpos[:2].copy()
    assert env.step(np.zeros(8, np.float32))[1:4] == (1, True, False)


POLICIES = Path(dmg_offline.__file__).resolve().parent.parent / "shared" / "policies"
PUBLISHED = {"hopper_online_10": (1290.8, 86.3), "halfcheetah_online_10": (12695.7, 210.0)}  # 100 episodes


def distance_from_published(name, env, episodes=10):
    """Standard errors between the published mean return of a policy and that of sampled episodes here."""
    if not POLICIES.exists():
        pytest.skip("D4RL's policies are not here (../shared/policies)")
    weights = dict(np.load(POLICIES / f"{name}.npz"))
    rng, returns = np.random.default_rng(0), np.zeros(episodes)

    def layer(key, x):
        return weights[f"{key}__weight"] @ x + weights[f"{key}__bias"]

    for i in range(episodes):
        (s, _), over = env.reset(seed=i), False
        while not over:
            hidden = np.maximum(layer("fc1", np.maximum(layer("fc0", s), 0)), 0)
            std = np.exp(np.clip(layer("last_fc_log_std", hidden), -5, 2))
            action = np.tanh(layer("last_fc", hidden) + std * rng.standard_normal(len(std)))
            s, reward, terminated, truncated, _ = env.step(action)
            returns[i] += reward
            over = terminated or truncated
    mean, std = PUBLISHED[name]
    return abs(returns.mean() - mean) / np.sqrt(returns.var(ddof=1) / episodes + std**2 / 100)


@pytest.mark.parametrize("robot", ["hopper", "halfcheetah"])
def test_d4rls_own_policies_return_what_was_published_for_them_but_not_in_stock_hopper(robot):
    assert distance_from_published(f"{robot}_online_10", make(f"{robot}-medium-v2")) < 3
    if robot == "hopper":
        assert distance_from_published("hopper_online_10", gym.make("Hopper-v4")) > 3
