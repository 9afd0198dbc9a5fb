"""What the paper says of DMG, asked of the runs at hand: a row for each claim and each set that can answer it."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from evaluations import CELL, of_cell


class Measured(NamedTuple):
    """A mean over the finished seeds of one setting, or a sum of such means."""

    mean: float  # where more seeds diverged than finished: of a score minus infinity, of Q plus infinity
    error: float  # standard error over seeds; of one seed over its evaluation's episodes, 0 for Q
    seeds: int

    def __str__(self) -> str:
        if math.isinf(self.mean):
            return "diverged"
        return f"{self.mean:.1f}" + (f" ± {self.error:.1f}" if self.seeds > 1 else "")


def measured(runs: pd.DataFrame, cell: pd.Series, column: str) -> Measured | None:
    """`column` of the cell's last evaluations; None where nothing has ended."""
    own = of_cell(runs, cell)
    done = own[own.state == "finished"][column].dropna()
    if (own.state == "diverged").sum() > len(done):
        return Measured(-math.inf if column == "normalized_score" else math.inf, 0.0, len(own))
    if len(done) == 1 and f"{column}_error" in own:
        return Measured(done.iloc[0], np.nan_to_num(own.loc[done.index[0], f"{column}_error"]), 1)
    return Measured(done.mean(), np.nan_to_num(done.sem()), len(done)) if len(done) else None


def total(parts: list[Measured]) -> Measured:
    error = math.hypot(*(x.error for x in parts))
    return Measured(sum(x.mean for x in parts), error, min(x.seeds for x in parts))


def answer(links: list[tuple[Measured, Measured]]) -> str:
    """Whether the second of every pair is above the first, by more than two standard errors of the difference.

    To 0.1, as it is shown. One pair the other way is a no.
    """
    found = set()
    for low, high in links:
        difference = round(high.mean - low.mean, 1)
        clear = abs(difference) > 2 * math.hypot(low.error, high.error)
        found.add("not clear" if not clear else "yes" if difference > 0 else "no")
    word = "no" if "no" in found else "not clear" if "not clear" in found else "yes"
    return word + (", one seed" if any(min(a.seeds, b.seeds) == 1 for a, b in links) else "")


def ablations(cells: pd.DataFrame, name: str) -> Iterator[pd.DataFrame]:
    """Cells of DMG that differ in the coefficient `name` alone, in its order."""
    dmg = cells[(cells.algorithm == "DMG") & (cells.online_steps == 0)]
    for _, group in dmg.groupby([column for column in CELL if column != name], dropna=False):
        if group[name].nunique() > 1:
            yield group.sort_values(name)


def in_total(runs: pd.DataFrame, chosen: pd.DataFrame) -> Iterator[dict]:
    names = ["DMG", "TD3BC", "IQL"]
    part = chosen[chosen.algorithm.isin(names) & (chosen.online_steps == 0) & ~chosen.raw]
    for (data, steps), cells in part.groupby(["data", "gradient_steps"]):
        found = {(x["set"], x.algorithm): measured(runs, x, "normalized_score") for _, x in cells.iterrows()}
        sets = [name for name in cells["set"].unique() if all(found.get((name, x)) for x in names)]
        if sets:
            ours, *others = [total([found[name, x] for name in sets]) for x in names]
            numbers = ", ".join(f"{name} {x}" for name, x in zip(names, (ours, *others), strict=True))
            where = f"{data}, {steps:,} steps, {len(sets)} set" + "s" * (len(sets) > 1)
            yield row("better than TD3+BC and IQL in total", where, numbers, [(x, ours) for x in others])


def over_coefficients(runs: pd.DataFrame, cells: pd.DataFrame) -> Iterator[dict]:
    def measure(group: pd.DataFrame, name: str, column: str) -> dict[float, Measured]:
        found = {x[name]: measured(runs, x, column) for _, x in group.iterrows()}
        return {value: x for value, x in found.items() if x}

    def claim(text: str, group: pd.DataFrame, name: str, found: dict, links: list) -> dict:
        cell, other = group.iloc[0], "nu" if name == "lam" else "lam"
        where = f"{cell['set']}, {cell.gradient_steps:,} steps, {other} {cell[other]:g}"
        return row(text, where, ", ".join(f"{name} {value:g}: {x}" for value, x in found.items()), links)

    for group in ablations(cells, "lam"):
        found = measure(group, "lam", "normalized_score")
        if {0, 0.25, 1} <= set(found):
            links = [(found[0], found[0.25]), (found[1], found[0.25])]
            yield claim("lam 0.25 beats 0 and 1", group, "lam", found, links)
    for text, name in (("Q grows with lam", "lam"), ("Q falls with nu", "nu")):
        for group in ablations(cells, name):
            found = measure(group, name, "q_values")
            q = list(found.values()) if name == "lam" else list(found.values())[::-1]
            if len(q) > 1:
                yield claim(text, group, name, found, [*itertools.pairwise(q)])


def online(runs: pd.DataFrame, chosen: pd.DataFrame) -> Iterator[dict]:
    part = chosen[(chosen.algorithm == "DMG") & (chosen.online_steps > 0)]
    for _, cell in part.iterrows():
        before, after = (measured(runs, cell, column) for column in ("handed_over", "normalized_score"))
        if before and after:
            where = f"{cell['set']}, {cell.gradient_steps:,} steps, {cell.online_steps:,} online"
            yield row("fine-tuning improves it", where, f"{before} to {after}", [(before, after)])


def row(claim: str, where: str, numbers: str, links: list[tuple[Measured, Measured]]) -> dict:
    seeds = sorted({x.seeds for link in links for x in link})
    shown = f"{seeds[0]}" + (f" to {seeds[-1]}" if len(seeds) > 1 else "")
    return {"claim": claim, "data": where, "found": numbers, "seeds": shown, "holds": answer(links)}


def claims(runs: pd.DataFrame, cells: pd.DataFrame, chosen: pd.DataFrame) -> list[dict]:
    """Rows of claim, data, found (mean ± standard error), seeds, holds; runs and cells as in evaluations.py."""
    return [*in_total(runs, chosen), *over_coefficients(runs, cells), *online(runs, chosen)]
