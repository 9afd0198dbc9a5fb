"""benchmark/report.py: numbers recomputed by hand, the paper's columns, run folders of old versions too."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import d4rl_arrays, refusal, run, write_hdf5

pytest.importorskip("rliable", reason="needs benchmark/requirements.txt")
import evaluations
import matplotlib.pyplot as plt
import pandas as pd
import report
from evaluations import COLUMNS

import dmg_offline

MILLION = 1_000_000


def a_run(seed, scores, env_id="hopper-medium-v2", algorithm="DMG", steps=MILLION, online=0, **other):
    """Rows of a run: `scores` by step, None where it diverged."""
    found = {"algorithm": algorithm, "env_id": env_id, "seed": seed, "dataset": "", "flags": "gamma=0.99"}
    found |= {"gradient_steps": steps, "online_steps": online, "run": f"{env_id}__{algorithm}__{seed}"}
    found |= ({"lam": 0.25, "nu": 0.1} if "DMG" in algorithm else {}) | {"q_values": 5.0}
    score = lambda x: {"normalized_score": x, "return_mean": 10 * (x or 0), "diverged": int(x is None)}  # noqa: E731
    return [found | {"step": step} | score(x) | other for step, x in scores.items()]


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """Text and figures of a report on a small evaluations.csv."""
    runs = [a_run(k, {500_000: 1.0, 600_000 + k: 9.0, MILLION: 90.0 + 10 * k}) for k in range(3)]
    runs += [a_run(1, {500_000: 99.0}, run="again")]  # seed 1 again, stopped halfway
    runs += [a_run(3, {500_000: 80.0}), a_run(4, {500_000: 80.0, 500_001: None})]
    runs += [a_run(seed, {MILLION: 22.0}, flags="gamma=0.9") for seed in range(5)]  # more than by default
    runs += [a_run(0, {MILLION: 11.0}, lam=1.0)]
    runs += [a_run(seed, {MILLION: 50.0 + seed}, algorithm="IQL") for seed in range(4)]
    runs += [a_run(0, {MILLION: 70 + lam}, algorithm="mine", lam=lam) for lam in (0.25, 1.0)]
    for k, script in enumerate(("", "12345678", "87654321")):  # digits, but no numbers
        runs += [a_run(0, {MILLION: 73.0 + k}, algorithm="ours", script=script)]
    again = {"env_id": "antmaze-umaze-v2", "dataset": "umaze.hdf5", "nu": 0.5}
    runs += [a_run(0, {50_000: 15.0, 350_000: 96.0}, **again), a_run(0, {10: 1.0}, steps=10, **again)]
    runs += [a_run(1, {50_000: 10.0}, **again)]  # less far: not in the mean
    iql = again | {"algorithm": "IQL", "steps": 500_000, "nu": np.nan}
    runs += [a_run(0, {500_000: 97.0}, **iql), a_run(1, {50_000: 1.0}, **iql)]
    runs += [a_run(0, {500_000: None}, **again | {"algorithm": "TD3+BC", "nu": np.nan})]
    online = {"env_id": "antmaze-umaze-v2", "online": MILLION, "nu": 0.5, "script": "dmg_finetune.py's"}
    runs += [a_run(s, {MILLION: 90.0 + s, 2 * MILLION: 95.0 + s}, **online) for s in (0, 1)]
    runs += [a_run(0, {500: 41.0, 600: 65.0}, steps=500, **online | again | {"online": 100})]
    runs += [a_run(0, {MILLION: 80.0}, **online | again)]  # at the hand-over
    runs += [a_run(0, {MILLION: 5.0}, steps=0, **online | {"algorithm": "TD3", "lam": 1.0, "nu": 0.0})]
    runs += [a_run(0, {10: np.nan}, env_id="Ant-v5", steps=10, return_mean=3000.0, lam=0.5)]
    lone = {"env_id": "walker2d-medium-v2", "flags": "batch_size=256 lam_end=1.0 normalize_states=False"}
    runs += [a_run(0, {7: 7.0}, steps=7, **lone)]
    folder, figures = tmp_path_factory.mktemp("report"), {}
    data = pd.DataFrame([row for rows in runs for row in rows]).reindex(columns=COLUMNS)
    data.to_csv(folder / "in.csv", index=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plt.Figure, "savefig", lambda figure, path, **_: figures.update({path.stem: figure}))
        report.report(report.Args((folder / "in.csv",), folder, bootstrap_samples=20))
    return (folder / "report.md").read_text(), figures


def test_cells_are_means_of_finished_seeds_beside_the_papers_score(by_hand):
    # seeds 90, 100, 110: mean 100, sample deviation 10; IQL 50 to 53: 51.5 and sqrt(5/3)
    text, scripts = by_hand[0], "ours | ours (script 123456) | ours (script 876543) |\n"
    assert f"| data | DMG | DMG (paper) | IQL | IQL (paper) | mine | {scripts}" in text
    dmg = "100.0 ± 10.0 (3 seeds, 1 unfinished, 1 diverged) | 100.6 ± 1.9 | 51.5 ± 1.3 (4 seeds) | 66.2 |"
    others = "70.2 (1 seed) | 73.0 (1 seed) | 74.0 (1 seed) | 75.0 (1 seed) |\n"
    assert f"| hopper-medium-v2 | {dmg} {others}" in text and "DMG (script" not in text
    row = "| antmaze-umaze-v2 | 90.5 ± 0.7 (2 seeds) | 92.4 | 95.5 ± 0.7 (2 seeds) | 93.4 |"
    assert row in text and "| Ant-v5 lam=0.5 | 3000.0 (1 seed, raw) |" in text
    assert "| walker2d-medium-v2 lam_end=1.0 normalize_states=False | 7.0 (1 seed) |" in text  # a lone one
    assert "| antmaze-umaze-v2 | 5.0 (1 seed) | 0.0 |" in text  # TD3's lam 1 and nu 0 are its own
    # other settings have rows of their own, without the paper's score
    found = re.findall(r"^\| hopper-medium-v2(.*)", text.split("## Everything")[0], re.M)
    gamma, lam = (row.replace("|  ", "") for row in found[1:])
    assert (gamma, lam) == (" gamma=0.9 | 22.0 ± 0.0 (5 seeds) |", " lam=1 | 11.0 (1 seed) | 71.0 (1 seed) |")
    assert "| DMG | gamma=0.9 | 0.25 | 0.1 | 1,000,000 | 0 | 22.0 ± 0.0 (5 seeds) |" in text


def test_d4rl_made_again_has_tables_of_its_own_whose_heading_names_the_original(by_hand):
    part = by_hand[0].split("## D4RL made again\n")[1].split("\n## ")[0]
    assert part.count(" (paper, original data, 1M steps) |") == 3
    ours, iql = "96.0 (1 seed, 350,000 steps)", "97.0 (1 seed, 500,000 steps, 1 unfinished)"
    ours = f"{ours} | 92.4 ± 1.8 | {iql} | 89.6 |"
    assert f"| antmaze-umaze-v2 (umaze.hdf5) | {ours} - (0 seeds, 1 diverged) | 73.0 |" in part
    tuned = "| 41.0 (1 seed, 500 steps) | 92.4 | 65.0 (1 seed, 600 steps) | 93.4 |"
    assert "## D4RL made again, 100 online steps\n" in by_hand[0] and tuned in by_hand[0]
    early = "80.0 (1 seed, 1,000,000 steps)"
    assert f"| {early} | 92.4 | {early} | 93.4 |" in by_hand[0]
    assert part.count("umaze-v2") == 2 and "| antmaze-umaze-v2 (umaze.hdf5) steps=10 | 1.0 (" in part
    assert "interquartile mean (%)" in by_hand[0] and "interquartile mean (%)" not in part  # of two seeds


def test_rliable_recomputed():
    scores = {"DMG": np.array([[90.0], [100], [110]]), "IQL": np.array([[50.0], [53]])}
    numbers = report.intervals(scores, 20).set_index("algorithm")
    assert numbers.estimate.to_dict() == {"DMG": 100.0, "IQL": 51.5, "DMG > IQL": 1.0}
    assert 90 <= numbers.low["DMG"] < 100 < numbers.high["DMG"] <= 110


def test_pictures_show_every_curve_in_a_color_of_its_own_with_units_and_a_cross(by_hand):
    (axis,) = by_hand[1]["d4rl-v2-1000000-gradient-steps"].axes
    lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    assert lines.pop("DMG").get_xydata().tolist() == [[500_000, 1], [MILLION, 100]]  # of the table's seeds
    assert lines.pop("DMG, paper, original data, 1M steps").get_color() == "black"
    scores = {"DMG gamma=0.9": 22, "DMG lam=1": 11, "IQL": 51.5, "mine": 70.25, "mine lam=1": 71, "ours": 73}
    scores |= {"ours (script 123456)": 74, "ours (script 876543)": 75}
    assert {name: line.get_ydata()[-1] for name, line in lines.items()} == scores
    assert len({plt.matplotlib.colors.to_hex(line.get_color()) for line in lines.values()} - {"#000000"}) == 8
    (cross,) = [line for line in axis.lines if line.get_marker() == "x"]
    assert cross.get_xydata().tolist() == [[500_000, 80.0]]
    again = by_hand[1]["d4rl-made-again"]
    legend = {text.get_text() for text in again.legends[0].get_texts()}
    assert legend == {"DMG", "DMG steps=10", "IQL", "TD3+BC", "DMG, paper, original data, 1M steps"}
    (paper,) = [line for line in again.axes[0].lines if "paper" in line.get_label()]
    assert paper.get_ydata() == [92.4, 92.4]
    axes = [axis for figure in by_hand[1].values() for axis in figure.axes]
    assert all("steps" in axis.get_xlabel() and "(" in axis.get_ylabel() for axis in axes)


def test_run_folders_and_kept_copies_of_them_become_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays, offline = d4rl_arrays(), {"env_id": "hopper-medium-v2", "cuda": False, "gradient_steps": 20}
    offline |= {"eval_frequency": 10, "eval_episodes": 1, "batch_size": 8}
    good = run(dmg_offline, **offline, dataset_path=write_hdf5("good.hdf5", arrays))
    with pytest.raises(FloatingPointError):
        bad = write_hdf5("bad.hdf5", arrays | {"rewards": 1e25 * arrays["rewards"]})
        run(dmg_offline, **offline, dataset_path=bad)
    data = evaluations.collect([Path("runs")])
    assert "eval.csv is no folder of runs" in refusal(evaluations.collect, [good / "eval.csv"])
    steps = {name: rows.step.tolist() for name, rows in data.groupby("dataset")}
    assert steps == {"good.hdf5": [0, 10, 20], "bad.hdf5": [0, 10]} and set(data.algorithm) == {"DMG"}
    flags = set(data["flags"].iloc[0].split())
    assert flags >= {"gamma=0.99", "batch_size=8"} and not flags & {"compile=False", "lam=0.25"}
    runs = evaluations.summarize_runs(data).set_index("dataset")
    assert runs.state.to_dict() == {"good.hdf5": "finished", "bad.hdf5": "diverged"}
    assert runs.steps_per_second["good.hdf5"] > 0 and not np.isnan(runs.q_values["good.hdf5"])
    for path in Path("runs").glob("*/eval.csv"):
        path.write_text(path.read_text().split("10,nan")[0])  # an older run has no such row
    assert evaluations.collect([Path("runs")]).diverged.sum() == 1 == data.diverged.sum()
    saved, text = json.loads((good / "args.json").read_text()), (good / "eval.csv").read_text()
    Path("kept").mkdir()

    def kept(text, **changes):
        Path("kept/a.csv").write_text(text)
        Path("kept/a.json").write_text(json.dumps(saved | changes))
        return evaluations.collect([Path("kept")])

    names = [name for name in COLUMNS if name not in ("run", "q_values", "steps_per_second")]
    original = data[data.dataset == "good.hdf5"].reset_index()[names]
    pd.testing.assert_frame_equal(kept(text)[names], original, check_dtype=False)
    assert set(kept(text, script="0" * 64).script) == {"00000000"} != set(original.script)
    for name, change in {"copy": {"exp_name": "copy", "x": (1, 2)}, "TD3": {"from_scratch": True}}.items():
        runs = evaluations.summarize_runs(kept(text, **change, dataset_path="/data/a/b.hdf5"))
        (cell,) = evaluations.summarize_cells(runs).itertuples()
        assert (cell.algorithm, cell.dataset, *runs.run) == (name, "a/b.hdf5", "kept/a")
    for name in ("normalize_states", "exp_name", "versions", "script"):  # as an older version wrote it
        del saved[name]
    text = "step,return_mean,return_std,normalized_score,length_mean,episodes,wall_seconds\n"
    for step, score in ((0, 1), (10, 2), (20, 3), (10, 4), (20, 5), (30, 6), (20, 7)):  # killed and resumed
        text += f"{step},{score},0,None,9,1,5.0\n"
    old = kept(text + "25,nan,nan,nan,nan,nan,nan", in_sample_temperature=5.0, num_seeds=1, commit="1")
    assert old.step.tolist() == [0, 10, 20, 25] and old.return_mean.tolist()[:3] == [1, 4, 7]
    assert old.diverged.tolist() == [0, 0, 0, 1] and old.normalized_score.isna().all()
    assert {*old.algorithm, *old.script, *old["flags"]} == {"DMG", "", *original["flags"]}


def test_the_committed_results_are_readable_and_wrong_input_is_a_sentence(tmp_path):
    data = evaluations.collect([*Path(report.__file__).with_name("results").glob("*/")])
    names = {"dmg": "DMG", "iql": "IQL", "td3bc": "TD3+BC"}
    expected = [names[re.search("dmg|td3bc|iql", run)[0]] for run in data.run]
    assert data.algorithm.tolist() == expected and (data.dataset != "").all()
    assert evaluations.kind_of(pd.Series({"env_id": "hopper-full-replay-v2", "dataset": ""})) == "D4RL v2"
    assert "nowhere is no folder of runs" in refusal(evaluations.collect, [Path("nowhere")])
    (tmp_path / "args.json").write_text("{}")
    assert "no run of these scripts" in refusal(evaluations.collect, [tmp_path])


def test_the_tables_of_both_readmes_are_the_reports(tmp_path):
    results = Path(report.__file__).with_name("results")
    report.report(report.Args((results / "d4rl_made_again",), tmp_path, bootstrap_samples=10))
    table = re.findall(r"^\| .*\.hdf5\) \|.*$", (results / "README.md").read_text(), re.M)
    readme = results.parent.parent.joinpath("README.md").read_text()
    rows = re.findall(r"^\| ((?:antmaze|halfcheetah|hopper|walker2d)-.*) \|$", readme, re.M)
    assert len(table) == len(rows) == 10 and {*table} <= {*(tmp_path / "report.md").read_text().splitlines()}
    for row in rows:
        name, *ours, paper = row.split(" | ")
        task, _, policy = name.partition(",")[0].partition(": ")
        (exact,) = [x.strip(" |").split(" | ") for x in table if x.startswith(f"| {task}-v2 ({policy}")]
        assert paper in (", ".join(x.split(" ")[0] for x in exact[2::2]), "the same"), row
        for text, score in zip(ours, exact[1::2], strict=True):
            numbers = re.findall(r"[\d.]+", re.split("[,(]", text)[0])
            digits = [len(x.partition(".")[2]) for x in numbers]
            scores = re.findall(r"[\d.]+", score.split("(")[0])
            assert numbers == [f"{float(x):.{k}f}" for x, k in zip(scores, digits, strict=True)], row
