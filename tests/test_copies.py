"""What the README says under "To change a copy": each change is made in a copy, which then runs."""

import importlib
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import d4rl_arrays, load_checkpoint, run, write_hdf5

import dmg_offline

ROOT = Path(dmg_offline.__file__).resolve().parent
COUNT = itertools.count()
RUN = {"env_id": "walk:Walk-v0", "dataset_path": "x.hdf5", "batch_size": 16, "normalize_states": False}
RUN |= {"eval_frequency": 3, "eval_episodes": 1, "cuda": False}
OFFLINE = RUN | {"gradient_steps": 6}
WALK = """
import gymnasium as gym
import numpy as np
from test_cases import Point  # its reward is minus the size of the next observation

def Walk(**options):
    return Point("vector", **options)
gym.registry.pop("Walk-v0", None)
gym.register("Walk-v0", Walk, max_episode_steps=5)
x = np.random.default_rng(0).normal(size=(61, 2)).astype(np.float32)
arrays = x[:-1], np.tanh(x[1:, :1]), x[1:, 0], x[1:], np.arange(60) % 9 == 8  # s and next_s share x
"""
# what a user replaces in the file, and by what
LAYERS = ("nn.Linear(n_in, 256), nn.R", "nn.Linear(n_in, 256), nn.LayerNorm(256), nn.Dropout(0.1), nn.R")
ADAMW = ("Adam(net.parameters()", "AdamW([{'params': [p]} for p in net.parameters()]")  # a group for each
CLIP = ("    optimizer.step()\n", "    nn.utils.clip_grad_norm_(parameters, 1.0)\n    optimizer.step()\n")
EAGER = ("fullgraph=True)", 'fullgraph=True, backend="eager")')  # the test's: without a C++ compiler
IMPORT = ("import tyro\n", "import tyro\nimport walk\n")
LOOP, LEARN = "    metrics = {}\n", "            metrics |= learn("
NUMBER = (LEARN, "            args.lam = step / args.gradient_steps\n" + LEARN)
TENSOR = (LOOP, "    args.lam = torch.tensor(args.lam, device=device)\n" + LOOP)
FILLED = (LEARN, "            args.lam.fill_(step / args.gradient_steps)\n" + LEARN)
TOP = ("import walk\n", 'import walk\n\ngym.register("Top-v0", walk.Walk, max_episode_steps=7)\n')
INSTANCE = ("env = gym.make(args.env_id, **options)", "env = walk.Walk()")
REWARD = ("next_s, terminated = columns\n", "next_s, terminated = columns\n    r = 10 * r\n")
ONLINE_REWARD = ("float(reward) - is_antmaze", "10 * float(reward) - is_antmaze")


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """changed((old, new), ...): the module of a copy in which each old text, there once, is the new one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "walk", raising=False)
    Path("walk.py").write_text(WALK)
    write_hdf5("x.hdf5", d4rl_arrays(60, 2, 1))

    def go(*edits, script="dmg_offline"):
        text = (ROOT / f"{script}.py").read_text()
        for old, new in edits:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        name = f"mine_{next(COUNT)}"
        Path(f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    return go


def trained(module, **settings):
    """An agent before and after one update on all rows, its actor's too."""
    dataset, agents = module.load_dataset(args := module.Args(**OFFLINE | settings)), []
    for _ in range(2):
        torch.manual_seed(0)
        agents.append(module.Agent(2, 1, args))
    module.accelerate(agents[1], args)(dataset, torch.randn(len(dataset[1]), 1), True)
    return agents


def test_a_layernorm_and_dropout_and_a_metric_less(changed):
    folder = run(module := changed(LAYERS, ('"q_values": q.mean(), ', "")), **OFFLINE)
    assert folder.name.startswith(f"walk-Walk-v0__{module.__name__}__0__")  # under the copy's own name
    saved = load_checkpoint(folder)["agent"]
    assert saved["critic.q1.1.weight"].shape == saved["critic.q2.1.weight"].shape == (256,)
    layers = module.Agent(2, 1, module.read_args(folder)).value[0]
    assert [type(x).__name__ for x in layers[:4]] == ["Linear", "LayerNorm", "Dropout", "ReLU"]


def test_layernorms_of_xql_and_sql_stand_before_each_relu_of_another_mlp(changed):
    module = changed(LAYERS, script="iql")
    layers = [type(x).__name__ for x in module.Agent(2, 1, module.Args(in_sample="xql")).value[0]]
    first = ["Linear", "LayerNorm", "Dropout", "LayerNorm", "ReLU"]
    assert layers == [*first, "Linear", "LayerNorm", "ReLU", "Linear"]


@pytest.mark.parametrize("compiled", [False, True])
def test_adamw_and_gradient_clipping(changed, compiled):
    write_hdf5("x.hdf5", (x := d4rl_arrays(60, 2, 1)) | {"rewards": 100 * x["rewards"]})
    old, new = trained(changed(ADAMW, CLIP, EAGER), compile=compiled, learning_rate=0.1)
    _, plain = trained(changed(), learning_rate=0.1)
    norms = [torch.cat([p.grad.ravel() for p in x.critic.parameters()]).norm() for x in (new, plain)]
    assert norms[0] == pytest.approx(1, rel=1e-5) and norms[1] > 10
    p, q, r = (agent.value[0][-1].bias.item() for agent in (old, new, plain))
    assert q - r == pytest.approx(-0.1 * 0.01 * p, rel=0.1)  # the decay of AdamW


def test_lam_that_changes_as_a_number_and_as_a_tensor_filled_in_place(changed):
    """A CUDA graph reads the tensor's memory at each replay; a compiled update is compiled but twice."""
    settings, name = OFFLINE | {"learning_rate": 1e-2}, "critic.q1.0.weight"
    torch._dynamo.utils.counters.clear()
    versions = ([], False), ([NUMBER], False), ([TENSOR, FILLED], False), ([TENSOR, FILLED, EAGER], True)
    runs = [run(changed(*edits), **settings, compile=compiled) for edits, compiled in versions]
    still, number, tensor, compiled = (load_checkpoint(folder)["agent"] for folder in runs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # with the actor's update and without
    assert (number[name] - still[name]).abs().max() > 1e-3
    for name, x in number.items():
        torch.testing.assert_close(tensor[name], x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled[name], x, rtol=1e-4, atol=1e-4)


def test_five_arrays_in_place_of_a_dataset(changed):
    (call,) = re.findall(r"= (read_minari\(.+\))\n", (ROOT / "dmg_offline.py").read_text())
    edits = IMPORT, (call, "walk.arrays"), ('update_rate"))', 'update_rate"), needs_data=False)')
    module, settings = changed(*edits), OFFLINE | {"dataset_path": None, "env_id": "Walk-v0"}
    run(module, **settings)
    columns, walk = module.load_dataset(module.Args(**settings)), sys.modules["walk"]
    for k, (x, y) in enumerate(zip(columns, walk.arrays, strict=True)):
        rows = columns[4] == 0 if k == 3 else ...
        np.testing.assert_array_equal(x[rows], y[rows])


@pytest.mark.parametrize("edits, env_id, steps", [
    ([], "walk:Walk-v0", 5), ([IMPORT, TOP], "Top-v0", 7), ([IMPORT, INSTANCE], "my:walk", 1000),
])  # fmt: skip
def test_an_own_environment_in_a_module_registered_at_the_top_or_made_here(changed, edits, env_id, steps):
    folder = run(changed(*edits), **OFFLINE | {"env_id": env_id})
    assert np.loadtxt(folder / "eval.csv", delimiter=",", skiprows=1)[:, 4].tolist() == [steps] * 3


def test_another_reward_in_the_dataset_and_online(changed):
    module = changed(REWARD, ONLINE_REWARD, script="dmg_finetune")
    folder = run(module, **RUN, offline_steps=2, online_steps=12)
    args = module.read_args(folder)
    torch.testing.assert_close(module.load_dataset(args)[2], 10 * dmg_offline.load_dataset(args)[2])
    _, _, r, next_s, _ = load_checkpoint(folder)["online"]["rows"]
    torch.testing.assert_close(r, -10 * next_s.abs().sum(1))
