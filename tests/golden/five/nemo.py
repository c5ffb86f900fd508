# Data mixture for nemo, written by mixbook.
# Each number is the probability of the next fixed-length sequence (equal to the share of tokens).
# Token shares that the trainer will see differ from the recipe by at most 6.7e-07 after rounding.
# Use: PreTrainingDataModule(paths=PATHS, …) of NeMo 2; Megatron Bridge takes BLEND.
# The file cannot carry: intervals, stages, caps on passes.
# Left out (share zero at the digits written): 'no'.
# Origin: corpus x\ny.
PATHS = [
    '0.333334', 'data/web',
    '0.333333', 'data/code\'s "best" & $(touch pwned)',
    '0.331333', 'data/日本語/проза',
    '0.002', 'data/a: b\n# c|`d`',
]

BLEND = (PATHS[1::2], [float(w) for w in PATHS[::2]])
