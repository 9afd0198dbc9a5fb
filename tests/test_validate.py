"""Both kinds of D4RL's policies are rolled out; the pictures of returns and of goals have every point."""

import csv
import json
from unittest.mock import Mock

import numpy as np
import pytest
from test_regenerate import weights

plt = pytest.importorskip("matplotlib.pyplot", reason="needs benchmark/requirements.txt")
plt.switch_backend("agg")

import regenerate_d4rl as d4rl  # noqa: E402
import validate_environments as validate  # noqa: E402


def test_policies_are_rolled_out_and_drawn(tmp_path, monkeypatch):
    np.savez(tmp_path / "hopper_online_1.npz", **weights(11, 3))
    np.savez(tmp_path / "antmaze_umaze_dapg_0.npz", **weights(29, 8))
    published = {"hopper_online_1": [20.0, 3.0], "antmaze_umaze_dapg_0": [0.1, 0.3], "absent": [0, 0]}
    (tmp_path / "published_returns.json").write_text(json.dumps(published))
    args = validate.Args(str(tmp_path), tmp_path / "v.csv", episodes=2, names=tuple(published)[:2])
    monkeypatch.setattr(validate.dmg, "evaluate", spy := Mock(wraps=validate.dmg.evaluate))
    validate.roll_out(args)
    masses = [call.args[1][0].unwrapped.model.body_mass.sum() for call in spy.call_args_list]
    assert 1.03 < masses[1] / masses[0] < 1.05  # today's Hopper is heavier than D4RL's
    hopper, stock, ant = csv.DictReader(args.csv.open())
    assert [x["environment"] for x in (hopper, stock, ant)] == ["faithful", "stock", "maze"]
    assert hopper["policy"] == stock["policy"] == "hopper_online_1" and float(hopper["return_mean"]) > 1
    assert ant["length_mean"] == "700" and ant["published_mean"] == "0.1" and ant["episodes"] == "2"
    validate.draw(args.csv)
    assert plt.imread(tmp_path / "v.png").std() > 0.05


def test_the_picture_of_goals_says_what_the_documents_say(monkeypatch):
    figures = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    d4rl.draw_goals("goals.png")
    for axis in figures[0].axes:
        boxes = [x.get_bbox().extents.tolist() for x in axis.patches if not x.get_fill()]
        assert boxes == [[0, 8, 1.5, 9.5], [0, 8, 3, 11]] and "(m)" in axis.get_xlabel()
    audit, ours = (axis.collections[0].get_offsets() for axis in figures[0].axes)
    assert np.array_equal(audit, np.loadtxt(d4rl.AUDIT, delimiter=",")) and not np.array_equal(audit, ours)
    assert len(ours) == 1426 and (ours >= [0, 8]).all() and (ours <= [3, 11]).all()
    validate.draw(d4rl.AUDIT.with_name("validation.csv"))
    titles = [axis.get_title().split("\n")[1].split(" policies")[0] for axis in figures[1].axes]
    assert titles == ["31 of 33", "17 of 33", "31 of 33"]
    for axis in figures[1].axes:
        assert "(%)" in axis.get_xlabel() and "(%)" in axis.get_ylabel() and len(axis.containers) == 3
        assert sum(len(bars.lines[0].get_xdata()) for bars in axis.containers) == 33
