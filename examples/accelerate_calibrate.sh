#!/usr/bin/env bash
# Calibrate and search over several processes, each with its share of the data: the plan is the one that a single process finds.
# As it stands: two processes on the CPU, a few of the embedded model's own questions, offline, in a minute.
#
#   examples/accelerate_calibrate.sh
#
# On GPUs, each process with the whole model on a GPU of its own (not run by us yet, for want of GPUs):
#
#   MODEL=Qwen/Qwen3-VL-30B-A3B-Instruct LAUNCH="accelerate launch --num_processes 8" \
#       ARGS="--data questions.jsonl --dtype bfloat16" SEARCH="--targets 0.5 0.75 0.875" examples/accelerate_calibrate.sh
#
# Run again after a crash, it goes on where the journals in $OUT end.
set -euo pipefail

MODEL=${MODEL:-demo}                                             # demo, a folder, or the id of a hub model
LAUNCH=${LAUNCH:-torchrun --nproc-per-node 2}                    # what starts `-m modes_fx` several times
ARGS=${ARGS:---samples 16}                                       # of both commands
SEARCH=${SEARCH:---targets 0.5 0.75 --gammas 0.5 --grid-size 6}  # of the search
OUT=${OUT:-out/calibrate}

mkdir -p "$OUT"
# shellcheck disable=SC2086 # several words each
$LAUNCH -m modes_fx calibrate "$MODEL" $ARGS --out "$OUT/importance.json" --journal "$OUT/importance.jsonl"
# shellcheck disable=SC2086
$LAUNCH -m modes_fx search "$MODEL" $ARGS $SEARCH --importance "$OUT/importance.json" --out "$OUT/plan.json" \
    --journal "$OUT/search.jsonl"
