#!/usr/bin/env bash
# Rounds: the policy answers, a judge rates the answers, their pairs train the policy, and the next
# round begins with what came out. Docs: docs/rounds.md
#
#   bash configs/rounds.sh ROUNDS OUT SFT_MODEL PROMPTS HELD_OUT CONFIG
#
# Every stage leaves files under OUT/round-N, and a stage whose files are there is not repeated, so
# the same command resumes. Round 0 only measures the model that the rounds begin with.
set -euo pipefail
rounds=$1 out=$2 sft=$3 prompts=$4 held_out=$5 config=$6
run=${RUN:-python}            # "torchrun --nproc_per_node 8" for eval.py and train.py
python=${PYTHON:-python}      # for the judge
reference=${REFERENCE:-last}  # what a round must stay close to: the "last" policy, or "sft"
samples=${SAMPLES:-8}         # answers to each prompt

sample() {  # MODEL PROMPTS SAMPLES SEED FILE
  [ -e "$5" ] || $run eval.py generate "$1" --prompts "$2" --samples "$3" --seed "$4" --out "$5" \
    --temperature 1 --top-k 0 --max-new-tokens "${MAX_NEW_TOKENS:-1024}" \
    --batch-size "${BATCH_SIZE:-32}"
}

judge() {  # RESPONSES FOLDER
  [ -e "$2" ] || $python -m notus.feedback.check "$1" --out "$2"
}

policy=$sft
for round in $(seq 0 "$rounds"); do
  here=$out/round-$round
  if [ "$round" -gt 0 ]; then
    sample "$policy" "$prompts" "$samples" "$round" "$here/responses.jsonl"
    judge "$here/responses.jsonl" "$here/judged"
    [ "$reference" = sft ] && anchor=$sft || anchor=$policy
    [ -e "$here/run/final" ] || $run train.py "$config" model.policy="$policy" \
      model.reference="$anchor" data.train.0.path="$here/judged" output_dir="$here/run"
    policy=$here/run/final
  fi
  # Every round draws with the same seeds here, so that rounds differ by their policy only.
  sample "$policy" "$held_out" 16 0 "$here/held-out.jsonl"
  judge "$here/held-out.jsonl" "$here/held-out"
done
