"""benchmark/report.py: numbers recomputed by hand, the paper's columns, run folders of old versions too."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import d4rl_arrays, write_hdf5

pytest.importorskip("rliable", reason="needs benchmark/requirements.txt")
pd = pytest.importorskip("pandas", reason="needs benchmark/requirements.txt")
plt = pytest.importorskip("matplotlib.pyplot", reason="needs benchmark/requirements.txt")

import evaluations  # noqa: E402
import report  # noqa: E402
from evaluations import COLUMNS  # noqa: E402

import dmg_finetune  # noqa: E402
import dmg_offline  # noqa: E402

MILLION = 1_000_000
RESULTS = Path(__file__).resolve().parent.parent / "benchmark/results"


def a_run(seed, scores, env_id="hopper-medium-v2", algorithm="DMG", steps=MILLION, online=0, **other):
    """Rows of a run: `scores` by step, None where it diverged."""
    settings = {"algorithm": algorithm, "env_id": env_id, "seed": seed, "dataset": "", "flags": "gamma=0.99"}
    settings |= {"gradient_steps": steps, "online_steps": online, "run": f"{env_id}__{algorithm}__{seed}"}
    settings |= ({"lam": 0.25, "nu": 0.1} if "DMG" in algorithm else {}) | other
    settings |= {"wall_seconds": 3600.0, "q_values": 5.0}
    found = lambda x: {"normalized_score": x, "return_mean": 10 * (x or 0), "diverged": int(x is None)}  # noqa: E731
    return [settings | {"step": step} | found(score) for step, score in scores.items()]


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """Folder of a report on a small evaluations.csv, and its text."""
    runs = [a_run(seed, {500_000: 1.0, MILLION: x}) for seed, x in enumerate((90.0, 100.0, 110.0))]
    runs += [a_run(1, {500_000: 99.0}, run="again")]  # seed 1 again, stopped halfway
    runs += [a_run(3, {500_000: 80.0}), a_run(4, {500_000: 80.0, 500_001: None})]
    runs += [a_run(0, {MILLION: 22.0}, flags="gamma=0.9"), a_run(0, {MILLION: 11.0}, lam=1.0)]
    runs += [a_run(seed, {MILLION: 50.0 + seed}, algorithm="IQL") for seed in range(4)]
    runs += [a_run(0, {MILLION: 70.0}, algorithm="mine")]
    again = {"env_id": "antmaze-umaze-v2", "dataset": "umaze.hdf5", "nu": 0.5}
    runs += [a_run(0, {50_000: 15.0, 350_000: 96.0}, **again)]
    runs += [a_run(0, {500_000: 97.0}, **again | {"algorithm": "IQL", "steps": 500_000, "nu": np.nan})]
    runs += [a_run(0, {500_000: None}, **again | {"algorithm": "TD3+BC", "nu": np.nan})]
    online = {"env_id": "antmaze-umaze-v2", "online": MILLION, "nu": 0.5}
    runs += [a_run(s, {MILLION: 90.0 + s, 2 * MILLION: 95.0 + s}, **online) for s in (0, 1)]
    runs += [a_run(0, {500: 41.0, 600: 65.0}, steps=500, **online | again | {"online": 100})]
    runs += [a_run(0, {10: np.nan}, env_id="Ant-v5", steps=10)]
    runs[-1][0]["return_mean"] = 3000.0
    folder = tmp_path_factory.mktemp("report")
    data = pd.DataFrame([row for run in runs for row in run]).reindex(columns=COLUMNS)
    data.to_csv(folder / "in.csv", index=False)
    report.report(report.Args((folder / "in.csv",), folder, bootstrap_samples=20))
    return folder, (folder / "report.md").read_text()


def test_cells_are_means_of_finished_seeds_beside_the_papers_score(by_hand):
    # seeds 90, 100, 110: mean 100, sample deviation 10; IQL 50 to 53: 51.5 and sqrt(5/3)
    ours = "100.0 ± 10.0 (3 seeds, 1 unfinished, 1 diverged) | 100.6 ± 1.9 | 51.5 ± 1.3 (4 seeds) | 66.2 |"
    assert f"| hopper-medium-v2 | {ours} 70.0 (1 seed) |  |" in by_hand[1]
    assert "| data | DMG | DMG (paper) | IQL | IQL (paper) | mine | mine (paper) |" in by_hand[1]
    row = "| antmaze-umaze-v2 | 90.5 ± 0.7 (2 seeds) | 92.4 | 95.5 ± 0.7 (2 seeds) | 93.4 |"
    assert row in by_hand[1]
    assert "| Ant-v5 | 3000.0 (1 seed) |" in by_hand[1]


def test_d4rl_made_again_has_tables_of_its_own_whose_heading_names_the_original(by_hand):
    part = by_hand[1].split("## D4RL made again\n")[1].split("\n## ")[0]
    for name in ("DMG", "IQL", "TD3+BC"):
        assert f"| {name} (paper, original data, 1M steps) |" in part
    ours = "96.0 (1 seed, after 350,000 steps) | 92.4 ± 1.8 | 97.0 (1 seed, after 500,000 steps) | 89.6 |"
    assert f"| antmaze-umaze-v2 (umaze.hdf5) | {ours} - (0 seeds, 1 diverged) | 73.0 |" in part
    tuned = "| 41.0 (1 seed, after 500 steps) | 92.4 | 65.0 (1 seed, after 600 steps) | 93.4 |"
    assert "## D4RL made again, 100 online steps\n" in by_hand[1] and tuned in by_hand[1]
    assert part.count("antmaze-umaze-v2") == 1 and "![d4rl-made-again](d4rl-made-again.png)" in part


def test_other_settings_are_in_the_last_table_alone(by_hand):
    tables, overview = by_hand[1].split("## Everything that was run")
    assert "22.0" not in tables and "11.0" not in tables
    assert "22.0 (1 seed)" in overview and "gamma=0.9 |" in overview and "| 1.0 | 0.1 |" in overview


def test_rliable_recomputed(by_hand):
    found = report.intervals({"DMG": np.array([[90.0], [100], [110]]), "IQL": np.array([[50.0], [53]])}, 20)
    numbers = found.set_index("algorithm")
    assert numbers.estimate.to_dict() == {"DMG": 100.0, "IQL": 51.5, "DMG > IQL": 1.0}
    assert 90 <= numbers.low["DMG"] < 100 < numbers.high["DMG"] <= 110
    assert "interquartile mean (%)" not in by_hand[1].split("## D4RL made again\n")[1].split("\n## ")[0]


def test_pictures_show_every_curve_with_units_and_a_cross(by_hand, tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, path, **_: figures.update({path.stem: figure}))
    report.report(report.Args((by_hand[0] / "in.csv",), tmp_path, 5))
    (axis,) = figures["d4rl-v2-1000000-gradient-steps"].axes
    (dmg,) = [line for line in axis.lines if line.get_label() == "DMG"]
    assert dmg.get_xydata().tolist() == [[500_000, 32.6], [MILLION, 100.0]]
    (cross,) = [line for line in axis.lines if line.get_marker() == "x"]
    assert cross.get_xydata().tolist() == [[500_000, 80.0]]
    again = figures["d4rl-made-again"]
    paper = [line for line in again.axes[0].lines if "original data" in str(line.get_label())]
    assert paper[0].get_ydata() == [92.4, 92.4]
    legend = {text.get_text() for text in again.legends[0].get_texts()}
    assert legend == {"DMG", "IQL", "TD3+BC", "DMG, paper, original data, 1M steps"}
    for axis in (axis for figure in figures.values() for axis in figure.axes):
        assert "steps" in axis.get_xlabel() and "(" in axis.get_ylabel()
    for path in by_hand[0].glob("*.png"):
        assert 0.002 < (plt.imread(path)[..., :3] < 0.5).all(-1).mean() < 0.5


def test_run_folders_and_kept_copies_of_them_become_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = d4rl_arrays()
    tiny = {"eval_frequency": 10, "eval_episodes": 1, "batch_size": 8, "cuda": False}
    offline = tiny | {"env_id": "hopper-medium-v2", "gradient_steps": 20}
    for seed in (0, 1):
        path = write_hdf5(f"{seed}.hdf5", arrays)
        dmg_offline.main(dmg_offline.Args(**offline, dataset_path=path, seed=seed))
    bad = write_hdf5("bad.hdf5", arrays | {"rewards": 1e25 * arrays["rewards"]})
    with pytest.raises(SystemExit):
        dmg_offline.main(dmg_offline.Args(**offline, dataset_path=bad))
    flags = {"env_id": "Hopper-v5", "from_scratch": True, "online_steps": 10, "learning_starts": 5}
    dmg_finetune.main(dmg_finetune.Args(**tiny, **flags))
    data = evaluations.collect([Path("runs")])
    found = {key: run.step.tolist() for key, run in data.groupby(["algorithm", "dataset", "seed"])}
    whole = {("DMG", "0.hdf5", 0): [0, 10, 20], ("DMG", "1.hdf5", 1): [0, 10, 20], ("TD3", "", 0): [0, 10]}
    assert found == whole | {("DMG", "bad.hdf5", 0): [0, 10]}
    assert data.diverged.sum() == 1 and data[data.algorithm == "TD3"].normalized_score.isna().all()
    assert data[data.step == 20].q_values.notna().all()
    states = evaluations.summarise_runs(data).set_index(["algorithm", "dataset"]).state
    assert states.to_dict()["DMG", "bad.hdf5"] == "diverged" and states["DMG", "0.hdf5"] == "finished"

    (path,) = (path for path in Path("runs").glob("*/args.json") if '/0.hdf5"' in path.read_text())
    old = json.loads(path.read_text())
    del old["normalize_states"], old["exp_name"], old["versions"]  # as an older version wrote it
    old |= {"in_sample_temperature": 5.0, "num_seeds": 1, "torch": "2", "commit": "1"}
    Path("kept").mkdir()
    Path("kept/a.json").write_text(json.dumps(old))
    Path("kept/a.csv").write_bytes(path.with_name("eval.csv").read_bytes())
    kept = evaluations.collect([Path("kept")])
    same = [name for name in COLUMNS if name not in ("run", "q_values")]
    original = data[data.dataset == "0.hdf5"].reset_index()
    pd.testing.assert_frame_equal(kept[same], original[same], check_dtype=False)


def test_the_committed_results_are_readable_and_wrong_input_is_a_sentence(tmp_path):
    data = evaluations.collect([RESULTS / "d4rl_made_again"])
    assert set(data.algorithm) <= set(report.STYLES) and (data.dataset != "").all()
    with pytest.raises(ValueError, match="no runs in nowhere"):
        evaluations.collect([Path("nowhere")])
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(ValueError, match="no run of these scripts"):
        evaluations.collect([tmp_path])
