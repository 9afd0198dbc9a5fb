"""Tables and figures in the paper's form (Tables 2, 3, 4, 6, Figs. 1-6) and rliable's, from run folders.

    python benchmark/report.py runs benchmark-runs --folder report

Every evaluation found goes into {folder}/evaluations.csv beside those that are there already, so that results of many
machines add up and outlive their run folders; {folder}/report.md and its pictures are made from that file alone.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from claims import ablations, claims
from evaluations import D4RL, PAPER, choose, collect, of_cell, refuse, summarise_cells, summarise_runs, write
from matplotlib.ticker import EngFormatter
from rliable import library as rly
from rliable import metrics

plt.switch_backend("agg")

# what is compared in one picture; lines that differ in grey too
FAMILIES = {"": ("DMG", "IQL", "TD3BC", "TD3"), ", XQL and SQL": ("XQL+DMG", "XQL", "SQL+DMG", "SQL")}
STYLES = {
    "DMG": ("#000000", "-", "o"), "IQL": ("#c0504d", "--", "s"), "TD3BC": ("#4f9bd9", "-.", "^"),
    "TD3": ("#a6a6a6", ":", "*"), "XQL+DMG": ("#000000", "-", "o"), "XQL": ("#7f7f7f", "--", "v"),
    "SQL+DMG": ("#1b5e20", ":", "P"), "SQL": ("#8bc34a", "-.", "X"),
}  # fmt: skip


@dataclasses.dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """folders that hold run folders, at any depth (default: none, evaluations.csv alone)"""
    folder: Path = Path("report")
    """where evaluations.csv is read and written, and the report goes"""
    machine: str = ""
    """on what these runs ran ("RTX 3090"): run times of different machines are not averaged"""
    bootstrap_samples: int = 2000
    """samples of rliable's stratified bootstrap"""


# ---- tables ----
def score_text(cell: pd.Series, deviation: str) -> str:
    notes = [f"{cell.n}", *(f"{cell[state]} {state}" for state in ("diverged", "unfinished") if cell[state])]
    number = "-" if cell.n == 0 else f"{cell['mean']:.1f}"
    spread = f" ± {cell[deviation]:.1f}" if cell.n > 1 else ""
    return f"{number}{spread} ({', '.join(notes)})"


def paper_text(number: int, env_id: str, name: str) -> str:
    found = PAPER[(PAPER.table == number) & (PAPER.env_id == env_id) & (PAPER.algorithm == name)]
    if found.empty:
        return ""
    score, deviation = found.iloc[0][["score", "deviation"]]
    return f"{score:.1f}" + (f" ± {deviation:.1f}" if deviation == deviation else "")


def totals(chosen: pd.DataFrame, number: int, names: list[str], domain: str) -> dict[str, str]:
    """Sum over the sets that have a score here, the paper's over the same sets."""
    row = {"data": f"**{domain} total**"}
    for name in names:
        there = chosen[(chosen.algorithm == name) & (chosen.n > 0)]
        paper = PAPER[(PAPER.table == number) & (PAPER.algorithm == name)]
        all_sets = paper[paper.env_id.isin(D4RL) & (paper.env_id.str.startswith("antmaze") == (domain == "antmaze"))]
        whole = set(all_sets.env_id) <= set(there.env_id)
        same = paper[paper.env_id == f"{domain}-total"] if whole else all_sets[all_sets.env_id.isin(there.env_id)]
        row[name] = f"{there['mean'].sum():.1f}" + ("" if whole else f" ({len(there)} of {len(all_sets)} sets)")
        row[f"{name}, paper"] = f"{same.score.sum():.1f}" if len(same) else ""
        if there.empty:
            row[name] = row[f"{name}, paper"] = ""
    return row


def total_of_other_data(chosen: pd.DataFrame, names: list[str]) -> list[dict[str, str]]:
    """One row, the sums over the sets for which every algorithm has a score; none where that is one set or none."""
    scores = chosen[(chosen.n > 0) & ~chosen.raw].pivot(index="set", columns="algorithm", values="mean")
    scores = scores.reindex(columns=names).dropna()
    row = {"data": f"**total of {len(scores)} sets**"} | {name: f"{scores[name].sum():.1f}" for name in names}
    return [row] if len(scores) > 1 else []


def wide(chosen: pd.DataFrame, number: int, names: list[str], deviation: str = "std") -> Iterator[tuple[str, list]]:
    """(caption, rows) for each kind of data and number of steps: what must not be mixed gets tables of its own."""
    chosen = chosen[chosen.algorithm.isin(names)]
    for (data, steps, online), part in chosen.groupby(["data", "gradient_steps", "online_steps"]):
        rows, kept, paper = [], [name for name in names if name in set(part.algorithm)], data != "other data"
        for shown, cells in part.groupby("set", observed=True):
            row = {"data": shown}
            for name in kept:
                cell = cells[cells.algorithm == name]
                row[name] = score_text(cell.iloc[0], deviation) if len(cell) else ""
                row[name] += "".join(f", nu {x.nu:g}" for x in cell.itertuples() if x.dataset and x.nu == x.nu)
                row |= {f"{name}, paper": paper_text(number, shown, name)} if paper else {}
            rows.append(row)
        if paper:
            rows.append(totals(part, number, kept, data.split()[-1]))
        else:
            rows += total_of_other_data(part, kept)
        yield f"{data}, {steps:,} gradient steps" + (f", {online:,} online steps" if online else ""), rows


def before_and_after(cells: pd.DataFrame) -> pd.DataFrame:
    """Table 4: a cell for the hand-over, one for the end; TD3, which has no offline part, beside all as long online."""
    cells = cells[cells.online_steps > 0]
    td3, two = cells[cells.algorithm == "TD3"], cells[cells.algorithm != "TD3"]
    offline = two.assign(algorithm=two.algorithm + " offline", mean=two.handed_over, std=two.handed_over_std)
    lengths = two[["gradient_steps", "online_steps"]].drop_duplicates()
    beside = td3.drop(columns="gradient_steps").merge(lengths, on="online_steps")
    alone = td3[~td3.online_steps.isin(lengths.online_steps)]
    parts = [offline, two.assign(algorithm=two.algorithm + " online"), beside, alone]
    return pd.concat([part for part in parts if len(part)] or [td3])


def overview(cells: pd.DataFrame) -> pd.DataFrame:
    columns = {"data": "data", "set": "set", "script": "script", "in_sample": "in-sample", "lam": "lam", "nu": "nu"}
    shown = cells.rename(columns=columns)[list(columns.values())]
    shown = shown.astype(object).map(lambda x: "" if pd.isna(x) else str(x))
    shown["steps"] = [
        f"{a:,}" + (f" + {b:,}" if b else "") for a, b in zip(cells.gradient_steps, cells.online_steps, strict=True)
    ]
    shown["last score, mean ± std (seeds)"] = [score_text(cell, "std") for _, cell in cells.iterrows()]
    shown["flags"] = differing_flags(cells)
    return shown


def differing_flags(cells: pd.DataFrame) -> list[str]:
    """Of each cell's other flags those that not every cell of its script and set has."""
    flags = cells["flags"].str.split().map(set)
    common = {
        key: set.intersection(*flags[index])
        for key, index in cells.groupby(["script", "set"], observed=True).groups.items()
    }
    return [" ".join(sorted(flags[i] - common[cells.script[i], cells["set"][i]])) for i in cells.index]


def markdown(rows: pd.DataFrame) -> str:
    lines = [rows.columns, ["---"] * len(rows.columns), *rows.fillna("").values]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


# ---- figures ----
def panels(n: int, rows: int = 1) -> tuple[plt.Figure, np.ndarray]:
    """A figure of n panels, three side by side, or of `rows` rows of n; (figure, axes of n or of (rows, n))."""
    if rows > 1:
        return plt.subplots(rows, n, figsize=(3.2 * n + 0.6, 2.6 * rows), squeeze=False, layout="constrained")
    height, width = -(-n // 3), min(n, 3)
    figure, axes = plt.subplots(height, width, figsize=(4 * width, 3 * height), squeeze=False, layout="constrained")
    for axis in axes.flat[n:]:
        axis.set_visible(False)
    return figure, axes.flat[:n]


def save(figure: plt.Figure, path: Path) -> str:
    write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    plt.close(figure)
    return path.name


def score_unit(part: pd.DataFrame) -> str:
    return "return (raw reward)" if part.raw.all() else "normalised score (%)"


def curves(data: pd.DataFrame, runs: pd.DataFrame, part: pd.DataFrame, path: Path) -> str:
    """Figs. 4-6: mean over seeds, shaded sample deviation, dotted the hand-over; a cross where a seed diverged."""
    sets = part["set"].cat.remove_unused_categories().cat.categories
    figure, axes = panels(len(sets))
    for axis, shown in zip(axes, sets, strict=True):
        cells = part[part["set"] == shown]
        for _, cell in cells.iterrows():
            counted, rows = of_cell(runs, cell), of_cell(data, cell)
            rows = rows[rows.run.isin(counted.run)]  # of a seed that was run twice the run that the tables count
            by_step = rows.dropna(subset="normalized_score").groupby("step").normalized_score
            mean, std = by_step.mean(), by_step.std().fillna(0)
            color, line, marker = STYLES[cell.algorithm]
            axis.plot(
                mean.index, mean, line, color=color, marker=marker, markersize=3,
                markevery=max(1, len(mean) // 8), label=cell.algorithm,
            )  # fmt: skip
            axis.fill_between(mean.index, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
            for _, run in counted[counted.state == "diverged"].iterrows():
                step = rows.step[(rows.run == run.run) & (rows.diverged == 1)].max()
                score = 0 if np.isnan(run.normalized_score) else run.normalized_score
                axis.plot(step, score, "x", color=color, markersize=9, markeredgewidth=2)
            if cell.online_steps and cell.gradient_steps:
                axis.axvline(cell.gradient_steps, color="grey", linestyle=":", linewidth=1)
        steps = "gradient steps" if not cells.online_steps.any() else "gradient steps, then environment steps"
        axis.set(title=shown, xlabel=steps, ylabel=score_unit(cells))
        axis.title.set_fontsize(9)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
        low, high = axis.get_ylim()
        axis.set_ylim(low, max(high, low + 1))  # where scores hardly differ, one point high at least
    shown = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown), frameon=False)
    return save(figure, path)


def ablation(runs: pd.DataFrame, groups: list[pd.DataFrame], name: str, path: Path) -> str:
    """Figs. 1 and 2: last score and last mean Q over the coefficient `name`; a cross where seeds diverged."""
    other = "nu" if name == "lam" else "lam"
    figure, axes = panels(len(groups), rows=2)
    for column, cells in zip(axes.T, groups, strict=True):
        first = cells.iloc[0]
        column[0].set_title(f"{first['set']}\n{other} = {first[other]:g}", fontsize=9)
        for axis, value in zip(column, ("normalized_score", "q_values"), strict=True):
            done = [of_cell(runs, cell).query("state == 'finished'")[value] for _, cell in cells.iterrows()]
            mean, std = [x.mean() for x in done], [x.std() if len(x) > 1 else 0 for x in done]
            axis.errorbar(cells[name], mean, std, fmt="o-", color="black", capsize=3, markersize=4)
            for _, cell in cells[cells.diverged > 0].iterrows():
                place = axis.get_xaxis_transform()
                axis.plot(cell[name], 0.92, "x", color="black", markersize=9, markeredgewidth=2, transform=place)
                text = f"{cell.diverged}/{cell.n + cell.diverged + cell.unfinished}"
                axis.annotate(
                    text, (cell[name], 0.92), xycoords=place, xytext=(0, -16), textcoords="offset points",
                    ha="center", fontsize=8,
                )  # fmt: skip
            low, high = axis.get_ylim()
            axis.set_ylim(low, high + 0.25 * (high - low) * (cells.diverged > 0).any())
            axis.grid(alpha=0.3)
            if name == "lam":
                axis.set_xticks(cells.lam)
            elif cells.nu.min() > 0:
                axis.set_xscale("log")
            else:
                axis.set_xscale("symlog", linthresh=min(cells.nu[cells.nu > 0]))
                axis.set_xlim(-min(cells.nu[cells.nu > 0]) / 4, 1.5 * cells.nu.max())
        column[0].set_ylabel(score_unit(cells))
        column[1].set_ylabel("mean Q (discounted reward)")
        column[1].set_xlabel({"lam": "mixture coefficient lam (1)", "nu": "penalty coefficient nu (1)"}[name])
    return save(figure, path)


def run_times(cells: pd.DataFrame, runs: pd.DataFrame, path: Path) -> tuple[str, pd.DataFrame] | None:
    """Fig. 3: hours for a million offline steps with evaluation, by machine; the paper's figure hatched."""
    rows = []
    for _, cell in cells[(cells.online_steps == 0) & cells.algorithm.notna()].iterrows():
        done = of_cell(runs, cell).query("state == 'finished'")
        domain = "AntMaze" if "antmaze" in cell.env_id.lower().replace("_", "") else "locomotion"
        for machine, wall in zip(done.machine, done.wall_seconds, strict=True):
            where = f"{cell.algorithm}, {domain}, {machine or 'machine not named'}"
            rows.append({"what": where, "hours": wall / cell.gradient_steps * 1e6 / 3600})
    if not rows:
        return None
    by = pd.DataFrame(rows).groupby("what").hours
    shown = by.agg(["mean", "std", "count"]).sort_values("mean", ascending=False)
    labels = [f"{what} ({n} run{'s' * (n > 1)})" for what, n in shown["count"].items()]
    width = 5 + 0.08 * max(map(len, labels))  # room for the bars beside the longest label
    figure, axis = plt.subplots(figsize=(width, 0.5 * len(shown) + 1.6), layout="constrained")
    axis.barh(labels, shown["mean"], xerr=shown["std"].fillna(0), color="0.6", edgecolor="black", capsize=3)
    axis.barh("DMG, paper: halfcheetah-medium-replay-v2, RTX 3090", 1.7, color="white", edgecolor="black", hatch="//")
    axis.set_xlabel("run time for 1,000,000 gradient steps with evaluation (h)")
    table = shown.rename_axis("what").reset_index()
    table.columns = ["what", "hours per 1M steps", "std", "runs"]
    return save(figure, path), table.round(2)


def reliable(part: pd.DataFrame, runs: pd.DataFrame, samples: int, path: Path) -> tuple[str, str, pd.DataFrame] | None:
    """rliable's aggregates over the sets on which every algorithm has two finished seeds: (picture, sets, table)."""
    part = part[(part.n > 1) & ~part.raw]
    sets = sorted(set.intersection(*part.groupby("algorithm")["set"].agg(set))) if len(part) else []
    if not sets:
        return None
    scores, names = {}, [name for name in STYLES if name in set(part.algorithm)]
    for name in names:
        cells = part[part["set"].isin(sets) & (part.algorithm == name)]
        columns = [of_cell(runs, cell).query("state == 'finished'") for _, cell in cells.sort_values("set").iterrows()]
        scores[name] = np.stack([x.normalized_score[: cells.n.min()] for x in columns], 1)  # (seeds, sets)

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    np.random.seed(0)  # rliable draws from the global generator
    iqm, iqm_interval = rly.get_interval_estimates(scores, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=samples)
    rows = [("interquartile mean (%)", name, iqm[name][0], *iqm_interval[name][:, 0]) for name in scores]
    pairs = itertools.product([x for x in scores if "DMG" in x], [y for y in scores if "DMG" not in y])
    pairs = {f"{x} > {y}": (scores[x], scores[y]) for x, y in pairs}
    if pairs:
        better, better_interval = rly.get_interval_estimates(pairs, metrics.probability_of_improvement, reps=samples)
        rows += [("probability of improvement (1)", pair, better[pair], *better_interval[pair][:, 0]) for pair in pairs]
    else:
        axes[2].set_visible(False)
    table = pd.DataFrame(rows, columns=["measure", "algorithm", "estimate", "low", "high"])
    for axis, (measure, shown) in zip((axes[0], axes[2]), table.groupby("measure", sort=False), strict=False):
        axis.plot(shown.estimate, shown.algorithm, "o", color="black")
        axis.hlines(shown.algorithm, shown.low, shown.high, color="black")
        axis.set_xlabel(measure)
        axis.margins(x=0.1, y=0.3)
        axis.invert_yaxis()
    axes[2].axvline(0.5, color="grey", linestyle=":")
    axes[2].set_xlim(-0.03, 1.03)

    every = np.concatenate([x.ravel() for x in scores.values()])
    taus = np.linspace(every.min() - 1, every.max() + 1, 101)
    profile, band = rly.create_performance_profile(scores, taus, reps=samples)
    for name in scores:
        color, line, _ = STYLES[name]
        axes[1].plot(taus, profile[name], line, color=color, label=name)
        axes[1].fill_between(taus, *band[name], color=color, alpha=0.2, linewidth=0)
    axes[1].set(xlabel="normalised score tau (%)", ylabel="share of runs with score > tau (1)")
    axes[1].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    seeds = ", ".join(f"{name} {len(x)}" for name, x in scores.items())
    return save(figure, path), f"{', '.join(sets)}; seeds: {seeds}", table.round(3)


# ---- report.md ----
def report(data: pd.DataFrame, args: Args) -> str:
    """The Markdown; writes the pictures and the tables' CSV files beside it."""
    runs = summarise_runs(data)
    cells = summarise_cells(runs)
    chosen, text = choose(cells), []
    offline = chosen[chosen.online_steps == 0]

    def table(name: str, rows: pd.DataFrame | list) -> str:
        rows = pd.DataFrame(rows)
        write(args.folder / f"{name}.csv", lambda temporary: rows.to_csv(temporary, index=False))
        return markdown(rows)

    def section(title: str, explanation: str, parts: list[str]) -> None:
        text.append(f"## {title}\n\n{explanation}\n\n" + ("\n".join(parts) or "No run yet.\n"))

    def tables(number: int, title: str, cells: pd.DataFrame, names: list[str], what: str, deviation: str = "std"):
        parts = []
        for caption, rows in wide(cells, number, names, deviation):
            parts.append(f"Data: {caption}.\n\n" + table(slug(f"table{number} {caption}"), rows))
        section(f"Table {number} form: {title}", what, parts)

    def each(cells: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
        for (kind, steps, online), part in cells.groupby(["data", "gradient_steps", "online_steps"]):
            yield f"{kind}, {steps:,} steps" + (f" and {online:,} online" if online else ""), part

    def families(cells: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
        for family, names in FAMILIES.items():
            for caption, part in each(cells[cells.algorithm.isin(names)]):
                yield caption + family, part

    what = "± is the standard error over seeds. Yes, no: by more than two of the difference; of one seed that of its "
    what += "evaluation's episodes counts, and of its Q the sign."
    rows = claims(runs, cells, chosen)
    section("What the paper says of DMG", what, [table("claims", rows)] if rows else [])

    own = ", on a file of one's own the nu that most seeds have"
    cell = "Cells: mean ± sample standard deviation of the last score (finished seeds, and what else there is)."
    tables(2, "offline", offline, ["TD3BC", "IQL", "DMG"], f"{cell} lam and nu as in App. C.1{own}.")
    tables(3, "XQL and SQL, alone and with DMG", offline, ["XQL", "XQL+DMG", "SQL", "SQL+DMG"], cell)
    names = ["TD3", "IQL offline", "IQL online", "DMG offline", "DMG online"]
    tables(4, "offline to online", before_and_after(chosen), names, f"{cell} offline: the score at the hand-over.")
    interval = "Cells: mean ± half the 95 % interval of Student's t (finished seeds; the paper has 10)."
    tables(6, "95 % confidence interval", offline[offline.n > 1], ["DMG"], interval, "ci")

    pictures = []
    for caption, part in families(chosen):
        picture = curves(data, runs, part, args.folder / f"{slug(f'curves {caption}')}.png")
        pictures.append(f"Data: {caption}.\n\n![learning curves]({picture})\n")
    what = "Mean over seeds, shaded: sample standard deviation; a cross, as high as its last score: a seed diverged."
    section("Learning curves (Figs. 4-6)", what, pictures)

    for name, figure in (("lam", 1), ("nu", 2)):
        pictures = []
        for caption, part in each(cells[cells.online_steps == 0]):
            if groups := [*ablations(part, name)]:
                picture = ablation(runs, groups, name, args.folder / f"{slug(f'ablation {name} {caption}')}.png")
                pictures.append(f"Data: {caption}.\n\n![{name}]({picture})\n")
        crosses = "Last score and last mean Q, mean and sample standard deviation of the finished seeds"
        section(f"Ablation of {name} (Fig. {figure})", f"{crosses}; a cross: so many seeds diverged.", pictures)

    timed = run_times(cells, runs, args.folder / "run_time.png")
    parts = [f"![run time]({timed[0]})\n", table("run_time", timed[1])] if timed else []
    section("Run time (Fig. 3)", "The paper's machine is not ours; its bar is there for scale.", parts)

    parts = []
    for caption, part in families(offline):
        if found := reliable(part, runs, args.bootstrap_samples, args.folder / f"{slug(f'rliable {caption}')}.png"):
            picture, sets, rows = found
            numbers = table(slug(f"rliable {caption}"), rows)
            parts.append(f"Data: {caption}. Sets: {sets}.\n\n![rliable]({picture})\n\n{numbers}")
    what = "Interquartile mean, performance profile, probability of improvement with 95 % intervals of the stratified"
    section("rliable", f"{what} bootstrap. Diverged seeds have no score and are left out.", parts)

    numeric = cells.drop(columns=["set", "paper_setting"])
    write(args.folder / "cells.csv", lambda temporary: numeric.to_csv(temporary, index=False))
    section("Everything that was run", f"{cell} The same numbers: cells.csv.", [markdown(overview(cells))])
    head = (
        f"{len(runs)} runs, {len(data)} rows of [evaluations.csv](evaluations.csv). Scores of different data, steps or "
    )
    return f"# Report\n\n{head}flags never share a cell; only D4RL v2 data has the paper's column.\n\n" + "\n".join(
        text
    )


def slug(caption: str) -> str:
    return caption.lower().replace(",", "").replace(" ", "-")


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    refuse(args.bootstrap_samples < 1, "--bootstrap-samples must be at least 1.")
    text = report(collect(args.runs, args.folder / "evaluations.csv", args.machine), args)
    write(args.folder / "report.md", lambda temporary: temporary.write_text(text))
    print(f"wrote {args.folder / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
