"""The evaluation environments: D4RL's physics where the name is D4RL's, stock Gymnasium elsewhere."""

import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest

import dmg_offline
from dmg_offline import Args, D4RLAntMaze, InputError, make_env

# D4RL's evaluation maps (d4rl/locomotion/maze_env.py), rows from top to bottom
MAPS = {
    "umaze": "11111 1r001 11101 1g001 11111",
    "medium": "11111111 1r011001 10010001 11000111 10010001 10100101 100010g1 11111111",
    "large": "111111111111 1r0001000001 101101010101 100000010001 101111011101 100101000001 110101010111"
    " 100100010g01 111111111111",
}
MAPS = {maze: np.array([list(row) for row in text.split()]) for maze, text in MAPS.items()}
pytestmark = pytest.mark.filterwarnings("ignore:.*settotalmass")  # in HalfCheetah's own XML
STANDING = np.array(
    [0, 0, 4, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1.0]
)  # above the walls: it falls straight down


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """MuJoCo leaves a log in the working folder, Gymnasium-Robotics its XML in the temporary one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def make(env_id, dataset_path=None):
    return make_env(Args(env_id=env_id, dataset_path=dataset_path))


def xy(cell):
    """Where D4RL puts the centre of a map cell (i, j)."""
    i, j = cell
    return 4.0 * (j - 1), 4.0 * (i - 1)


# ---- legacy inertia ----
def test_masses_of_mujoco_2_1_0():
    np.testing.assert_allclose(
        make("hopper-medium-v2").unwrapped.model.body_mass[1:], [3.5343, 3.9270, 2.7143, 5.0894], atol=5e-5
    )
    assert make("walker2d-expert-v2").unwrapped.model.body_mass.sum() == pytest.approx(22.698, abs=5e-4)
    assert make("halfcheetah-random-v2").unwrapped.model.body_mass.sum() == pytest.approx(14)
    assert make("antmaze-umaze-v2").unwrapped.model.body_mass.sum() == pytest.approx(0.8787, abs=5e-5)


def legacy_mass_matrix(model, qpos, density, total_mass):
    """Mass matrix at qpos, and inverse weights of dofs and bodies there, summed geom by geom.

    A capsule of radius r and half-length h is a cylinder of length 2 h + r.
    """
    data = mujoco.MjData(model)
    data.qpos[:] = qpos
    mujoco.mj_forward(model, data)

    def jacobian(point, body):
        jac = np.zeros((2, 3, model.nv))
        mujoco.mj_jac(model, data, jac[0], jac[1], point, body)
        return jac

    matrix, masses, moments = (
        np.zeros((model.nv, model.nv)),
        np.zeros(model.nbody),
        np.zeros((model.nbody, 3)),
    )
    for g in np.flatnonzero(model.geom_bodyid > 0):
        (r, h, _), body, rotation = model.geom_size[g], model.geom_bodyid[g], data.geom_xmat[g].reshape(3, 3)
        if model.geom_type[g] == mujoco.mjtGeom.mjGEOM_CAPSULE:
            length = 2 * h + r
            mass = density * np.pi * r**2 * length
            inertia = mass * np.diag([(3 * r**2 + length**2) / 12, (3 * r**2 + length**2) / 12, r**2 / 2])
        else:
            assert model.geom_type[g] == mujoco.mjtGeom.mjGEOM_SPHERE
            mass = density * 4 / 3 * np.pi * r**3
            inertia = mass * 2 / 5 * r**2 * np.eye(3)
        linear, angular = jacobian(data.geom_xpos[g], body)
        matrix += mass * linear.T @ linear + angular.T @ rotation @ inertia @ rotation.T @ angular
        masses[body] += mass
        moments[body] += mass * data.geom_xpos[g]
    scale = total_mass / masses.sum() if total_mass else 1
    matrix = scale * matrix + np.diag(model.dof_armature)

    inverse = np.linalg.inv(matrix)
    dof_weight = inverse.diagonal().copy()
    if model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE:  # its three axes share one weight
        dof_weight[:6] = np.repeat(dof_weight[:6].reshape(2, 3).mean(1), 3)
    body_weight = np.zeros((model.nbody, 2))
    for body in range(1, model.nbody):
        for k, jac in enumerate(jacobian(moments[body] / masses[body], body)):
            body_weight[body, k] = np.trace(jac @ inverse @ jac.T) / 3
    return matrix, dof_weight, body_weight


def mass_matrix(model, qpos):
    data = mujoco.MjData(model)
    data.qpos[:] = qpos
    mujoco.mj_forward(model, data)
    matrix = np.zeros((model.nv, model.nv))
    mujoco.mj_fullM(model, data, matrix)
    return matrix


@pytest.mark.parametrize(
    "env_id, stock_id, density, total_mass, difference",
    [
        ("hopper-medium-replay-v2", "Hopper-v4", 1000, None, 0.3),
        ("walker2d-medium-v2", "Walker2d-v4", 1000, None, 0.3),
        ("halfcheetah-medium-expert-v2", "HalfCheetah-v4", 1000, 14, 0.01),
        ("antmaze-medium-play-v2", "Ant-v4", 5, None, 0.01),
    ],
)
def test_mass_matrix_is_the_legacy_one(env_id, stock_id, density, total_mass, difference):
    model, stock = make(env_id).unwrapped.model, gym.make(stock_id).unwrapped.model
    qpos = stock.qpos0 + np.random.default_rng(0).uniform(-0.5, 0.5, stock.nq)
    if stock.nq > stock.nv:
        qpos[3:7] /= np.linalg.norm(qpos[3:7])
    expected, *_ = legacy_mass_matrix(stock, qpos, density, total_mass)
    np.testing.assert_allclose(
        mass_matrix(model, qpos), expected, rtol=0, atol=1e-12 * np.abs(expected).max()
    )
    assert np.abs(mass_matrix(stock, qpos) - expected).max() > difference

    # the contact solver's weights, which only mj_setConst renews
    _, dof_weight, body_weight = legacy_mass_matrix(stock, stock.qpos0, density, total_mass)
    np.testing.assert_allclose(model.dof_invweight0, dof_weight, rtol=1e-9)
    np.testing.assert_allclose(model.body_invweight0, body_weight, rtol=1e-9)
    assert np.abs(stock.body_invweight0 / np.maximum(body_weight, 1e-9) - 1)[1:].max() > 0.005


@pytest.mark.parametrize("family", ["HalfCheetah", "Hopper", "Walker2d"])
def test_only_inertia_differs_from_stock(family):
    env, stock = make(f"{family.lower()}-medium-v2"), gym.make(f"{family}-v4")
    assert env.spec.id == stock.spec.id and env.spec.max_episode_steps == 1000
    for name in (
        "geom_type",
        "geom_size",
        "geom_pos",
        "geom_quat",
        "geom_friction",
        "jnt_range",
        "actuator_gear",
    ):
        np.testing.assert_array_equal(
            getattr(env.unwrapped.model, name), getattr(stock.unwrapped.model, name), name
        )


def test_only_d4rl_names_get_legacy_inertia():
    stock = gym.make("Hopper-v4").unwrapped.model
    own = make("Hopper-v4", "own.hdf5").unwrapped.model
    for name in ("body_mass", "body_inertia", "body_ipos", "body_iquat", "dof_invweight0", "body_invweight0"):
        np.testing.assert_array_equal(getattr(own, name), getattr(stock, name), name)
    d4rl = make("hopper-medium-v2", "own.hdf5").unwrapped.model
    assert d4rl.body_mass.sum() < 0.97 * stock.body_mass.sum()


# ---- D4RL's AntMaze ----
def place(env, distance, angle, speed=0.0):
    """The ant `distance` from the goal, at rest or moving away from it."""
    direction = np.array([np.cos(angle), np.sin(angle)])
    qpos, qvel = STANDING.copy(), np.zeros(14)
    qpos[:2], qvel[:2] = env.goal + distance * direction, speed * direction
    env.set_state(qpos, qvel)
    return env.step(np.zeros(8))


@pytest.mark.parametrize("name", dmg_offline.D4RL_MAZES)
def test_antmaze_map_and_time_limit(name):
    env, maze = make(name), name.split("-")[1]
    limit = 700 if maze == "umaze" else 1000
    model, walls = env.unwrapped.model, env.unwrapped.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    expected = sorted(xy(cell) for cell in np.argwhere(MAPS[maze] == "1"))
    assert sorted(map(tuple, model.geom_pos[walls, :2])) == expected
    assert (model.geom_pos[walls, 2] == 1).all() and (model.geom_size[walls] == (2, 2, 1)).all()
    assert (model.geom_bodyid[walls] == 0).all()

    start, goal = (np.array(xy(np.argwhere(MAPS[maze] == letter)[0])) for letter in "rg")
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
    assert data.time == pytest.approx(0.1) and env.unwrapped.dt == pytest.approx(0.1)


def test_antmaze_reset():
    env = make("antmaze-large-play-v2").unwrapped
    observations, goals = [], []
    for k in range(1000):
        observations.append(env.reset(seed=7 if k == 0 else None)[0])
        goals.append(env.goal)
        np.testing.assert_array_equal(observations[-1], np.concatenate([env.data.qpos, env.data.qvel]))
        assert (env.model.site("goal").pos[:2] == env.goal).all()
    qpos, qvel = np.split(np.array(observations), [15], axis=1)
    noise = qpos - [0, 0, 0.75, 1, *np.zeros(11)]
    assert np.abs(noise).max() <= 0.1 and (np.abs(noise).max(0) > 0.095).all()  # uniform, in every coordinate
    assert np.abs(noise.mean(0)).max() < 0.01
    np.testing.assert_allclose(qvel.std(0), 0.1, atol=0.01)
    assert np.abs(qvel.mean(0)).max() < 0.015 and np.abs(qvel).max() > 0.3  # normal

    offset = np.array(goals) - (32, 24)  # U(0, 1) + U(0, 0.5) per axis
    assert (offset >= 0).all() and (offset <= 1.5).all() and len(np.unique(offset)) == 2000
    np.testing.assert_allclose(offset.mean(0), 0.75, atol=0.04)
    np.testing.assert_allclose(offset.std(0), np.sqrt((1 + 0.25) / 12), atol=0.03)
    assert abs(np.corrcoef(offset.T)[0, 1]) < 0.15

    again, _ = env.reset(seed=7)
    np.testing.assert_array_equal(again, observations[0])
    np.testing.assert_array_equal(env.goal, goals[0])
    env.reset()
    np.testing.assert_array_equal(env.goal, goals[1])


@pytest.mark.parametrize("angle", np.linspace(0, 2 * np.pi, 7))
def test_antmaze_ends_within_half_a_metre_of_the_goal(angle):
    env = make("antmaze-umaze-v2").unwrapped
    env.reset(seed=1)
    assert place(env, 0.49, angle)[1:4] == (1, True, False)
    assert place(env, 0.51, angle)[1:4] == (0, False, False)
    # what counts is where the ant stands after the step
    assert place(env, 0.51, angle, speed=-1)[1:4] == (1, True, False)
    assert place(env, 0.49, angle, speed=1)[1:4] == (0, False, False)


# ---- D4RL's AntMaze against the same physics from Gymnasium-Robotics ----
@pytest.fixture
def recipe(tmp_path):
    """Gymnasium-Robotics' AntMaze with D4RL's XML values and its map upside down; centred on the map."""
    import gymnasium_robotics  # noqa: F401

    def build(maze):
        tree = ET.parse(gym.make("Ant-v4").unwrapped.fullpath)
        tree.find("option").set("timestep", "0.02")
        tree.find("default/geom").set("solimp", ".8 .8 .01")
        for motor in tree.findall("actuator/motor"):
            motor.set("gear", "30")
        tree.write(tmp_path / "ant.xml")
        name = {"umaze": "UMaze", "medium": "Medium", "large": "Large"}[maze]
        return gym.make(
            f"AntMaze_{name}-v5",
            maze_map=[[int(cell == "1") for cell in row] for row in MAPS[maze][::-1]],
            xml_file=str(tmp_path / "ant.xml"),
            include_cfrc_ext_in_observation=False,
        ).unwrapped

    return build


def arrays(model):
    """All that defines the physics but for the frame's origin, walls in the order of their position."""
    kinds = "body", "jnt", "dof", "geom", "actuator"
    names = {name for name in dir(model) if name.split("_")[0] in kinds} - {"geom_rgba", "geom_matid"}
    result = {name: getattr(model, name) for name in names if isinstance(getattr(model, name), np.ndarray)}
    result |= {name: np.asarray(getattr(model.opt, name)) for name in dir(model.opt) if name[0] != "_"}
    walls = np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_BOX)
    walls = walls[np.lexsort(model.geom_pos[walls].T)]
    order = np.concatenate([np.flatnonzero(model.geom_type != mujoco.mjtGeom.mjGEOM_BOX), walls])
    result |= {name: x[order] for name, x in result.items() if name.startswith("geom_")}
    result["geom_pos"][-len(walls) :] -= model.geom_pos[walls[0]]
    return result | {"qpos0": model.qpos0}


@pytest.mark.parametrize("maze", MAPS)
def test_antmaze_has_the_physics_of_the_recipe(maze, recipe):
    env, other = D4RLAntMaze(maze), recipe(maze)
    for name in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):  # tested above
        getattr(other.model, name)[:] = getattr(env.model, name)
    mujoco.mj_setConst(other.model, mujoco.MjData(other.model))
    found, expected = arrays(env.model), arrays(other.model)
    assert len(found) > 100
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name], name)

    env.reset(seed=0)
    other.reset(seed=0)
    height, width = MAPS[maze].shape
    offset = np.zeros(29)
    offset[:2] = (
        4 * (1.5 - width / 2),
        4 * (1.5 - height / 2),
    )  # of D4RL's start cell from the centre of the map
    rng, touches = np.random.default_rng(0), 0
    qpos, qvel = STANDING + rng.uniform(-0.1, 0.1, 15), 0.1 * rng.standard_normal(14)
    qpos[:3] = (
        -1.3,
        -1.2,
        0.6,
    )  # on the ground in a corner; a symmetric pose would let rounding choose the contacts
    env.set_state(qpos, qvel)
    other.ant_env.set_state(qpos + offset[:15], qvel)
    for _ in range(20):
        action = rng.uniform(-1, 1, 8).astype(np.float32)
        observation, (goal_env, *_) = env.step(action)[0], other.step(action)
        same = np.concatenate([goal_env["achieved_goal"], goal_env["observation"]]) - offset
        np.testing.assert_allclose(observation, same, rtol=0, atol=1e-9)
        touches += (env.model.geom_type[env.data.contact.geom] == mujoco.mjtGeom.mjGEOM_BOX).sum()
    assert touches > 2


# ---- any other environment ----
def test_dict_observations_are_flattened():
    env = make("AntMaze_UMaze-v5", "any.hdf5")
    flat, _ = env.reset(seed=0)
    assert env.observation_space.shape == flat.shape == (109,)
    u = env.unwrapped
    position = u.data.qpos[:2]
    np.testing.assert_array_equal(flat[:4], [*position, *u.goal])
    np.testing.assert_array_equal(flat[4:31], [*u.data.qpos[2:], *u.data.qvel])


def test_gymnasium_robotics_antmaze_ends_at_the_goal():
    env = make("AntMaze_UMaze-v5", "any.hdf5")
    env.reset(seed=0)
    assert env.step(np.zeros(8, np.float32))[1:4] == (0, False, False)
    env.unwrapped.goal = env.unwrapped.data.qpos[:2].copy()
    assert env.step(np.zeros(8, np.float32))[1:4] == (1, True, False)


@pytest.mark.parametrize("action", [-1, -0.3, 1])
def test_actions_are_rescaled_from_unit_range(action):
    env, raw = make("Pendulum-v1", "any.hdf5"), gym.make("Pendulum-v1")
    assert env.action_space == gym.spaces.Box(-1, 1, (1,))
    env.reset(seed=0)
    raw.reset(seed=0)
    expected = raw.step(np.float32([2 * action]))
    found = env.step(np.float32([action]))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize(
    "env_id, word",
    [
        ("CartPole-v1", "Discrete"),
        ("NoSuchRobot-v0", "NoSuchRobot"),
        pytest.param(
            "nomodule:Robot-v0", "nomodule", marks=pytest.mark.xfail(raises=ModuleNotFoundError, strict=True)
        ),
    ],
)
def test_unusable_environment_is_one_sentence(env_id, word):
    with pytest.raises(InputError, match=word):
        make(env_id, "any.hdf5")


def test_half_cheetahs_outdated_xml_is_not_mentioned_but_other_warnings_are(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = make("HalfCheetah-v5", "own.hdf5")
    assert capfd.readouterr().err == "" and not list(tmp_path.iterdir())
    env.reset(seed=0)
    env.unwrapped.do_simulation(np.full(6, np.nan), 1)
    assert "unstable" in capfd.readouterr().err


def test_a_film_is_made_of_the_same_environment():
    env = make_env(Args(env_id="hopper-medium-v2"), "rgb_array")
    assert env.unwrapped.render_mode == "rgb_array" and make("hopper-medium-v2").unwrapped.render_mode is None
    np.testing.assert_array_equal(
        env.unwrapped.model.body_mass, make("hopper-medium-v2").unwrapped.model.body_mass
    )
    assert make_env(Args(env_id="antmaze-umaze-v2"), "rgb_array").unwrapped.render_mode == "rgb_array"


# ---- D4RL's own policies ----
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


@pytest.mark.parametrize("name", PUBLISHED)
def test_d4rls_own_policies_return_what_was_published_for_them(name):
    assert distance_from_published(name, make(f"{name.split('_')[0]}-medium-v2")) < 3


def test_in_stock_hopper_they_do_not():
    assert distance_from_published("hopper_online_10", gym.make("Hopper-v4")) > 3
