"""From rows to batches of tokens: readers, the row contract, chat templates, packing."""
