"""Run folders -> a row for each evaluation -> runs -> cells, whose runs differ in their seed alone."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PAPER = pd.read_csv(Path(__file__).with_name("paper.csv"))
D4RL = [name for name in PAPER.env_id[PAPER.table == 6] if name.endswith("-v2")]
SCRIPTS = {"offline_steps": "dmg_finetune", "online_steps": "iql", "lam": "dmg_offline"}  # by an argument
CELL = ["algorithm", "env_id", "dataset", "lam", "nu", "gradient_steps", "online_steps", "flags"]
RUN = [*CELL, "seed", "run"]
COLUMNS = ["step", "return_mean", "return_std", "normalized_score", "episodes", "wall_seconds"]
COLUMNS = [*RUN, *COLUMNS, "q_values", "diverged"]
# arguments that do not change what is learned or how it is scored, and those that have a column
ASIDE = """seed dataset_path offline_steps checkpoint resume cuda torch_deterministic matmul_precision
    compile cudagraphs eval_frequency capture_video track exp_name wandb_project_name wandb_entity
    versions from_scratch save_dataset eval_only num_seeds torch gymnasium mujoco minari commit"""
ASIDE = {*CELL, *ASIDE.split()}


def is_antmaze(env_id):
    return "antmaze" in env_id.lower().replace("_", "")


def algorithm(args):
    """Name in the paper's tables, or --exp-name where the user gave one."""
    script = next((script for key, script in SCRIPTS.items() if key in args), "td3bc")
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


def scalars(folder, tag):
    """{step: value} of a TensorBoard tag; nothing where the log or the tag is missing."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if tag not in events.Tags()["scalars"]:
        return {}
    return {event.step: event.value for event in events.Scalars(tag)}


def read_run(path):
    """Rows of COLUMNS, one for each evaluation and one where it diverged.

    path: args.json of a run folder, or NAME.json beside NAME.csv, copies of args.json and eval.csv.
    """
    kept = path.name != "args.json"
    csv = path.with_suffix(".csv") if kept else path.with_name("eval.csv")
    args = json.loads(path.read_text())
    data = pd.read_csv(csv, float_precision="round_trip") if csv.exists() else pd.DataFrame({"step": []})
    q_values = {} if kept else scalars(path.parent, "losses/q_values")
    diverged = {} if kept else scalars(path.parent, "eval/diverged")
    data["q_values"] = data.step.map(q_values)
    data["diverged"] = 0
    if diverged:
        data = pd.concat([data, pd.DataFrame({"step": list(diverged), "diverged": 1})])
    if args.get("in_sample") == "iql":
        args.pop("in_sample_temperature")  # not in use
    if args.get("normalize_states") == (not is_antmaze(args["env_id"])):
        args.pop("normalize_states")  # the default, which older versions did not write
    online = args.get("online_steps", 0)
    offline = args.get("gradient_steps", args.get("offline_steps"))
    data["algorithm"] = algorithm(args)
    data["run"] = path.stem if kept else path.parent.name
    data["dataset"] = Path(args["dataset_path"] or "").name
    for name in ("env_id", "lam", "nu", "seed"):
        data[name] = args.get(name)
    # an older run that was resumed with more steps is a longer run
    data["gradient_steps"] = 0 if args.get("from_scratch") else max([offline, *(data.step - online)])
    data["online_steps"] = online
    flags = [name for name in sorted(args) if name not in ASIDE and args[name] is not None]
    data["flags"] = " ".join(f"{name}={args[name]}" for name in flags)
    return data.reindex(columns=COLUMNS)


def collect(sources):
    """The evaluations of all runs below these folders and in report.py's earlier files. Raises ValueError."""
    found = []
    for source in map(Path, sources):
        if source.suffix == ".csv" and source.exists():
            found.append(pd.read_csv(source, float_precision="round_trip")[COLUMNS])
        for path in sorted(source.rglob("*.json")):
            if path.name != "args.json" and not path.with_suffix(".csv").exists():
                continue
            try:
                found.append(read_run(path))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path.parent} is no run of these scripts: {error!r}") from error
    if not found:
        raise ValueError(f"no runs in {' '.join(map(str, sources))}")
    found = [x.dropna(axis=1, how="all") for x in found]
    data = pd.concat(found, ignore_index=True).reindex(columns=COLUMNS)
    for name in ("dataset", "flags"):
        data[name] = data[name].fillna("")
    data = data.drop_duplicates([*RUN, "step", "diverged"], keep="last")
    return data.sort_values([*RUN, "step"])


def kind_of(cell):
    """What must not share a table: D4RL's own files, D4RL made again, and all else."""
    if cell.env_id not in D4RL:
        return "other data"
    return "D4RL made again" if cell.dataset else "D4RL v2"


def summarise_runs(data):
    """One row for each cell and seed: the state of its run, last score, Q and time, the hand-over's score."""
    runs = []
    for key, run in data.groupby(RUN, dropna=False):
        row = dict(zip(RUN, key, strict=True))
        evaluated = run[run.diverged == 0]
        # without reference returns there is no score
        score = evaluated.normalized_score.fillna(evaluated.return_mean)
        row |= {"state": "unfinished", "step": 0, "score": np.nan}
        row["raw"] = evaluated.normalized_score.isna().all()
        if len(evaluated):
            last = evaluated.iloc[-1]
            row |= {name: last[name] for name in ("step", "q_values", "wall_seconds")}
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


def is_default(cell):
    """Whether lam and nu are those of App. C.1."""
    if "DMG" not in cell.algorithm:
        return True
    nu = 10 if "expert" in cell.env_id + cell.dataset else 0.1
    return cell.lam == 0.25 and cell.nu == (0.5 if is_antmaze(cell.env_id) else nu)


def summarise_cells(runs):
    """One row for each cell: mean and sample deviation of the last scores of its finished runs.

    Where none has finished, of its unfinished ones; `step` is then the first of their last steps.
    """
    cells = []
    for key, cell in runs.groupby(CELL, dropna=False):
        row = dict(zip(CELL, key, strict=True))
        counted = cell[cell.state == "finished"]
        if counted.empty:
            counted = cell[(cell.state == "unfinished") & cell.score.notna()]
        row |= {"n": len(counted), "step": counted.step.min(), "raw": cell.raw.all()}
        row["mean"], row["std"] = counted.score.mean(), counted.score.std()
        row["q_values"] = counted.q_values.mean()
        row["handed_over"] = counted.handed_over.mean()
        row["handed_over_std"] = counted.handed_over.std()
        row["hours"] = (counted.wall_seconds / counted.step).mean() * 1e6 / 3600
        for state in ("diverged", "unfinished"):
            row[state] = (cell.state == state).sum()
        cells.append(row)
    cells = pd.DataFrame(cells)
    cells["data"] = cells.apply(kind_of, axis=1)
    # runs of D4RL made again share a table whatever their length, which is said beside the score
    cells["length"] = cells.gradient_steps.where(cells.data != "D4RL made again", 0)
    cells["set"] = cells.env_id + cells.dataset.map(lambda name: f" ({name})" if name else "")
    cells["rank"] = [[*D4RL, x].index(x) for x in cells.env_id]  # the paper's order
    cells["default"] = cells.apply(is_default, axis=1)
    return cells.sort_values(["data", "rank", "set", "algorithm"], ignore_index=True)


def choose(cells):
    """The cells of the tables: the paper's lam and nu, and of other flags those with most runs and steps."""
    chosen = cells[cells.default].sort_values(["n", "step"], ascending=False, kind="stable")
    chosen = chosen.drop_duplicates(["algorithm", "set", "data", "length", "online_steps"])
    return chosen.sort_index()


def of_cell(rows, cell):
    """The rows that belong to a cell; an empty lam equals an empty lam."""
    same = np.ones(len(rows), bool)
    for name in CELL:
        same &= (rows[name] == cell[name]) | (rows[name].isna() & pd.isna(cell[name]))
    return rows[same]
