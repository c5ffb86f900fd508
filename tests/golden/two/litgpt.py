# Data mixture for litgpt, written by mixbook.
# Each number is the probability of the next fixed-length sequence (equal to the share of tokens).
# Token shares that the trainer will see differ from the recipe by at most 0.0e+00 after rounding.
# Use: mixture(seq_len) in train_dataloader of a litgpt DataModule; the folders are litdata's.
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


def mixture(seq_len=2048, seed=0):
    "Blocks of seq_len + 1 tokens, mixed by the recipe."
    from litdata.streaming import CombinedStreamingDataset, StreamingDataset, TokensLoader
    parts = [StreamingDataset(input_dir=PATHS[d], item_loader=TokensLoader(block_size=seq_len + 1), shuffle=True, drop_last=True, seed=seed) for d in WEIGHTS]
    return CombinedStreamingDataset(datasets=parts, seed=seed, weights=tuple(WEIGHTS.values()), iterate_over_all=False)
