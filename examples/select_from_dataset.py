"""Keeps the best fifth of a `datasets.Dataset`; needs `pip install 'selectmoe[hub]'`."""

from datasets import Dataset

import selectmoe
from selectmoe.paths import DEMO_CORPUS

# Any dataset with one of the layouts of a corpus: datasets.load_dataset(NAME, split="train").
dataset = Dataset.from_json(str(DEMO_CORPUS)).select(range(40))

selection = selectmoe.select(dataset, pct=0.2)

kept = Dataset.from_list(selection.rows)
kept.to_json("selected_data.jsonl")
total = selection.manifest["total"]
print(f"kept {len(kept)} of {total['num_scored']} rows, the lowest score is {min(kept['score'])}")
