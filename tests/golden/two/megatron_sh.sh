# Data mixture for megatron_sh, written by mixbook.
# Each number is the probability of the next fixed-length sequence (equal to the share of tokens).
# Token shares that the trainer will see differ from the recipe by at most 0.0e+00 after rounding.
# Use: source FILE, then pass --data-path "${DATA_PATH[@]}".
# The file cannot carry: intervals, stages, caps on passes.
# Origin: mixbook 0.1.0, corpus 1a2b3c, tokenizer bytes, runs 64, seed 0.
DATA_PATH=(
  0.7 data/web
  0.3 data/code
)
