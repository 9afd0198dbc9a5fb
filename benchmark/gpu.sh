#!/usr/bin/env bash
# Everything that is measured on a GPU, in six minutes: bash benchmark/gpu.sh FOLDER. Without JAX its rows are missing.
set -euo pipefail
folder=${1:-gpu}
mkdir -p "$folder"
export XLA_PYTHON_CLIENT_PREALLOCATE=false # JAX would take the memory of the others
python benchmark/throughput.py --gpu-only --steps 1000 --turns 5 --output "$folder/one.json" | tee "$folder/one.md"
nvidia-cuda-mps-control -d || echo "no MPS: the processes take turns"
for processes in 4 12; do
  python benchmark/throughput.py --processes "$processes" --contenders dmg_offline "dmg_offline --compile" jax_dmg \
    --steps 1000 --turns 5 --output "$folder/$processes.json" | tee "$folder/$processes.md"
done
echo quit | nvidia-cuda-mps-control || true
export MINARI_DATASETS_PATH=datasets
(time python dmg_offline.py --env-id dmg/halfcheetah/medium-replay-v0 --gradient-steps 100000) 2>&1 | tail -n 6 | tee "$folder/run.txt"
python -m pytest -q tests/test_speed.py | tee "$folder/tests.txt"
