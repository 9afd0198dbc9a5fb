#!/usr/bin/env bash
# The whole report in small, on the bundled set: nothing to download, and the scores say nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
export MINARI_DATASETS_PATH="$PWD/datasets"
small() { # small "SCRIPTS" "VALUES"
    # shellcheck disable=SC2086 # lists of words
    python benchmark/sweep.py --scripts $1 --folder benchmark-runs-small --seeds 0 1 \
        --env-ids dmg/halfcheetah/medium-replay-v0 --values eval-frequency=50 eval-episodes=1 $2
}
small "dmg_offline.py iql.py td3bc.py" "gradient-steps=200"
small "dmg_offline.py" "gradient-steps=200 lam=0,1"
small "dmg_offline.py iql.py" "gradient-steps=200 in-sample=xql,sql"
small "dmg_finetune.py" "offline-steps=100 online-steps=100"
small "dmg_finetune.py" "from-scratch online-steps=100 learning-starts=50"
small "iql.py" "gradient-steps=100 online-steps=100"
python benchmark/report.py benchmark-runs-small --folder benchmark-runs-small/report
