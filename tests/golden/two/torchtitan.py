# Data mixture for torchtitan, written by mixbook.
# Each number is the probability of the next fixed-length sequence (equal to the share of tokens).
# Token shares that the trainer will see differ from the recipe by at most 0.0e+00 after rounding.
# Use: mixture({domain: its packed dataset config}); pack each child first (ConcatThenSplitPackingConfig), or the weights count documents.
# The file cannot carry: intervals, stages, caps on passes.
# Origin: mixbook 0.1.0, corpus 1a2b3c, tokenizer bytes, runs 64, seed 0.
PATHS = {
    'web': 'data/web',
    'code': 'data/code',
}

WEIGHTS = {
    'web': 0.7,
    'code': 0.3,
}


def mixture(packed):
    "The packed datasets mixed by the recipe."
    from torchtitan.components.data import DatasetMixConfig, WeightedDataset
    return DatasetMixConfig(datasets=tuple(WeightedDataset(dataset=packed[d], weight=w) for d, w in WEIGHTS.items()))
