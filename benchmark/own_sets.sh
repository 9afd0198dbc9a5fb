#!/usr/bin/env bash
# The paper's comparisons on sets made by this project's own TD3: no download, but days of CPU time. Run again: goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
STEPS=${STEPS:-300000}         # gradient steps of each run, and online steps of those that go on online
TD3_STEPS=${TD3_STEPS:-300000} # transitions of each set
SEEDS=${SEEDS:-0 1 2}
MORE=${MORE:-compile}          # flags of every run, as sweep.py's --values takes them
RESOURCES=${RESOURCES:---cpus-per-run 1}
FOLDER=${FOLDER:-benchmark-runs-own-sets}
# shellcheck disable=SC2086 # lists of words
sweep() { python benchmark/sweep.py $RESOURCES --folder "$FOLDER" "$@" $MORE; }

sets=() making=()
for name in HalfCheetah Hopper Walker2d; do
    sets+=("own/${name,,}/medium-replay-v0")
    sweep --scripts dmg_finetune.py --env-ids "$name-v5" --seeds 0 \
        --values from-scratch "online-steps=$TD3_STEPS" "save-dataset=${sets[-1]}" &
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
python benchmark/report.py "$FOLDER" --folder "$FOLDER/report"
