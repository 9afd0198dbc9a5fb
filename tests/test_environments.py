"""The evaluation environments: D4RL's physics where the name is D4RL's, stock Gymnasium elsewhere."""

import tempfile
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import regenerate_d4rl as d4rl

import dmg_offline
from dmg_offline import Args, evaluate, make_env

# D4RL's evaluation maps (d4rl/locomotion/maze_env.py), rows from top to bottom
MAPS = {
    "umaze": "11111 1r001 11101 1g001 11111",
    "medium": "11111111 1r011001 10010001 11000111 10010001 10100101 100010g1 11111111",
    "large": "111111111111 1r0001000001 101101010101 100000010001 101111011101 100101000001 110101010111"
    " 100100010g01 111111111111",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*settotalmass")  # in HalfCheetah's own XML


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # Gymnasium-Robotics leaves its XML there
    Path("own.hdf5").touch()


def make(env_id, dataset_path=None):
    return make_env(Args(env_id, dataset_path))


def at(model, qpos):
    """MuJoCo's data at qpos and its mass matrix there."""
    data = mujoco.MjData(model)
    data.qpos[:] = qpos
    mujoco.mj_forward(model, data)
    mujoco.mj_fullM(model, data, matrix := np.zeros((model.nv, model.nv)))
    return data, matrix


def legacy_mass_matrix(model, qpos, density, total_mass):
    """Mass matrix, inverse weights of the dofs, geom by geom. Capsules are cylinders, longer by a radius."""
    (data, _), matrix, whole = at(model, qpos), np.zeros((model.nv, model.nv)), 0
    for g in np.flatnonzero(model.geom_bodyid > 0):
        (r, h, _), body, rotation = model.geom_size[g], model.geom_bodyid[g], data.geom_xmat[g].reshape(3, 3)
        length, mass, moments = 2 * h + r, density * 4 / 3 * np.pi * r**3, [2 / 5 * r**2] * 3  # of a sphere
        if model.geom_type[g] == mujoco.mjtGeom.mjGEOM_CAPSULE:
            across, mass = (3 * r**2 + length**2) / 12, density * np.pi * r**2 * length
            moments = [across, across, r**2 / 2]
        inertia = mass * np.diag(moments)
        linear, angular = np.zeros((2, 3, model.nv))
        mujoco.mj_jac(model, data, linear, angular, data.geom_xpos[g], body)
        matrix += mass * linear.T @ linear + angular.T @ rotation @ inertia @ rotation.T @ angular
        whole += mass
    matrix = matrix * (total_mass or whole) / whole + np.diag(model.dof_armature)
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
    qpos[3:7] /= np.linalg.norm(qpos[3:7]) if stock.nq > stock.nv else 1
    expected, _ = legacy_mass_matrix(stock, qpos, density, total_mass)
    np.testing.assert_allclose(at(model, qpos)[1], expected, rtol=0, atol=1e-12 * abs(expected).max())
    assert np.abs(at(stock, qpos)[1] - expected).max() > difference
    _, dof_weight = legacy_mass_matrix(stock, stock.qpos0, density, total_mass)  # mj_setConst renews them
    np.testing.assert_allclose(model.dof_invweight0, dof_weight, rtol=1e-9)
    assert np.abs(stock.dof_invweight0 / dof_weight - 1).max() > 0.005


@pytest.mark.parametrize("stock_id", ["Hopper-v4", "Walker2d-v4", "HalfCheetah-v4"])
def test_only_d4rl_names_get_legacy_physics_and_nothing_else_differs(stock_id):
    """With the same inertia and margins the same episode to the bit, of 1000 steps at most."""
    env, stock = make(f"{stock_id[:-3].lower()}-medium-v2"), gym.make(stock_id)
    own, model = make(stock_id, "own.hdf5"), stock.unwrapped.model
    for field in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        np.testing.assert_array_equal(getattr(own.unwrapped.model, field), getattr(model, field), field)
        getattr(model, field)[:] = getattr(env.unwrapped.model, field)
    mujoco.mj_setConst(model, mujoco.MjData(model))
    np.testing.assert_array_equal(own.unwrapped.model.geom_margin, model.geom_margin)
    model.geom_margin[model.geom_bodyid > 0] = 0
    assert env.action_space == stock.action_space and env.observation_space == stock.observation_space
    np.testing.assert_array_equal(env.reset(seed=3)[0], stock.reset(seed=3)[0])
    rng, over, steps = np.random.default_rng(0), False, 0
    while not over:
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        (s, *found, _), (expected_s, *expected, _) = env.step(action), stock.step(action)
        np.testing.assert_array_equal(s, expected_s)
        assert found == expected
        over, steps = any(found[1:]), steps + 1
    assert (steps == 1000) == (stock_id == "HalfCheetah-v4")


@pytest.mark.parametrize("name, margin", [("antmaze-umaze-v2", 0.01), ("hopper-medium-v2", 0.001)])
def test_a_contact_begins_at_the_margin_of_the_xml_file(name, margin):
    """MuJoCo before 3.5 took the larger margin of two geoms; their sum lifts the ant by a centimetre."""
    env = make(name).unwrapped
    env.reset(seed=0)
    for _ in range(20):
        env.step(np.zeros(env.action_space.shape, np.float32))
    assert env.data.ncon and set(env.data.contact.includemargin) == {margin}


@pytest.mark.parametrize("name, tolerance", [
    ("hopper-medium-v2", 1e-9),
    ("walker2d-medium-v2", 1e-9),
    ("halfcheetah-medium-v2", 1e-9),
    ("antmaze-umaze-v2", 1e-3),  # MuJoCo 4.0 turns a free body otherwise than 2.1.0 to 3.17
])  # fmt: skip
def test_a_step_is_that_of_mujoco_210(name, tolerance):
    """20 states and actions, and the next states by MuJoCo 2.1.0's own library (benchmark/mujoco210.c)."""
    env = make(name).unwrapped
    differences = []
    for row in np.load(Path(__file__).with_name("mujoco_210.npz"))[name]:
        qpos, qvel, ctrl, expected = np.split(row, np.cumsum([env.model.nq, env.model.nv, env.model.nu]))
        env.set_state(qpos, qvel)
        env.do_simulation(ctrl, env.frame_skip)
        differences.append(np.abs(env.state_vector() - expected).max())
    assert np.quantile(differences, 0.9) < tolerance


@pytest.mark.parametrize("name", [name for name in dmg_offline.D4RL_FILES if "antmaze" in name])
def test_antmaze_map_and_time_limit(name):
    env, maze = make(name), name.split("-")[1]
    limit, cells = 700 if maze == "umaze" else 1000, np.array([list(row) for row in MAPS[maze].split()])
    xy = lambda letter: [(4.0 * (j - 1), 4.0 * (i - 1)) for i, j in np.argwhere(cells == letter)]  # noqa: E731
    walls = (model := env.unwrapped.model).geom_type == mujoco.mjtGeom.mjGEOM_BOX
    assert sorted(map(tuple, model.geom_pos[walls, :2])) == sorted(xy("1"))
    assert (model.geom_pos[walls, 2] == 1).all() and (model.geom_bodyid[walls] == 0).all()
    assert (model.geom_size[walls] == (2, 2, 1)).all()
    observation, offset = env.reset(seed=0)[0], env.unwrapped.goal - xy("g")[0]
    assert np.abs(observation[:2] - xy("r")[0]).max() <= 0.1 and (offset >= 0).all() and (offset <= 1.5).all()
    for step in range(1, limit + 1):
        assert env.step(np.zeros(8, np.float32))[1:4] == (0, False, step == limit)


def test_antmaze_interface():
    env = make("antmaze-umaze-v2")
    assert env.observation_space.shape == (29,) and env.action_space == gym.spaces.Box(-1, 1, (8,))
    env.reset(seed=0)
    observation, data = env.step(np.ones(8, np.float32))[0], env.unwrapped.data
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
    np.testing.assert_array_equal([*env.reset(seed=7)[0], *env.goal], [*observations[0], *goals[0]])


@pytest.mark.parametrize("angle", [0, 2, 4])
@pytest.mark.parametrize("distance, speed, reached", [(0.51, -1, True), (0.49, 1, False)])
def test_antmaze_ends_where_a_step_ends_within_half_a_metre_of_the_goal(angle, distance, speed, reached):
    env = make("antmaze-umaze-v2").unwrapped
    env.reset(seed=1)
    direction, qvel = np.array([np.cos(angle), np.sin(angle)]), np.zeros(14)
    qpos = np.array([0, 0, 4, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1.0])  # above the walls: falls straight
    qpos[:2], qvel[:2] = env.goal + distance * direction, speed * direction  # moves away, or to the goal
    env.set_state(qpos, qvel)
    assert env.step(np.zeros(8))[1:4] == (float(reached), reached, False)


def test_gymnasium_robotics_antmaze_is_flat_and_ends_at_the_goal():
    env = make("gymnasium_robotics:AntMaze_UMaze-v5", "own.hdf5")
    flat, u = env.reset(seed=0)[0], env.unwrapped
    np.testing.assert_array_equal(flat[:31], [*u.data.qpos[:2], *u.goal, *u.data.qpos[2:], *u.data.qvel])
    assert env.step(np.zeros(8, np.float32))[1:4] == (0, False, False)
    u.goal = u.data.qpos[:2].copy()
    assert env.step(np.zeros(8, np.float32))[1:4] == (1, True, False)


POLICIES = Path(dmg_offline.__file__).resolve().parent.parent / "shared" / "policies"


@pytest.mark.skipif(not POLICIES.exists(), reason="D4RL's policies are not here (../shared/policies)")
@pytest.mark.parametrize("name, env_id, mean, std, same", [
    ("hopper_online_10", "hopper-medium-v2", 1290.8, 86.3, True),
    ("hopper_online_10", "Hopper-v4", 1290.8, 86.3, False),
    ("halfcheetah_online_10", "halfcheetah-medium-v2", 12695.7, 210.0, True),
])  # fmt: skip
def test_d4rls_own_policies_return_what_was_published_for_them(name, env_id, mean, std, same):
    """Within three standard errors, 100 published episodes, 10 sampled here; stock Hopper is another."""
    weights, rng = d4rl.read_policy(POLICIES, name), np.random.default_rng(0)
    envs = [make(env_id, "own.hdf5") for _ in range(10)]
    returns, _ = evaluate(lambda s: d4rl.sample(weights, s, rng, lowest=-5), envs, 0)
    error = np.sqrt(returns.var(ddof=1) / 10 + std**2 / 100)
    assert (abs(returns.mean() - mean) < 3 * error) == same
