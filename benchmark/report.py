"""Tables and learning curves from run folders, in the paper's form, and rliable's interval estimates.

    python benchmark/report.py benchmark-runs --folder report
    python benchmark/report.py benchmark/results/d4rl_made_again --folder report

Writes report.md, its pictures, its tables as CSV, and evaluations.csv: every evaluation, which may be given
instead of the run folders later.
"""

import dataclasses
import itertools
from colorsys import hsv_to_rgb
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from evaluations import PAPER, collect, counted, of_cell, summarize_cells, summarize_runs
from matplotlib.ticker import EngFormatter
from rliable import library as rly
from rliable import metrics

plt.switch_backend("agg")

STYLES = {  # lines that differ in grey too
    "DMG": ("#000000", "-"), "IQL": ("#c0504d", "--"), "TD3+BC": ("#4f9bd9", "-."), "TD3": ("#a6a6a6", ":"),
    "XQL+DMG": ("#1b5e20", "-"), "XQL": ("#8bc34a", "--"), "SQL+DMG": ("#6a1b9a", "-"),
    "SQL": ("#ba68c8", "--"),
}  # fmt: skip
TABLES = {"DMG": 2, "IQL": 2, "TD3+BC": 2, "XQL+DMG": 3, "XQL": 3, "SQL+DMG": 3, "SQL": 3}
PAPER_HEADING = {"D4RL v2": "paper", "D4RL made again": "paper, original data, 1M steps"}


@dataclasses.dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs at any depth (no links), evaluations.csv
    folder: Path = Path("report")  # where the report goes
    bootstrap_samples: int = 2000  # samples of rliable's stratified bootstrap


def in_order(names):
    """Labels in the order of STYLES, others behind."""
    return [name for name in STYLES if name in set(names)] + sorted({*names} - {*STYLES})


def styles_of(cells):
    """{label: (color, line)}, no two the same."""
    others = sorted({*cells.legend} - {*STYLES})
    return STYLES | {x: (hsv_to_rgb(k / len(others), 0.9, 0.75), "-") for k, x in enumerate(others)}


def score_text(cell, mean="mean", std="std"):
    """Mean ± deviation and, in brackets, the number of seeds and what is not as it should be."""
    number = "-" if np.isnan(cell[mean]) else f"{cell[mean]:.1f}"
    if not np.isnan(cell[std]):
        number += f" ± {cell[std]:.1f}"
    notes = ["1 seed" if cell.n == 1 else f"{cell.n} seeds"]
    if cell.n and (cell["data"] == "D4RL made again" or cell.step != cell.length + cell.online_steps):
        steps = cell.gradient_steps if mean == "handed_over" else cell.step
        notes.append(f"{steps:,.0f} steps")
    if cell.unfinished and not cell.step < cell.gradient_steps + cell.online_steps:
        notes.append(f"{cell.unfinished} unfinished")
    if cell.diverged:
        notes.append(f"{cell.diverged} diverged")
    return f"{number} ({', '.join(notes)}{', raw' * bool(cell.raw and cell.n)})"


def paper_text(table, env_id, name):
    """The paper's score, empty where it has none."""
    found = PAPER[(PAPER.table == table) & (PAPER.env_id == env_id) & (PAPER.algorithm == name)]
    if found.empty:
        return ""
    score, deviation = found.iloc[0][["score", "deviation"]]
    return f"{score:.1f}" + ("" if np.isnan(deviation) else f" ± {deviation:.1f}")


def score_table(part):
    """Rows: sets, then their other settings. Columns: each algorithm, and the paper's where it has one."""
    heading = PAPER_HEADING.get(part.data.iloc[0])
    online = part.online_steps.iloc[0] > 0
    rows = []
    for (shown, settings), cells in part.groupby(["set", "settings"], sort=False):
        row = {"data": f"{shown} {settings}".strip()}
        for label in in_order(part.label):
            name = part[part.label == label].algorithm.iloc[0]
            cell = cells[cells.label == label]
            columns = {"": (4 if online else TABLES.get(name), "mean", "std")}
            if online and name != "TD3":
                columns = {" offline": (4, "handed_over", "handed_over_std"), " online": (4, "mean", "std")}
            for word, (table, mean, std) in columns.items():
                row[label + word] = score_text(cell.iloc[0], mean, std) if len(cell) else ""
                if heading and (PAPER.algorithm == name + word).any():
                    paper = "" if settings else paper_text(table, cells.env_id.iloc[0], name + word)
                    row[f"{label}{word} ({heading})"] = paper
        rows.append(row)
    return pd.DataFrame(rows)


def overview(cells):
    """Every cell, with lam, nu, Q and speed."""
    steps = cells[["gradient_steps", "online_steps"]].map("{:,.0f}".format)
    table = pd.concat([cells[["set", "label", "settings", "lam", "nu"]], steps], axis=1)
    table["last score (return if raw)"] = [score_text(cell) for _, cell in cells.iterrows()]
    return table.assign(**{"mean Q": cells.q_values.round(1), "steps/s": cells.steps_per_second.round(1)})


def markdown(table):
    """A data frame as a table of Markdown."""
    rows = table.astype(object).where(table.notna(), "").values
    lines = [table.columns, ["---"] * len(table.columns), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def draw_cell(axis, cell, data, runs, style):
    """A curve: mean over the score's seeds, shaded the sample deviation; a cross where one diverged."""
    own, rows = of_cell(runs, cell), of_cell(data, cell)
    shown = counted(own) if cell.n else own
    rows = rows[rows.run.isin(shown.run) & (rows.diverged == 0)]
    by_step = rows.normalized_score.fillna(rows.return_mean).groupby(rows.step)
    whole = by_step.size() == len(shown)
    mean, std = by_step.mean()[whole], by_step.std().fillna(0)[whole]
    color, line = style
    axis.plot(mean.index, mean, line, color=color, label=cell.legend)
    axis.fill_between(mean.index, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    for _, run in own[own.state == "diverged"].iterrows():
        axis.plot(run.step, run.score, "x", color=color, markersize=9, markeredgewidth=2)
    if cell.online_steps and cell.gradient_steps:
        axis.axvline(cell.gradient_steps, color="grey", linestyle=":", linewidth=1)


def curves(data, runs, part, styles, path):
    """Figs. 4 to 6: a panel for each set; dotted the hand-over, or the paper's DMG on the original data."""
    sets = part["set"].unique()
    height, width = -(-len(sets) // 3), min(len(sets), 3)
    size = 4.2 * width, 3.2 * height
    figure, axes = plt.subplots(height, width, figsize=size, squeeze=False, layout="constrained")
    for axis, shown in itertools.zip_longest(axes.flat, sets):
        if shown is None:
            axis.set_visible(False)
            continue
        cells = part[part["set"] == shown]
        for label in in_order(cells.legend):
            draw_cell(axis, cells[cells.legend == label].iloc[0], data, runs, styles[label])
        paper = paper_text(2, cells.env_id.iloc[0], "DMG").split(" ")[0]
        if paper and not cells.online_steps.any():
            label = "DMG, paper, original data, 1M steps"
            axis.axhline(float(paper), color="black", linestyle=":", linewidth=1, label=label)
        steps = "gradient steps" + ", then environment steps" * bool(cells.online_steps.any())
        unit = "return (reward)" if cells.raw.all() else "normalized score (%)"
        axis.set(xlabel=steps, ylabel=unit)
        axis.set_title(shown, fontsize=9)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
        low, high = axis.get_ylim()
        axis.set_ylim(low, max(high, low + 1))  # a flat curve is not magnified
    legends = [axis.get_legend_handles_labels() for axis in axes.flat[: len(sets)]]
    labels = {name: line for lines, names in legends for line, name in zip(lines, names, strict=True)}
    place = {"loc": "outside lower center", "ncols": min(width + 1, len(labels)), "frameon": False}
    figure.legend(labels.values(), labels, title="shaded: deviation over seeds", **place)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"![{path.stem}]({path.name})\n"


def seed_scores(part, runs):
    """{label: (seeds, sets)}, and the sets: those on which every label has two finished seeds."""
    part = part[(part.n > 1) & ~part.raw & (part.settings == "")]
    part = part[part.step >= part.gradient_steps + part.online_steps]
    sets = sorted(set.intersection(*part.groupby("label")["set"].agg(set))) if len(part) else []
    scores = {}
    for label in in_order(part.label) if sets else []:
        cells = part[part["set"].isin(sets) & (part.label == label)].sort_values("set")
        finished = [of_cell(runs, cell).query("state == 'finished'") for _, cell in cells.iterrows()]
        scores[label] = np.stack([x.score.values[: cells.n.min()] for x in finished], 1)
    return scores, sets


def intervals(scores, samples):
    """Interquartile means, and how probably DMG is better than each other algorithm, with 95 % intervals."""
    np.random.seed(0)  # rliable draws from the global generator
    rows = []
    iqm = lambda x: np.array([metrics.aggregate_iqm(x)])  # noqa: E731
    found, bounds = rly.get_interval_estimates(scores, iqm, reps=samples)
    for name in scores:
        rows.append(("interquartile mean (%)", name, found[name][0], *bounds[name][:, 0]))
    others = [name for name in scores if name != "DMG"]
    if "DMG" in scores and others:
        pairs = {f"DMG > {name}": (scores["DMG"], scores[name]) for name in others}
        found, bounds = rly.get_interval_estimates(pairs, metrics.probability_of_improvement, reps=samples)
        for pair in pairs:
            rows.append(("probability of improvement", pair, found[pair], *bounds[pair][:, 0]))
    return pd.DataFrame(rows, columns=["measure", "algorithm", "estimate", "low", "high"]).round(3)


def report(args):
    """Write the report. Raises ValueError."""
    data = collect(args.runs)
    runs = summarize_runs(data)
    cells = summarize_cells(runs)
    styles = styles_of(cells)
    args.folder.mkdir(parents=True, exist_ok=True)
    data.to_csv(args.folder / "evaluations.csv", index=False)
    text = ["# Report\n", "Last score, curve: mean ± sample deviation over seeds; a cross: one diverged.\n"]
    text.append("A row or curve with settings: what differs from the one without them, or from App. C.1.\n")
    for (kind, steps, online), part in cells.groupby(["data", "length", "online_steps"]):
        title = kind + f", {steps:,.0f} gradient steps" * bool(steps)
        title += f", {online:,.0f} online steps" * bool(online)
        slug = title.lower().replace(",", "").replace(" ", "-")
        table = score_table(part)
        table.to_csv(args.folder / f"{slug}.csv", index=False)
        text += [f"## {title}\n", markdown(table)]
        text.append(curves(data, runs, part, styles, args.folder / f"{slug}.png"))
        scores, sets = seed_scores(part, runs)
        if scores:
            seeds = ", ".join(f"{len(x)} of {label}" for label, x in scores.items())
            text.append(f"rliable, stratified bootstrap, 95 %, over {', '.join(sets)}; seeds: {seeds}\n")
            text.append(markdown(intervals(scores, args.bootstrap_samples)))
    text += ["## Everything that was run\n", markdown(overview(cells))]
    (args.folder / "report.md").write_text("\n".join(text))
    print(f"wrote {args.folder / 'report.md'}")


if __name__ == "__main__":
    report(tyro.cli(Args, description=__doc__))
