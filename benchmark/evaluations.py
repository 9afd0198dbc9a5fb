"""Run folders -> a row for each evaluation -> runs -> cells, whose runs differ in their seed alone."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PAPER = pd.read_csv(Path(__file__).with_name("paper.csv"))
D4RL = [name for name in PAPER.env_id[PAPER.table == 6] if name.endswith("-v2")]
D4RL += [f"{robot}-full-replay-v2" for robot in ("halfcheetah", "hopper", "walker2d")]
SCRIPTS = {"offline_steps": "dmg_finetune", "online_steps": "iql", "lam": "dmg_offline"}  # by an argument
CELL = ["algorithm", "script", "env_id", "dataset", "lam", "nu", "gradient_steps", "online_steps", "flags"]
RUN = [*CELL, "seed", "run"]
COLUMNS = [*RUN, "step", "return_mean", "return_std", "normalized_score"]
COLUMNS += ["q_values", "steps_per_second", "diverged"]
# arguments that do not change what is learned or how it is scored, and those that have a column
ASIDE = """seed dataset_path offline_steps checkpoint resume cuda torch_deterministic matmul_precision
    compile cudagraphs eval_frequency capture_video track exp_name wandb_project_name wandb_entity
    versions from_scratch save_dataset eval_only num_seeds torch gymnasium mujoco minari commit"""
ASIDE = {*CELL, *ASIDE.split()}


def is_antmaze(env_id):
    return "antmaze" in re.findall("[a-z]+(?!.*dense)", env_id.lower())  # as the scripts


def algorithm(args, script):
    """Name in the paper's tables, or exp_name where it is not the script's: of a copy, or the user's."""
    if args.get("exp_name", script) != script:
        return args["exp_name"]
    if args.get("from_scratch"):
        return "TD3"
    if script == "td3bc":
        return "TD3+BC"
    name = args["in_sample"].upper()
    if script == "iql":
        return name
    return "DMG" if name == "IQL" else f"{name}+DMG"


def read_events(folder):
    """{tag: {step: value}} of a run's TensorBoard log."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def read_run(path):
    """Rows of COLUMNS, one for each evaluation and one where it diverged.

    path: args.json of a run folder, or NAME.json beside NAME.csv, copies of args.json and eval.csv.
    """
    kept = path.name != "args.json"
    csv = path.with_suffix(".csv") if kept else path.with_name("eval.csv")
    args = json.loads(path.read_text())
    data = pd.DataFrame({"step": [], "return_mean": []})
    if csv.exists() and csv.stat().st_size:
        data = pd.read_csv(csv, float_precision="round_trip")  # "None", an older run's, is NaN
    # a resumed run does steps again: a row replaces those above it of its own and of later steps
    data = data[data.step < data.step[::-1].cummin()[::-1].shift(-1, fill_value=np.inf)]
    data["diverged"] = data.return_mean.isna().astype(int)  # the row that a diverged run ends with
    events = {} if kept else read_events(path.parent)
    data["q_values"] = data.step.map(events.get("losses/q_values", {}))
    data["steps_per_second"] = data.step.map(events.get("charts/SPS", {}))
    diverged = {*events.get("eval/diverged", {})} - {*data.step}  # an older run had no such row
    data = pd.concat([data, pd.DataFrame({"step": sorted(diverged), "diverged": 1})])
    script = next((script for key, script in SCRIPTS.items() if key in args), "td3bc")
    if args.get("in_sample") == "iql":
        args.pop("in_sample_temperature", None)  # not in use
    default = script != "iql" and not is_antmaze(args["env_id"]) and not args.get("from_scratch")
    if args.get("normalize_states") == default:
        args.pop("normalize_states")  # which older versions did not write
    online = args.get("online_steps", 0)
    offline = args.get("gradient_steps", args.get("offline_steps"))
    data["algorithm"] = algorithm(args, script)
    data["script"] = args.get("script", "")[:8]  # of its bytes; an older run has none
    data["run"] = "/".join(path.with_suffix("").parts[-2:])
    data["dataset"] = "/".join(Path(args["dataset_path"] or "").parts[-2:])
    for name in ("env_id", "lam", "nu", "seed"):
        data[name] = args.get(name)
    # an older run that was resumed with more steps is a longer run
    data["gradient_steps"] = 0 if args.get("from_scratch") else max([offline, *(data.step - online)])
    data["online_steps"] = online
    flags = [name for name in sorted(args) if name not in ASIDE and args[name] is not None]
    data["flags"] = " ".join(f"{name}={args[name]}".replace(" ", "") for name in flags)
    return data.reindex(columns=COLUMNS)


def collect(sources):
    """The evaluations of all runs below these folders and in report.py's earlier files. Raises ValueError."""
    found = []
    for source in map(Path, sources):
        if not source.exists() or source.name == "eval.csv":
            raise ValueError(f"{source} is no folder of runs, nor an evaluations.csv of report.py")
        if source.suffix == ".csv":
            earlier = pd.read_csv(source, float_precision="round_trip", dtype=dict.fromkeys(CELL[:4], str))
            found.append(earlier.reindex(columns=COLUMNS))
        for path in sorted(source.rglob("*.json")):
            if not path.stat().st_size or not (path.name == "args.json" or path.with_suffix(".csv").exists()):
                continue  # of a full disk, or of no run
            try:
                found.append(read_run(path))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path.parent} is no run of these scripts: {error!r}") from error
    if not any(map(len, found)):
        raise ValueError(f"no evaluated runs in {' '.join(map(str, sources))}")
    found = [x.dropna(axis=1, how="all") for x in found]
    data = pd.concat(found, ignore_index=True).reindex(columns=COLUMNS)
    data = data.fillna({"script": "", "dataset": "", "flags": ""})
    return data.drop_duplicates([*RUN, "step", "diverged"], keep="last").sort_values([*RUN, "step"])


def kind_of(cell):
    """What must not share a table: D4RL's own files, D4RL made again, and all else."""
    if cell.env_id not in D4RL:
        return "other data"
    return "D4RL made again" if cell.dataset else "D4RL v2"


def summarize_runs(data):
    """One row for each cell and seed: the state of its run, last score, Q and time, the hand-over's score."""
    runs = []
    for key, run in data.groupby(RUN, dropna=False):
        row = dict(zip(RUN, key, strict=True))
        evaluated = run[run.diverged == 0]
        # without reference returns there is no score
        score = evaluated.normalized_score.fillna(evaluated.return_mean)
        raw = evaluated.normalized_score.isna().all()
        row |= {"state": "unfinished", "step": 0, "score": np.nan, "raw": raw}
        if len(evaluated):
            row |= dict(evaluated[["step", "q_values", "steps_per_second"]].iloc[-1])
            row["score"] = score.iloc[-1]
            row["handed_over"] = score[evaluated.step == row["gradient_steps"]].max()
        if row["step"] >= row["gradient_steps"] + row["online_steps"]:
            row["state"] = "finished"
        if run[run.diverged == 1].step.max() > row["step"]:
            row["state"] = "diverged"
        runs.append(row)
    # of a seed that was run twice the run that came furthest counts
    runs = pd.DataFrame(runs).sort_values(["step", "run"]).drop_duplicates([*CELL, "seed"], keep="last")
    return runs.sort_values([*CELL, "seed"], ignore_index=True)


def paper_values(cell):
    """Numbers of App. C.1 and TD3+BC's paper, likely to be changed; read_run drops C.1's normalize_states."""
    words = re.findall("[a-z]+", f"{cell.env_id} {Path(cell.dataset).name}".lower())
    expert = "expert" in words
    found = {"nu": 10 if expert else 0.1, "expectile": 0.7, "inverse_temperature": 3.0, "eval_episodes": 10}
    if is_antmaze(cell.env_id):
        found = {"nu": 0.5, "expectile": 0.9, "inverse_temperature": 10.0, "eval_episodes": 100}
    found |= {"lam": 0.25, "alpha": 2.5, "gamma": 0.99, "learning_rate": 3e-4, "batch_size": 256}
    found |= {"policy_frequency": 2, "policy_noise": 0.2, "noise_clip": 0.5, "target_update_rate": 0.005}
    found |= {"lam_end": 0.5, "nu_end": 0.005, "exploration_noise": 0.1, "normalize_states": "as in C.1"}
    found["gamma_online"] = 0.995 if {"antmaze", "large"} <= {*words} else 0.99
    found["in_sample_temperature"] = 2.0 if "in_sample=sql" in cell["flags"] and not expert else 5.0
    return found if cell.gradient_steps else found | {"lam": 1, "nu": 0, "lam_end": 1.0, "nu_end": 0.0}  # TD3


def settings(cell, first):
    """What a cell has other than the first of its algorithm on this set, and than the paper."""

    def values(x):
        found = dict(flag.split("=", 1) for flag in x["flags"].split())
        return found | {name: f"{x[name]:g}" for name in ("lam", "nu") if not pd.isna(x[name])}

    own = values(cell)
    common = values(first) | {name: str(x) for name, x in paper_values(cell).items() if name in own}
    return " ".join(f"{x}={own.get(x)}" for x in own | common if own.get(x) != common.get(x))


def counted(runs):
    """Those of a cell's runs that its mean is of: the finished, or the furthest unfinished."""
    finished = runs[runs.state == "finished"]
    unfinished = runs[(runs.state == "unfinished") & runs.score.notna()]
    return finished if len(finished) else unfinished[unfinished.step == unfinished.step.max()]


def summarize_cells(runs):
    """One row for each cell: mean and sample deviation of last scores, the first of their steps."""
    cells = []
    for key, cell in runs.groupby(CELL, dropna=False):
        row = dict(zip(CELL, key, strict=True))
        those = counted(cell)
        row |= {"n": len(those), "step": those.step.min(), "raw": cell.raw.all()}
        row["mean"], row["std"] = those.score.mean(), those.score.std()
        row["q_values"], row["steps_per_second"] = those.q_values.mean(), those.steps_per_second.mean()
        row["handed_over"], row["handed_over_std"] = those.handed_over.mean(), those.handed_over.std()
        row |= {state: (cell.state == state).sum() for state in ("diverged", "unfinished")}
        cells.append(row)
    cells = pd.DataFrame(cells)
    cells["data"] = cells.apply(kind_of, axis=1)
    # runs of D4RL made again share a table whatever their length, which is said beside the score
    cells["length"] = cells.gradient_steps.where(cells.data != "D4RL made again", 0)
    cells["set"] = cells.env_id + cells.dataset.map(lambda name: f" ({name})" if name else "")
    cells["rank"] = [[*D4RL, x].index(x) for x in cells.env_id]  # the paper's order
    # a name by itself where all its runs in a table are of one script
    table = ["data", "length", "online_steps"]
    several = cells.groupby(["algorithm", *table]).script.transform("nunique") > 1
    suffix = " (script " + cells.script.str[:6] + ")"
    cells["label"] = cells.algorithm + suffix.where(several & (cells.script != ""), "")
    # first of its label on a set: the paper's lam and nu, then most runs and steps
    cells["default"] = [settings(cell, cell) == "" for _, cell in cells.iterrows()]
    cells = cells.sort_values(["default", "n", "step"], ascending=False, kind="stable")
    for _, group in cells.groupby(["label", "set", *table]):
        for number, cell in group.iterrows():
            cells.loc[number, "settings"] = settings(cell, group.iloc[0])
    again = cells.duplicated(["label", "set", *table, "settings"])  # they differ in their planned steps alone
    cells.loc[again, "settings"] += cells.gradient_steps.map(" steps={:.0f}".format)
    cells["settings"] = cells.settings.str.strip()
    cells["legend"] = (cells.label + " " + cells.settings).str.strip()
    return cells.sort_values(["data", "rank", "set", "settings", "label"], ignore_index=True)


def of_cell(rows, cell):
    """The rows that belong to a cell; an empty lam equals an empty lam."""
    same = np.ones(len(rows), bool)
    for name in CELL:
        same &= (rows[name] == cell[name]) | (rows[name].isna() & pd.isna(cell[name]))
    return rows[same]
