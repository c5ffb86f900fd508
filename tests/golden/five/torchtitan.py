# Data mixture for torchtitan, written by mixbook.
# Each number is the probability of the next fixed-length sequence (equal to the share of tokens).
# Token shares that the trainer will see differ from the recipe by at most 6.7e-07 after rounding.
# Use: mixture({domain: its packed dataset config}); pack each child first (ConcatThenSplitPackingConfig), or the weights count documents.
# The file cannot carry: intervals, stages, caps on passes.
# Left out (share zero at the digits written): 'no'.
# Origin: corpus x\ny.
PATHS = {
    'web': 'data/web',
    'code\'s "best" & $(touch pwned)': 'data/code\'s "best" & $(touch pwned)',
    '日本語/проза': 'data/日本語/проза',
    'a: b\n# c|`d`': 'data/a: b\n# c|`d`',
}

WEIGHTS = {
    'web': 0.333334,
    'code\'s "best" & $(touch pwned)': 0.333333,
    '日本語/проза': 0.331333,
    'a: b\n# c|`d`': 0.002,
}


def mixture(packed):
    "The packed datasets mixed by the recipe."
    from torchtitan.components.data import DatasetMixConfig, WeightedDataset
    return DatasetMixConfig(datasets=tuple(WeightedDataset(dataset=packed[d], weight=w) for d, w in WEIGHTS.items()))
