"""The card of a selector folder: what its gates read, and how they are used."""

from pathlib import Path

from selectmoe.data.writers import whole_file
from selectmoe.model.checkpoint import is_hub_name
from selectmoe.model.gates_config import GatesConfig
from selectmoe.model.model_card import CARD_NAME

_CARD = """\
---
library_name: selectmoe
tags: [select_moe, data-selection]
{metadata}---

# Quality gates for {base}

{num_gates} quality gates, which score the samples of an instruction-tuning corpus. They read the
hidden states of the base in one forward pass and change nothing in it; the base itself is not in
this folder.

| | |
|---|---|
| base | `{base}`{revision}, model type `{model_type}` |
| SHA-256 of its weights | `{base_sha256}` |
| layers with a gate | {layers} of 0 to {last_layer}; nothing above layer {highest} is computed |
| parameters | {num_parameters:,} |
{forms}
## Scoring

```
selectmoe score --model FOLDER --data corpus.jsonl
python jobs/select.py --model FOLDER --data corpus.jsonl --pct 0.05
```

`FOLDER` is this folder. Where the base has another path, give it as `--model` and this folder as
`model_checkpoint_path`.
"""


def write_gates_card(folder: Path, config: GatesConfig) -> None:
    """Writes README.md, whole or not at all."""
    # A path on this machine means nothing to others, and the hub rejects it as `base_model`.
    on_hub = is_hub_name(config.base) and not Path(config.base).exists()
    base = config.base if on_hub else Path(config.base).name
    forms = "".join(
        f"| also for weights with the SHA-256 | `{sha}`: {description} |\n"
        for sha, description in config.other_base_sha256.items()
    )
    text = _CARD.format(
        metadata=f"base_model: {base}\nbase_model_relation: adapter\n" if on_hub else "",
        base=base,
        revision=f" at `{config.revision}`" if config.revision else "",
        model_type=config.model_type,
        base_sha256=config.base_sha256,
        num_gates=len(config.layers),
        layers=", ".join(map(str, config.layers)),
        last_layer=config.num_hidden_layers - 1,
        highest=config.layers[-1],
        num_parameters=len(config.layers) * 2 * (config.hidden_size + 1),
        forms=forms,
    )
    with whole_file(folder / CARD_NAME) as file:
        file.write(text.encode())
