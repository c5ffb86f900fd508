# Data mixture for litgpt, written by mixbook.
# Each number is the probability of the next fixed-length sequence (equal to the share of tokens).
# Token shares that the trainer will see differ from the recipe by at most 6.7e-07 after rounding.
# Use: mixture(seq_len) in train_dataloader of a litgpt DataModule; the folders are litdata's.
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


def mixture(seq_len=2048, seed=0):
    "Blocks of seq_len + 1 tokens, mixed by the recipe."
    from litdata.streaming import CombinedStreamingDataset, StreamingDataset, TokensLoader
    parts = [StreamingDataset(input_dir=PATHS[d], item_loader=TokensLoader(block_size=seq_len + 1), shuffle=True, drop_last=True, seed=seed) for d in WEIGHTS]
    return CombinedStreamingDataset(datasets=parts, seed=seed, weights=tuple(WEIGHTS.values()), iterate_over_all=False)
