"""benchmark/report.py: numbers recomputed by hand, pictures that show something, missing and diverged runs."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import d4rl_arrays, write_hdf5
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytest.importorskip("rliable", reason="needs benchmark/requirements.txt")
pd = pytest.importorskip("pandas", reason="needs benchmark/requirements.txt")
plt = pytest.importorskip("matplotlib.pyplot", reason="needs benchmark/requirements.txt")

import claims  # noqa: E402
import evaluations  # noqa: E402
import report  # noqa: E402
from evaluations import COLUMNS, D4RL, PAPER  # noqa: E402

import dmg_finetune  # noqa: E402
import dmg_offline  # noqa: E402

MILLION = 1_000_000


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run report.py; returns (exit code, stderr)."""

    def go(*argv):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, argv)])
        try:
            code = report.main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return go


def a_run(seed, scores, env_id="hopper-medium-v2", script="dmg_offline", steps=MILLION, online=0, **other):
    """Rows of a run: `scores` by step, None where it diverged."""
    settings = {"in_sample": "iql", "lam": 0.25, "nu": 0.1, "dataset": "", "flags": "gamma=0.99", "machine": "m"}
    settings |= {"script": script, "env_id": env_id, "gradient_steps": steps, "online_steps": online, "seed": seed}
    settings |= {"run": f"{env_id}__{script}__{seed}__1"} | other
    rows = [settings | {"step": 0, "diverged": 0}]
    for step, score in scores.items():
        rows.append(settings | {"step": step, "diverged": int(score is None)})
        if score is not None:
            rows[-1] |= {"normalized_score": score, "return_mean": 10 * score, "q_values": 5.0, "wall_seconds": 3600.0}
    return rows


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """Folder of a report on a small evaluations.csv, and its text."""
    runs = [a_run(seed, {500_000: 1.0, MILLION: score}) for seed, score in enumerate((90.0, 100.0, 110.0))]
    runs += [a_run(0, {MILLION: 55.5}, run="hopper-medium-v2__dmg_offline__0__0")]  # seed 0 again, an earlier run
    runs += [a_run(1, {500_000: 99.0}, run="hopper-medium-v2__dmg_offline__1__9")]  # seed 1 again, stopped halfway
    runs += [a_run(3, {500_000: 80.0}), a_run(4, {500_000: 80.0, 500_001: None})]
    runs += [a_run(0, {500_000: 33.0}, steps=500_000), a_run(0, {MILLION: 22.0}, flags="gamma=0.9")]
    runs += [a_run(seed, {MILLION: 77.0}, dataset="mine.hdf5") for seed in (0, 1)]
    runs += [a_run(0, {MILLION: 78.0}, dataset="mine.hdf5", nu=10.0)]
    runs += [a_run(0, {MILLION: 79.0}, dataset="narrow.hdf5", nu=10.0)]
    runs += [a_run(0, {MILLION: 21.0}, dataset="narrow.hdf5", nu=1.0)]  # as many seeds, but 10 is what others have
    runs += [a_run(seed, {MILLION: score}, lam=1.0) for seed, score in enumerate((11.0, 13.0, 11.0, 13.0, 12.0))]
    runs += [a_run(5, {500_000: 12.0, 600_000: None}, lam=1.0)]
    runs += [a_run(seed, {MILLION: score}, nu=10.0) for seed, score in enumerate((60.0, 62.0))]
    none = {"lam": np.nan, "nu": np.nan}
    runs += [a_run(0, {MILLION: 30.5}, script="iql", dataset="narrow.hdf5", **none)]
    runs += [a_run(0, {MILLION: 40.0}, script="iql", dataset="mine.hdf5", **none)]
    runs += [a_run(0, {MILLION: 50.0}, script="iql", dataset="without-dmg.hdf5", **none)]
    for script, other in (("iql", none), ("dmg_offline", {})):  # no reference: the score is the return
        runs += [a_run(0, {MILLION: 3000.0}, "Ant-v5", script, dataset="raw.hdf5", **other)]
        runs[-1][-1]["return_mean"] = 3000.0
    runs += [a_run(seed, {MILLION: 50.0 + seed}, script="iql", **none) for seed in range(4)]
    runs += [a_run(seed, {MILLION: 70.0 + seed}, script="iql", in_sample="xql", **none) for seed in (0, 1)]
    runs += [a_run(seed, {MILLION: 95.0 + seed}, in_sample="xql") for seed in (0, 1)]
    online = {"script": "dmg_finetune", "env_id": "antmaze-umaze-v2", "online": MILLION}
    runs += [a_run(s, {MILLION: 90.0 + s, 2 * MILLION: 95.0 + s}, nu=0.5, **online) for s in (0, 1)]
    runs += [a_run(0, {MILLION: 1.0}, lam=1.0, nu=0.0, **online | {"steps": 0})]
    folder = tmp_path_factory.mktemp("report")
    data = pd.DataFrame([row for run in runs for row in run]).reindex(columns=COLUMNS)
    data.to_csv(folder / "evaluations.csv", index=False)
    args = report.Args(folder=folder, bootstrap_samples=20)
    return folder, report.report(evaluations.collect((), folder / "evaluations.csv", ""), args)


def section(text, title):
    return text.split(f"\n## {title}")[1].split("\n## ")[0]


def test_table_2_has_the_mean_of_the_finished_seeds_and_the_papers_column_for_d4rl_alone(by_hand):
    shown = section(by_hand[1], "Table 2")
    half, whole, other = re.findall(r"Data: (.*?)\.\n\n(.*?)\n\n", shown + "\n", re.S)
    # seeds 90, 100, 110: mean 100, sample standard deviation 10; IQL 50 to 53: 51.5 and sqrt(5/3)
    assert whole[0] == "D4RL v2 locomotion, 1,000,000 gradient steps"
    row = "| hopper-medium-v2 | 51.5 ± 1.3 (4) | 66.2 | 100.0 ± 10.0 (3, 1 diverged, 1 unfinished) | 100.6 ± 1.9 |"
    assert row in whole[1]
    assert "| **locomotion total** | 51.5 (1 of 15 sets) | 66.2 | 100.0 (1 of 15 sets) | 100.6 |" in whole[1]
    assert half[0] == "D4RL v2 locomotion, 500,000 gradient steps" and "| 33.0 (1) |" in half[1]
    assert other[0].startswith("other data")
    assert "| hopper-medium-v2 (mine.hdf5) | 40.0 (1) | 77.0 ± 0.0 (2), nu 0.1 |" in other[1]
    assert "| hopper-medium-v2 (narrow.hdf5) | 30.5 (1) | 79.0 (1), nu 10 |" in other[1]
    assert "| **total of 2 sets** | 70.5 | 156.0 |" in other[1]  # of those with both, raw returns left out
    assert "paper" not in other[1]


def test_tables_3_4_and_6(by_hand):
    assert "| hopper-medium-v2 | 70.5 ± 0.7 (2) | 71.1 | 95.5 ± 0.7 (2) | 90.1 |" in section(by_hand[1], "Table 3")
    row = "| antmaze-umaze-v2 | 1.0 (1) | 0.0 | 90.5 ± 0.7 (2) | 92.4 | 95.5 ± 0.7 (2) | 93.4 |"
    assert row in section(by_hand[1], "Table 4")
    # 10 / sqrt(3) times Student's 4.3027
    row = "| hopper-medium-v2 | 100.0 ± 24.8 (3, 1 diverged, 1 unfinished) | 100.5 ± 1.0 |"
    assert row in section(by_hand[1], "Table 6")


def test_td3_stands_beside_runs_that_are_as_long_online_and_else_alone():
    online = {"script": "dmg_finetune", "steps": 0, "lam": 1.0, "nu": 0.0}
    runs = [a_run(0, {20: 1.0, 30: 2.0}, script="dmg_finetune", steps=20, online=10)]
    runs += [a_run(0, {steps: 3.0}, online=steps, **online) for steps in (10, 40)]
    data = pd.DataFrame([row for run in runs for row in run]).reindex(columns=COLUMNS)
    cells = evaluations.summarise_cells(evaluations.summarise_runs(data.fillna(dict.fromkeys(evaluations.WORDS, ""))))
    for kept in (cells, cells[cells.algorithm == "TD3"]):
        found = report.before_and_after(kept)
        found = set(zip(found.algorithm, found.gradient_steps, found.online_steps, strict=True))
        td3 = {("TD3", 20 if kept is cells else 0, 10), ("TD3", 0, 40)}
        assert found == td3 | ({("DMG offline", 20, 10), ("DMG online", 20, 10)} if kept is cells else set())


def test_the_overview_has_every_setting_and_what_tells_them_apart(by_hand):
    shown = section(by_hand[1], "Everything")
    assert "| 22.0 (1) | gamma=0.9 |" in shown and "| 12.0 ± 1.0 (5, 1 diverged) | gamma=0.99 |" in shown
    numbers = pd.read_csv(by_hand[0] / "cells.csv")
    assert len(numbers) == shown.count("\n| ") - 2
    assert set(numbers["mean"].round(2)) >= {100, 33, 22, 77, 12, 61, 51.5, 70.5, 95.5}


def test_the_papers_claims_are_answered_from_the_numbers(by_hand):
    """One has to fail for each rule: two standard errors, one seed, divergence, a chain that breaks in one place."""
    rows = pd.read_csv(by_hand[0] / "claims.csv").set_index(["claim", "data"])
    total, lam, q = "better than TD3+BC and IQL in total", "lam 0.25 beats 0 and 1", "Q {} with {}"
    assert not [claim for claim, data in rows.index if claim == total]  # no TD3+BC here
    assert rows.loc[(q.format("grows", "lam"), "hopper-medium-v2, 1,000,000 steps, nu 0.1"), "holds"] == "not clear"
    found = rows.loc[("fine-tuning improves it", "antmaze-umaze-v2, 1,000,000 steps, 1,000,000 online")]
    assert found.tolist() == ["90.5 ± 0.5 to 95.5 ± 0.5", "2", "yes"]

    none = {"lam": np.nan, "nu": np.nan}
    runs = [a_run(s, {MILLION: x}, lam=0.0) for s, x in enumerate((50.0, 54.0))]  # 52, standard error 2
    runs += [a_run(s, {MILLION: x}) for s, x in enumerate((60.0, 64.0))]
    runs += [a_run(0, {MILLION: 61.0}, lam=1.0), *(a_run(s, {MILLION: None}, lam=1.0) for s in (1, 2))]
    runs += [a_run(s, {MILLION: x}, script="iql", **none) for s, x in enumerate((57.5, 57.5))]
    runs += [a_run(s, {MILLION: x}, script="td3bc", **none) for s, x in enumerate((57.0, 59.0))]
    means = (("lam", 0.0, 3.0), ("lam", 0.25, 2.0), ("lam", 1.0, 4.0), ("nu", 0.01, 3.0), ("nu", 1.0, 1.0))
    for name, value, q_values in means:
        score = {MILLION: 9.98 if value in (0, 1) else 10.0}  # equal as shown
        runs.append(a_run(0, score, env_id="walker2d-medium-v2", run=f"{name}{value}", **{name: value}))
        runs[-1][-1]["q_values"] = q_values
    data = pd.DataFrame([row for run in runs for row in run]).reindex(columns=COLUMNS)
    data = data.fillna(dict.fromkeys(evaluations.WORDS, ""))
    runs = evaluations.summarise_runs(data)
    cells = evaluations.summarise_cells(runs)
    rows = pd.DataFrame(claims.claims(runs, cells, evaluations.choose(cells))).set_index(["claim", "data"])
    hopper, walker = (f"{name}-medium-v2, 1,000,000 steps, " for name in ("hopper", "walker2d"))
    against = "DMG 62.0 ± 2.0, TD3BC 58.0 ± 1.0, IQL 57.5 ± 0.0"
    numbers = {
        # 62 - 58 is less than two standard errors, sqrt(4 + 1) each
        (total, "D4RL v2 locomotion, 1,000,000 steps, 1 set"): [against, "2", "not clear"],
        (lam, hopper + "nu 0.1"): ["lam 0: 52.0 ± 2.0, lam 0.25: 62.0 ± 2.0, lam 1: diverged", "2 to 3", "yes"],
        (lam, walker + "nu 0.1"): ["lam 0: 10.0, lam 0.25: 10.0, lam 1: 10.0", "1", "not clear, one seed"],
        (q.format("grows", "lam"), walker + "nu 0.1"): ["lam 0: 3.0, lam 0.25: 2.0, lam 1: 4.0", "1", "no, one seed"],
        (q.format("falls", "nu"), walker + "lam 0.25"): ["nu 0.01: 3.0, nu 0.1: 2.0, nu 1: 1.0", "1", "yes, one seed"],
    }  # fmt: skip
    assert {key: rows.loc[key].tolist() for key in numbers} == numbers
    assert claims.answer([(claims.Measured(1.0, 0.0, 1), claims.Measured(1.2, 0.05, 3))]) == "yes, one seed"
    assert claims.answer([(claims.Measured(1.0, 0.1, 2), claims.Measured(1.2, 0.0, 3))]) == "not clear"


def test_of_one_seed_the_spread_of_its_episodes_counts():
    """3 of 100 mazes after 1 of 100 is nothing; 12 of 100 is."""
    found = {}
    for seed, rate in ((0, 0.03), (1, 0.12)):
        rows = a_run(
            seed, {MILLION: 1.0, 2 * MILLION: 100 * rate}, "antmaze-umaze-v2", "dmg_finetune", nu=0.5, online=MILLION
        )
        for row, mean in zip(rows[1:], (0.01, rate), strict=True):
            row |= {"return_mean": mean, "return_std": math.sqrt(mean * (1 - mean)), "episodes": 100}
        runs = evaluations.summarise_runs(
            pd.DataFrame(rows).reindex(columns=COLUMNS).fillna(dict.fromkeys(evaluations.WORDS, ""))
        )
        errors = runs.loc[0, ["handed_over_error", "normalized_score_error"]]
        assert errors.tolist() == pytest.approx([10 * math.sqrt(x * (1 - x)) for x in (0.01, rate)])
        cells = evaluations.summarise_cells(runs)
        (row,) = claims.claims(runs, cells, evaluations.choose(cells))
        found[rate] = row["holds"]
    assert found == {0.03: "not clear, one seed", 0.12: "yes, one seed"}


def test_rliable_recomputed(by_hand):
    numbers = pd.read_csv(by_hand[0] / "rliable-d4rl-v2-locomotion-1000000-steps.csv").set_index("algorithm")
    # 90, 100, 110: a quarter of three is none, so the mean; 50 to 53: the mean of the middle two; 12 of 12 pairs
    assert numbers.estimate.to_dict() == {"DMG": 100.0, "IQL": 51.5, "DMG > IQL": 1.0}
    assert 90 <= numbers.low["DMG"] < 100 < numbers.high["DMG"] <= 110


def test_run_times(by_hand):
    numbers = pd.read_csv(by_hand[0] / "run_time.csv").set_index("what")
    hours = numbers["hours per 1M steps"]  # an hour each: one of them for half the steps
    assert hours["DMG, locomotion, m"] == round((15 * 1 + 2) / 16, 2) and hours["IQL, locomotion, m"] == 1


def test_the_run_time_bars_have_room_beside_a_long_name(by_hand, cli, tmp_path, monkeypatch):
    save, seen = report.save, []

    def spy(figure, path):
        if path.name == "run_time.png":
            figure.canvas.draw()
            (axis,) = figure.axes
            words = [x.get_window_extent() for x in (axis.xaxis.label, *axis.get_yticklabels())]
            left, right = min(x.x0 for x in words), figure.get_window_extent().x1 - max(x.x1 for x in words)
            seen.append((axis.get_window_extent().width / figure.dpi, left, right))
        return save(figure, path)

    monkeypatch.setattr(report, "save", spy)
    rows = a_run(0, {MILLION: 1.0}, machine="two cores of a machine that others use too, " * 3)
    pd.DataFrame(rows).reindex(columns=COLUMNS).to_csv(tmp_path / "evaluations.csv", index=False)
    assert cli("--folder", tmp_path)[0] == 0
    ((inches, left, right),) = seen
    assert inches > 3 and left >= 0 and right >= 0


def test_a_curve_that_never_leaves_zero_is_not_magnified(cli, tmp_path, monkeypatch):
    save, seen = report.save, []

    def spy(figure, path):
        seen.extend(axis.get_ylim() for axis in figure.axes if path.name.startswith("curves-"))
        return save(figure, path)

    monkeypatch.setattr(report, "save", spy)
    rows = a_run(0, {500_000: 0.0, MILLION: 0.0}, env_id="antmaze-umaze-v2", nu=0.5)
    pd.DataFrame(rows).reindex(columns=COLUMNS).to_csv(tmp_path / "evaluations.csv", index=False)
    assert cli("--folder", tmp_path)[0] == 0
    ((low, high),) = seen
    assert low < 0 < high and high - low >= 1


def test_every_picture_of_the_report_is_there_and_shows_something(by_hand):
    folder, text = by_hand
    named = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(named) == sorted(path.name for path in folder.glob("*.png"))
    assert {name.split("-")[0] for name in named} == {"curves", "ablation", "rliable", "run_time.png"}
    for name in named:
        pixels = plt.imread(folder / name)[..., :3]
        assert min(pixels.shape[:2]) > 150 and 0.005 < (pixels < 0.5).all(-1).mean() < 0.5, name
    assert not list(folder.glob("tmp-*"))


def test_axes_have_units_and_crosses_mark_divergence(by_hand, monkeypatch, tmp_path):
    figures = {}
    monkeypatch.setattr(report, "save", lambda figure, path: figures.update({path.name: figure}) or path.name)
    data = evaluations.collect((), by_hand[0] / "evaluations.csv", "")
    report.report(data, report.Args(folder=tmp_path, bootstrap_samples=5))
    axes = [axis for figure in figures.values() for axis in figure.axes if axis.get_visible()]
    for axis in axes:
        labels = [axis.get_xlabel()] + [axis.get_ylabel()] * (axis.get_ylabel() != "")
        upper = axis.get_subplotspec().is_first_row() and not axis.get_subplotspec().is_last_row()
        assert all(re.search(r"\(.+\)|steps", label) for label in labels if label) and (any(labels) or upper)
    lam = [axis for axis in axes if "lam (1)" in axis.get_xlabel() or axis.get_title().endswith("nu = 0.1")]
    assert len(lam) == 2  # score and Q
    for axis in lam:
        crosses = [line for line in axis.lines if line.get_marker() == "x"]
        assert {(line.get_xdata()[0]) for line in crosses} == {0.25, 1.0}
        assert {text.get_text() for text in axis.texts} == {"1/5", "1/6"}
    assert [lam[0].lines[0].get_xydata()[:, 1].tolist(), lam[1].lines[0].get_ydata().tolist()] == [[100, 12], [5, 5]]

    (axis,) = figures["curves-d4rl-v2-locomotion-1000000-steps.png"].axes
    dmg = [line.get_xydata().tolist() for line in axis.lines if line.get_color() == report.STYLES["DMG"][0]]
    # at half time 1, 1, 1, 80, 80: of seed 1 the run that came further; one of the 80 diverged
    assert dmg == [[[500_000, 32.6], [MILLION, 100.0]], [[500_001, 80.0]]]


def test_run_folders_become_rows_once_and_are_not_needed_again(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    arrays = d4rl_arrays()
    write_hdf5("good.hdf5", arrays)
    write_hdf5("bad.hdf5", arrays | {"rewards": 1e25 * arrays["rewards"]})
    flags = "--gradient-steps 20 --eval-frequency 10 --eval-episodes 1 --batch-size 8 --no-cuda --env-id Hopper-v4"
    for name, seed in (("good", 0), ("good", 1), ("bad", 0)):
        argv = ["dmg_offline.py", *flags.split(), "--dataset-path", f"{name}.hdf5", "--seed", str(seed)]
        monkeypatch.setattr(sys, "argv", argv)
        assert dmg_offline.main() == (0 if name == "good" else 3)
    assert cli("runs", "--machine", "mine", "--bootstrap-samples", "5")[0] == 0
    first = Path("report/report.md").read_text()
    assert "| Hopper-v4 (bad.hdf5) | - (0, 1 diverged), nu 0.1 |" in first

    data = pd.read_csv("report/evaluations.csv", keep_default_na=False, float_precision="round_trip")
    assert set(data.machine) == {"mine"} and set(data.lam) == {0.25}
    for folder in Path("runs").glob("*"):
        rows, found = data[data.run == folder.name], (folder / "eval.csv").read_text().splitlines()[1:]
        if len(found):
            events = EventAccumulator(str(folder)).Reload()
            q = {event.step: event.value for event in events.Scalars("losses/q_values")}
            assert rows.step.tolist() == [0, 10, 20] and set(rows.diverged) == {0}
            for row, line in zip(rows[1:].to_dict("records"), found, strict=True):
                assert [float(row[name]) for name in dmg_offline.EVAL_COLUMNS] == [float(x) for x in line.split(",")]
                assert float(row["q_values"]) == pytest.approx(q[row["step"]])
        else:
            assert rows[["step", "diverged"]].values.tolist() == [[0, 0], [10, 1]]

    before = Path("report/evaluations.csv").read_bytes()
    assert cli("runs", "--bootstrap-samples", "5")[0] == 0  # found again, the machine not named
    assert Path("report/evaluations.csv").read_bytes() == before
    Path("runs").rename("lost")
    Path("report/report.md").unlink()
    assert cli("--bootstrap-samples", "5")[0] == 0
    assert Path("report/report.md").read_text() == first


def test_a_run_that_was_resumed_with_more_steps_is_a_longer_run(tmp_path, monkeypatch):
    """Of online ones args.json, which knows the first start alone, cannot tell which steps they are."""
    monkeypatch.chdir(tmp_path)
    file = write_hdf5("good.hdf5", d4rl_arrays())
    fast = ["--eval-frequency", "10", "--eval-episodes", "1", "--batch-size", "8", "--no-cuda"]
    offline, online = ["--env-id", "Hopper-v4", "--dataset-path", file], ["--env-id", "Hopper-v5", "--from-scratch"]
    for script, flag, flags in (
        (dmg_offline, "--gradient-steps", offline),
        (dmg_finetune, "--online-steps", [*online, "--learning-starts", "5"]),
    ):
        monkeypatch.setattr(sys, "argv", [script.__name__, flag, "10", *flags, *fast])
        assert script.main() == 0
        (folder,) = Path("runs").glob(f"*__{script.__name__}__*")
        monkeypatch.setattr(sys, "argv", [script.__name__, "--resume", str(folder), flag, "20"])
        assert script.main() == 0
        rows = evaluations.read_run(folder, "")
        expected = (20, 0) if script is dmg_offline else (0, 20)
        assert {(row["gradient_steps"], row["online_steps"]) for row in rows} == {expected} and rows[-1]["step"] == 20
    (folder,) = Path("runs").glob("*__dmg_offline__*")
    (folder / "checkpoint.pt").unlink()  # to save space
    assert {row["gradient_steps"] for row in evaluations.read_run(folder, "")} == {20}


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken/a__b__0__1").mkdir(parents=True)
    Path("broken/a__b__0__1/args.json").write_text("{")
    Path("bad/Hopper-v4__dmg_offline__0__1").mkdir(parents=True)
    Path("bad/Hopper-v4__dmg_offline__0__1/args.json").write_text("{}")
    Path("bad/Hopper-v4__dmg_offline__0__1/checkpoint.pt").write_bytes(b"1")
    Path("old").mkdir()
    Path("old/evaluations.csv").write_text("step,return_mean\n1,2\n")
    for argv, words in (
        ([], "no runs"),
        (["nowhere"], "nowhere"),
        (["broken"], "broken/a__b__0__1"),
        (["bad"], "bad/Hopper-v4__dmg_offline__0__1"),
        (["--folder", "old"], "normalized_score"),
    ):
        code, err = cli(*argv)
        assert code == 2 and words in err and err.count("\n") == 1, err


def test_the_papers_numbers_add_up_to_its_totals_but_for_its_known_slips():
    slips = {}
    for (table, name), rows in PAPER.groupby(["table", "algorithm"]):
        for domain in ("locomotion", "antmaze"):
            total = rows.score[rows.env_id == f"{domain}-total"]
            parts = rows[rows.env_id.isin(D4RL) & (rows.env_id.str.startswith("antmaze") == (domain == "antmaze"))]
            if len(total) and abs(slip := total.iloc[0] - parts.score.sum()) > 0.05:
                slips[table, name] = round(slip, 1)
    assert slips == {(2, "DMG"): -0.1, (3, "XQL+DMG"): 0.1, (3, "SQL+DMG"): -0.1, (4, "DMG online"): 5.0}
    assert set(D4RL) == set(dmg_offline.D4RL_SHA256) and len(PAPER[PAPER.table == 2]) == 10 * (21 + 2)
