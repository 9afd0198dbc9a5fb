"""D4RL's own policies in the environments that score agents here, beside the returns published for them.

    python benchmark/validate_environments.py --policies FOLDER
    python benchmark/validate_environments.py --csv benchmark/results/validation.csv    # only draws

FOLDER has deep_ope's 66 policies and published_returns.json, {name: [mean, std]}. Robots sample
their actions, ants take the mean: the published success rates are plainly those of the mean.
"""

import csv
import dataclasses
import json
import warnings
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import regenerate_d4rl as d4rl
import tyro

dmg = d4rl.dmg
ENV_IDS = {"halfcheetah": "halfcheetah-medium-v2", "hopper": "hopper-medium-v2"}
ENV_IDS |= {"walker": "walker2d-medium-v2", "antmaze_umaze": "antmaze-umaze-v2"}
ENV_IDS |= {"antmaze_medium": "antmaze-medium-play-v2", "antmaze_large": "antmaze-large-play-v2"}
COLUMNS = "policy,environment,episodes,return_mean,return_std,published_mean,published_std,length_mean"
TITLES = {"faithful": "this project's robots", "stock": "Gymnasium's -v4", "maze": "this project's AntMaze"}


@dataclasses.dataclass
class Args:
    policies: str | None = None  # folder of the policies (None: only draw)
    csv: Path = Path("validation.csv")  # where the returns are; the picture gets the same name with .png
    episodes: int = 50  # of each policy
    names: tuple[str, ...] = ()  # policies to roll out (default: all in published_returns.json)


def roll_out(args):
    """Write the CSV file, a row for each policy and environment."""
    published = json.loads(Path(args.policies, "published_returns.json").read_text())
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    lines = [COLUMNS]
    for name in args.names or sorted(published):
        weights, rng = d4rl.read_policy(args.policies, name), np.random.default_rng(0)
        env_id, ant = ENV_IDS[name.rsplit("_", 2)[0]], name.startswith("antmaze")

        def act(states, ant=ant, weights=weights, rng=rng):
            if ant:
                return np.clip(d4rl.outputs(weights, states, np.tanh)[0], -1, 1)
            return d4rl.sample(weights, states, rng, lowest=-5)

        for kind in ["maze"] if ant else ["faithful", "stock"]:
            with warnings.catch_warnings(action="ignore"):  # -v4 is out of date on purpose
                envs = [dmg.make_env(dmg.Args(env_id=env_id)) for _ in range(args.episodes)]
                if kind == "stock":
                    stock = type(envs[0].unwrapped).__name__.removesuffix("Env") + "-v4"
                    envs = [gym.make(stock) for _ in envs]
            returns, lengths = dmg.evaluate(act, envs, 54321)
            measured = f"{returns.mean():.3f},{returns.std():.3f}", *published[name], f"{lengths.mean():.0f}"
            lines.append(",".join(map(str, [name, kind, args.episodes, *measured])))
            print(lines[-1])
    args.csv.write_text("\n".join(lines) + "\n")


def draw(path):
    """Published against measured mean scores with 95 % intervals (100 published episodes), three panels."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    rows = list(csv.DictReader(path.open()))
    for axis, (kind, title) in zip(axes, TITLES.items(), strict=True):
        total = close = 0
        for (group, env_id), marker in zip(ENV_IDS.items(), "os^os^", strict=True):
            shown = [x for x in rows if x["environment"] == kind and x["policy"].startswith(group)]
            if not shown:
                continue
            args = dmg.Args(env_id=env_id)
            n, mean, std, published, published_std = np.array([list(x.values())[2:7] for x in shown], float).T
            errors = np.array([published_std / 10, std / np.sqrt(n)])
            total += len(shown)
            close += np.sum(np.abs(mean - published) <= 2 * np.hypot(*errors))
            points = dmg.normalized_score(args, published), dmg.normalized_score(args, mean)
            bars = dmg.normalized_score(args, 2 * errors) - dmg.normalized_score(args, 0)
            axis.errorbar(*points, bars[1], bars[0], marker, markersize=5, capsize=2, label=group)
        axis.axline((0, 0), slope=1, color="0.6", linewidth=1, zorder=0)
        axis.set_title(f"{title}\n{close} of {total} policies within 2 standard errors", fontsize=11)
        unit = "success rate (%)" if kind == "maze" else "D4RL score (%)"
        axis.set(xlabel=f"published {unit}", ylabel=f"measured {unit}")
        axis.legend(frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    if arguments.policies:
        roll_out(arguments)
    draw(arguments.csv)
