#!/usr/bin/env bash
# The paper's comparisons on sets made by this project's own TD3: no download, but weeks of CPU time. Run again: goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
STEPS=${STEPS:-300000} # gradient steps of each run, and online steps of those that go on online
# TD3's steps on HalfCheetah, Hopper, Walker2d: at MEDIUM_AT its agent, half-way as D4RL's, makes the medium set; the
# replay of all its steps is the medium-replay set. On Hopper and Walker2d a last agent may be an expert, or fall.
read -ra MEDIUM_AT <<<"${MEDIUM_AT:-100000 320000 260000}"
read -ra TD3_STEPS <<<"${TD3_STEPS:-100000 400000 300000}"
MEDIUM_STEPS=${MEDIUM_STEPS:-200000} # transitions of each medium set
SEEDS=${SEEDS:-0 1 2}
MORE=${MORE:-compile} # flags of every run, as sweep.py's --values takes them
RESOURCES=${RESOURCES:---cpus-per-run 1}
FOLDER=${FOLDER:-benchmark-runs-own-sets}
# shellcheck disable=SC2086 # lists of words
sweep() { python benchmark/sweep.py $RESOURCES --folder "$FOLDER" "$@" $MORE; }

make_sets() { # make_sets Hopper 320000 400000
    local set="own/${1,,}" here="${MINARI_DATASETS_PATH:-$HOME/.minari/datasets}/own/${1,,}" run
    sweep --scripts dmg_finetune.py --env-ids "$1-v5" --seeds 0 --values from-scratch "online-steps=$2"
    run=$(echo "$FOLDER/dmg_finetune__$1-v5__0__"*"online-steps=$2"*/runs/*)
    [ -e "$here/medium-v0" ] || python benchmark/collect.py "$run" "$set/medium-v0" --transitions "$MEDIUM_STEPS"
    [ -e "$here/medium-replay-v0" ] ||
        OMP_NUM_THREADS=1 python dmg_finetune.py --resume "$run" --online-steps "$3" --save-dataset "$set/medium-replay-v0"
}
names=(HalfCheetah Hopper Walker2d) sets=() making=()
for i in 0 1 2; do
    sets+=("own/${names[i],,}/medium-replay-v0" "own/${names[i],,}/medium-v0")
    make_sets "${names[i]}" "${MEDIUM_AT[i]}" "${TD3_STEPS[i]}" &
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
