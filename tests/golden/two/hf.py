# Data mixture for hf, written by mixbook.
# Each number is the probability of the next document (row).
# Token shares that the trainer will see differ from the recipe by at most 1.0e-08 after rounding.
# Use: mixture() or mixture(your own datasets by domain); stop after the budget. Sources that end are begun again.
# The file cannot carry: intervals, stages, caps on passes.
# Origin: mixbook 0.1.0, corpus 1a2b3c, tokenizer bytes, runs 64, seed 0.
from datasets import interleave_datasets, load_dataset

PATHS = {
    'web': 'data/web',
    'code': 'data/code',
}

PROBABILITIES = {
    'web': 0.93582888,
    'code': 0.06417112,
}


def mixture(sources=None, seed=0, stopping_strategy="all_exhausted"):
    "The domains interleaved by document, so that their shares of tokens are those of the recipe."
    if sources is None: sources = {d: load_dataset("json", data_files=p, split="train", streaming=True) for d, p in PATHS.items()}
    return interleave_datasets([sources[d] for d in PROBABILITIES], probabilities=list(PROBABILITIES.values()), seed=seed, stopping_strategy=stopping_strategy)
