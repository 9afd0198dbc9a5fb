"""benchmark/validate_environments.py: both kinds of policy are rolled out, the picture has every row."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from test_regenerate import weights

plt = pytest.importorskip("matplotlib.pyplot", reason="needs benchmark/requirements.txt")
plt.switch_backend("agg")

import validate_environments as validate  # noqa: E402

RESULT = Path(__file__).resolve().parent.parent / "benchmark/results/validation.csv"


def test_policies_are_rolled_out_and_drawn(tmp_path):
    np.savez(tmp_path / "hopper_online_1.npz", **weights(11, 3))
    np.savez(tmp_path / "antmaze_umaze_dapg_0.npz", **weights(29, 8))
    published = {"hopper_online_1": [20.0, 3.0], "antmaze_umaze_dapg_0": [0.1, 0.3], "absent": [0, 0]}
    (tmp_path / "published_returns.json").write_text(json.dumps(published))
    args = validate.Args(str(tmp_path), tmp_path / "v.csv", episodes=2, names=tuple(published)[:2])
    validate.roll_out(args)
    rows = list(csv.DictReader(args.csv.open()))
    kinds = [(x["policy"], x["environment"], x["episodes"]) for x in rows]
    robots = [("hopper_online_1", kind, "2") for kind in ("faithful", "stock")]
    assert kinds == [*robots, ("antmaze_umaze_dapg_0", "maze", "2")]
    assert rows[0]["return_mean"] != rows[1]["return_mean"] and float(rows[0]["return_mean"]) > 1
    assert rows[2]["length_mean"] == "700" and rows[2]["published_mean"] == "0.1"
    validate.draw(args.csv)
    assert plt.imread(tmp_path / "v.png").std() > 0.05


def test_the_committed_figures_say_what_the_documents_say(tmp_path, monkeypatch):
    (path := tmp_path / "validation.csv").write_text(RESULT.read_text())
    figures = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    validate.draw(path)
    axes = figures[0].axes
    counts = [axis.get_title().split("\n")[1].split(" policies")[0] for axis in axes]
    assert counts == ["32 of 33", "17 of 33", "28 of 33"]
    for axis in axes:
        assert "(%)" in axis.get_xlabel() and "(%)" in axis.get_ylabel()
        shown = sum(len(bars.lines[0].get_xdata()) for bars in axis.containers)
        assert shown == 33 and len(axis.get_legend().get_texts()) == 3
