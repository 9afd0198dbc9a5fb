#!/usr/bin/env bash
# The paper's comparisons on sets made by this project's own TD3: no download, but weeks of CPU time. Run again: goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
STEPS=${STEPS:-300000} # gradient steps of each run, and online steps of those that go on online
# steps of the TD3 of HalfCheetah, Hopper, Walker2d: meant to be half-way, as D4RL's; its replay is the medium-replay set
read -ra TD3_STEPS <<<"${TD3_STEPS:-100000 400000 300000}"
MEDIUM_STEPS=${MEDIUM_STEPS:-300000} # transitions of each medium set, which that TD3's last agent makes
SEEDS=${SEEDS:-0 1 2}
MORE=${MORE:-compile} # flags of every run, as sweep.py's --values takes them
RESOURCES=${RESOURCES:---cpus-per-run 1}
FOLDER=${FOLDER:-benchmark-runs-own-sets}
# shellcheck disable=SC2086 # lists of words
sweep() { python benchmark/sweep.py $RESOURCES --folder "$FOLDER" "$@" $MORE; }

make_sets() { # make_sets Hopper 400000
    local set="own/${1,,}"
    sweep --scripts dmg_finetune.py --env-ids "$1-v5" --seeds 0 \
        --values from-scratch "online-steps=$2" "save-dataset=$set/medium-replay-v0"
    [ -e "${MINARI_DATASETS_PATH:-$HOME/.minari/datasets}/$set/medium-v0" ] ||
        python benchmark/collect.py "$FOLDER/dmg_finetune__$1-v5__0__"*save-dataset*/runs/* "$set/medium-v0" \
            --transitions "$MEDIUM_STEPS"
}
names=(HalfCheetah Hopper Walker2d) sets=() making=()
for i in 0 1 2; do
    sets+=("own/${names[i],,}/medium-replay-v0" "own/${names[i],,}/medium-v0")
    make_sets "${names[i]}" "${TD3_STEPS[i]}" &
    making+=($!)
done
for process in "${making[@]}"; do wait "$process"; done

# shellcheck disable=SC2086
compare() { sweep --env-ids "${sets[@]}" --seeds $SEEDS --scripts $1 --values "${@:2}"; }
compare "dmg_offline.py iql.py td3bc.py" "gradient-steps=$STEPS"
compare dmg_offline.py "gradient-steps=$STEPS" in-sample=xql,sql
compare dmg_offline.py "gradient-steps=$STEPS" lam=0,0.5,1
compare dmg_offline.py "gradient-steps=$STEPS" nu=0.01,1,10
compare dmg_finetune.py "offline-steps=$STEPS" "online-steps=$STEPS"
compare iql.py "gradient-steps=$STEPS" "online-steps=$STEPS"
compare dmg_finetune.py from-scratch "online-steps=$STEPS"
python benchmark/report.py "$FOLDER" --folder "$FOLDER/report"
