"""Run folders -> evaluations.csv (a row for each evaluation) -> runs -> cells (runs that differ in seed alone)."""

import io
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PAPER = pd.read_csv(Path(__file__).with_name("paper.csv"))
D4RL = [name for name in PAPER.env_id[PAPER.table == 6] if name.endswith("-v2")]
# runs that agree in all of these differ in their seed alone: a cell of a table
CELL = ["script", "env_id", "dataset", "in_sample", "lam", "nu", "gradient_steps", "online_steps", "flags"]
RUN = [*CELL, "seed", "run"]
COLUMNS = ["step", "return_mean", "return_std", "normalized_score", "length_mean", "episodes", "wall_seconds"]
COLUMNS = [*RUN, "machine", *COLUMNS, "q_values", "diverged"]
WORDS = ["script", "env_id", "dataset", "in_sample", "flags", "run", "machine"]
# arguments that do not change what is learned or how it is scored, and what else args.json holds
ASIDE = {*CELL, "seed", "dataset_path", "offline_steps", "checkpoint", "save_dataset", "resume", "eval_only", "cuda"}
ASIDE |= {"torch_deterministic", "matmul_precision", "compile", "cudagraphs", "num_seeds", "eval_frequency", "track"}
ASIDE |= {"capture_video", "wandb_project_name", "wandb_entity", "torch", "gymnasium", "mujoco", "minari", "commit"}


def refuse(condition: bool, sentence: str) -> None:
    if condition:
        print(sentence, file=sys.stderr)
        sys.exit(2)


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Let `writer` write under a temporary name, then rename: `path` is never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp-{path.name}")
    writer(temporary)
    os.replace(temporary, path)


def read_run(folder: Path, machine: str) -> list[dict]:
    """Rows of COLUMNS: one when the run began (step 0), one for each evaluation, one where it diverged."""
    args, checkpoint = json.loads((folder / "args.json").read_text()), folder / "checkpoint.pt"
    if checkpoint.exists():  # flags given beside --resume are in it alone
        args |= torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["args"]
    _, script, _, _ = folder.name.rsplit("__", 3)
    csv = folder / "eval.csv"
    evaluations = pd.read_csv(csv, float_precision="round_trip") if csv.exists() else pd.DataFrame({"step": []})
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    q = {e.step: e.value for e in events.Scalars("losses/q_values")} if "losses/q_values" in tags else {}
    diverged = {e.step for e in events.Scalars("eval/diverged")} if "eval/diverged" in tags else set()

    online = args.get("online_steps", 0)
    steps = args["gradient_steps"] if "gradient_steps" in args else args["offline_steps"]
    fixed = {"script": script, "run": folder.name, "machine": machine, "dataset": Path(args["dataset_path"] or "").name}
    fixed |= {name: args.get(name) for name in ("env_id", "in_sample", "lam", "nu", "seed")}
    # a run that was resumed with more steps is a longer run
    fixed |= {"gradient_steps": max([steps, *(evaluations.step - online)]), "online_steps": online}
    fixed["flags"] = " ".join(f"{name}={value}" for name, value in sorted(args.items()) if name not in ASIDE)
    rows = {0: {}} | {row["step"]: row for row in evaluations.to_dict("records")} | {step: {} for step in diverged}
    return [
        fixed | row | {"step": int(step), "q_values": q.get(step), "diverged": int(step in diverged)}
        for step, row in rows.items()
    ]


def read_csv(source: Path | io.StringIO) -> pd.DataFrame:
    data = pd.read_csv(source, dtype=dict.fromkeys(WORDS, str), float_precision="round_trip")
    refuse(missing := sorted(set(COLUMNS) - set(data)), f"{source} lacks the columns {', '.join(missing)}.")
    return data[COLUMNS].fillna(dict.fromkeys(WORDS, ""))


def collect(folders: tuple[Path, ...], path: Path, machine: str) -> pd.DataFrame:
    """The rows of `path` and what is new in `folders`, each evaluation once; written back to `path`."""
    rows = []
    for folder in folders:
        refuse(not folder.is_dir(), f"there is no folder {folder}.")
        for found in sorted(folder.rglob("args.json")):
            try:
                rows += read_run(found.parent, machine)
            except (ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
                refuse(True, f"{found.parent} is no run folder of these scripts: {error!r}. Move it away.")
    refuse(
        not rows and not path.exists(),
        "no runs: give folders that hold run folders, or a --folder with an evaluations.csv.",
    )
    old = [read_csv(path)] if path.exists() else []
    # through text, so that old and new numbers are equal when they look equal
    new = [read_csv(io.StringIO(pd.DataFrame(rows).reindex(columns=COLUMNS).to_csv(index=False)))] if rows else []
    data = pd.concat([*old, *new], ignore_index=True)
    data["machine"] = data.groupby(RUN, dropna=False).machine.transform("max")  # known once, known for ever
    data = data.drop_duplicates([*RUN, "step"], keep="last").sort_values([*RUN, "step"], ignore_index=True)
    write(path, lambda temporary: data.to_csv(temporary, index=False))
    return data


def summarise_runs(data: pd.DataFrame) -> pd.DataFrame:
    """One row for each cell and seed: the state of its run, the last score, Q and time, the score at the hand-over."""
    runs = []
    for key, run in data.groupby(RUN, dropna=False):
        row = dict(zip(RUN, key, strict=True))
        scored = run.dropna(subset="normalized_score")
        # standard error of a score over its episodes: all that is known of the spread of one seed
        spread = [np.ptp(scored[name]) if len(scored) else 0.0 for name in ("normalized_score", "return_mean")]
        scale = spread[0] / spread[1] if spread[1] else 0.0
        scored = scored.assign(error=scale * scored.return_std / np.sqrt(scored.episodes))
        last = scored.iloc[-1] if len(scored) else run.iloc[0]
        handed_over = scored[scored.step == row["gradient_steps"]]
        diverged = run.step[run.diverged == 1].max() > last.step
        finished = len(scored) > 0 and last.step >= row["gradient_steps"] + row["online_steps"]
        row |= {name: last[name] for name in ("machine", "step", "normalized_score", "wall_seconds", "q_values")}
        row |= {"raw": last.normalized_score == last.return_mean != 0, "normalized_score_error": last.get("error")}
        row |= {"handed_over": handed_over.normalized_score.max(), "handed_over_error": handed_over.error.max()}
        runs.append(row | {"state": "diverged" if diverged else "finished" if finished else "unfinished"})
    runs = pd.DataFrame(runs)
    # a seed that was run twice counts once: the run that came furthest
    rank = runs.state.map({"finished": 2, "diverged": 1, "unfinished": 0})
    order = runs.assign(rank=rank).sort_values(["rank", "step", "run"], ascending=False).index
    return runs.loc[order].drop_duplicates([*CELL, "seed"]).sort_values([*CELL, "seed"], ignore_index=True)


def algorithm(cell: pd.Series) -> str | None:
    """Name in the paper's tables, None for other scripts."""
    name = cell.in_sample.upper()
    if cell.script == "dmg_finetune" and cell.gradient_steps == 0:
        return "TD3"
    if cell.script.startswith("dmg_"):
        return "DMG" if name == "IQL" else f"{name}+DMG"
    return {"iql": name, "td3bc": "TD3BC"}.get(cell.script)


def is_paper_setting(cell: pd.Series) -> bool:
    """lam and nu of App. C.1, which knows no nu for a file of the user's own: any will do there."""
    if "DMG" not in (cell.algorithm or ""):
        return cell.algorithm is not None
    if cell.dataset:
        return cell.lam == 0.25
    antmaze, name = "antmaze" in cell.env_id.lower().replace("_", ""), Path(cell.env_id).name + cell.dataset
    return cell.lam == 0.25 and cell.nu == (0.5 if antmaze else 10 if "expert" in name else 0.1)


def summarise_cells(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each cell: mean, sample standard deviation and 95 % interval (Student's t) over finished seeds."""
    cells = []
    for key, cell in runs.groupby(CELL, dropna=False):
        row, done = dict(zip(CELL, key, strict=True)), cell[cell.state == "finished"]
        n, std = len(done), done.normalized_score.std()
        row |= {"n": n, "mean": done.normalized_score.mean(), "std": std, "raw": cell.raw.any()}
        row |= {"ci": stats.t.ppf(0.975, n - 1) * std / np.sqrt(n) if n > 1 else np.nan}
        row |= {"handed_over": done.handed_over.mean(), "handed_over_std": done.handed_over.std()}
        row |= {state: (cell.state == state).sum() for state in ("diverged", "unfinished")}
        cells.append(row)
    cells = pd.DataFrame(cells)
    d4rl = cells.env_id.isin(D4RL) & (cells.dataset == "")  # a file given by hand may hold anything
    domain = np.where(cells.env_id.str.startswith("antmaze"), "antmaze", "locomotion")
    cells["data"] = np.where(d4rl, [f"D4RL v2 {name}" for name in domain], "other data")
    cells["set"] = cells.env_id + cells.dataset.map(lambda name: f" ({name})" if name else "")
    order = [name for name in D4RL if name in set(cells["set"])]  # the paper's
    cells["set"] = pd.Categorical(cells["set"], [*order, *sorted(set(cells["set"]) - set(order))])
    cells["algorithm"] = cells.apply(algorithm, axis=1)
    cells["paper_setting"] = cells.apply(is_paper_setting, axis=1)
    return cells


def of_cell(rows: pd.DataFrame, cell: pd.Series) -> pd.DataFrame:
    """The rows that belong to a cell; an empty lam equals an empty lam."""
    same = [(rows[name] == cell[name]) | (rows[name].isna() & pd.isna(cell[name])) for name in CELL]
    return rows[np.logical_and.reduce(same)]


def choose(cells: pd.DataFrame) -> pd.DataFrame:
    """The paper's settings, and of those the flags with the most finished seeds: one cell for each place in a table.

    Of nu and flags with as many seeds each, those that have the most over all sets.
    """
    cells = cells.assign(everywhere=cells.groupby(["nu", "flags"], dropna=False).n.transform("sum"))
    cells = cells[cells.paper_setting].sort_values(["n", "everywhere"], ascending=False, kind="stable")
    cells = cells.drop_duplicates(["algorithm", "set", "data", "gradient_steps", "online_steps"])
    return cells.sort_index()
