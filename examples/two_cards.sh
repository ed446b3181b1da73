#!/usr/bin/env bash
# Llama 3.1 8B on two 24 GB cards, from a look at the machine to the result. Run it from the checkout,
# after `make setup` and `. .venv/bin/activate`:
#
#   export HF_TOKEN=...                        # the model asks for a login
#   examples/two_cards.sh examples.jsonl       # one example a line: {"messages": [...]}
#
# Without an NVLink bridge: LAUNCH=2x3090_pcie. Another model: EXPERIMENT=llama3_70b_2x24gb.
set -euo pipefail

data=${1:?"the path of your examples, such as examples.jsonl"}
launch=${LAUNCH:-2x3090_nvlink}
experiment=${EXPERIMENT:-llama3_8b_2x24gb}
output=${OUTPUT:-outputs/two_cards}
run=(launch="$launch" experiment="$experiment" data=file data.path="$data" output="$output")

# Is the machine fit? A failed check ends the script; the line says what mends it.
fttrain doctor

# Measure cards, host and links, once a machine. The profile stays in ~/.cache/fttrain.
fttrain measure launch="$launch" experiment="$experiment" output=outputs/measure

# What fits, how fast, and what it would cost.
fttrain plan "${run[@]}"

# 50 examples through the whole path; the first call downloads and quantises the model.
fttrain train "${run[@]}" dry_run=50

# The run. Ctrl-C saves and stops; the same command goes on.
fttrain train "${run[@]}"

# Held-out loss and answers, before and after; report.md has plots.
fttrain evaluate launch="$launch" output="$output"
fttrain report output="$output"
