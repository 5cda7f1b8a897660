#!/usr/bin/env bash
# Score a model by lmms-eval, unskipped and with a plan. As it stands: a few questions of the embedded model, offline, in a minute.
#
#   pip install -e '.[lmms]' -c constraints-extras.txt && pip install --no-deps lmms-eval==0.7.3
#   examples/lmms_eval.sh
#
# Real weights and published tasks (these fetch their data):
#
#   MODEL=Qwen/Qwen3-VL-30B-A3B-Instruct PLAN=plan.json TARGET=0.75 LIMIT=-1 BATCH=8 ARGS=device_map=auto,max_pixels=1605632 \
#       TASKS=gqa,chartqa,textvqa_val,mme,mmstar,realworldqa examples/lmms_eval.sh
set -euo pipefail

MODEL=${MODEL:-demo}            # demo, a folder, or the id of a hub model
PLAN=${PLAN:-}                  # a plan for that model; none scores the unskipped model alone
TARGET=${TARGET:-}              # one of the plan's targets; none takes the largest
TASKS=${TASKS:-modes_fx_demo}
LIMIT=${LIMIT:-8}               # questions of each task, -1 for all
BATCH=${BATCH:-8}
ARGS=${ARGS:-}                  # more of --model_args, such as device_map=auto
OUT=${OUT:-out/lmms}
PYTHON=${PYTHON:-python}

score() {  # NAME MODEL_ARGS
    "$PYTHON" -m lmms_eval --model modes_fx --model_args "pretrained=$MODEL${ARGS:+,$ARGS}$2" --tasks "$TASKS" \
        --include_path "$("$PYTHON" -m modes_fx.lmms)" --batch_size "$BATCH" --limit "$LIMIT" \
        --log_samples --output_path "$OUT/$1" --verbosity DEBUG  # DEBUG: without it, lmms-eval ends with 0 when it fails
}

score stock ",optimize=False"
if [ -n "$PLAN" ]; then
    score skipped ",plan=$PLAN${TARGET:+,target=$TARGET}"
fi
