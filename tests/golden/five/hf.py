# Data mixture for hf, written by mixbook.
# Each number is the probability of the next document (row).
# Token shares that the trainer will see differ from the recipe by at most 1.4e-08 after rounding.
# Use: mixture() or mixture(your own datasets by domain); stop after the budget. Sources that end are begun again.
# The file cannot carry: intervals, stages, caps on passes.
# Left out (share zero at the digits written): 'no'.
# Origin: corpus x\ny.
from datasets import interleave_datasets, load_dataset

PATHS = {
    'web': 'data/web',
    'code\'s "best" & $(touch pwned)': 'data/code\'s "best" & $(touch pwned)',
    '日本語/проза': 'data/日本語/проза',
    'a: b\n# c|`d`': 'data/a: b\n# c|`d`',
}

PROBABILITIES = {
    'web': 0.56631416,
    'code\'s "best" & $(touch pwned)': 0.04404666,
    '日本語/проза': 0.38917669,
    'a: b\n# c|`d`': 0.00046249,
}


def mixture(sources=None, seed=0, stopping_strategy="all_exhausted"):
    "The domains interleaved by document, so that their shares of tokens are those of the recipe."
    if sources is None: sources = {d: load_dataset("json", data_files=p, split="train", streaming=True) for d, p in PATHS.items()}
    return interleave_datasets([sources[d] for d in PROBABILITIES], probabilities=list(PROBABILITIES.values()), seed=seed, stopping_strategy=stopping_strategy)
