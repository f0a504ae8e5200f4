"""The model card of a converted folder: what the model is, and how it is loaded."""

import re
from dataclasses import dataclass
from pathlib import Path

from selectmoe.model.checkpoint import is_hub_name
from selectmoe.model.remote_code import has_remote_code

CARD_NAME = "README.md"

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [select_moe, mixture-of-experts, data-selection]
{metadata}---

# {title}

A Select-MoE: {base} with a quality gate in every layer, which scores the samples of an
instruction-tuning corpus. All other tensors are those of {origin}.

| | |
|---|---|
| model type | `select_moe`: OLMoE with quality gates |
| layers, experts | {num_layers}, {num_experts} |
| parameters | {num_parameters:,}, of them {num_added_parameters:,} in the gates |
| dtype | {dtype} |
| quality gates | {gates} |

## Loading

The model type is registered by the Python package `selectmoe`. Without this line transformers
raises an error that it does not recognize the model type `select_moe`:

```python
from selectmoe import register_select_moe
from transformers import AutoModelForCausalLM, AutoTokenizer

register_select_moe()
model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
{remote}
## Scoring

```
selectmoe score --model {name} --data corpus.jsonl
python jobs/select.py --model {name} --data corpus.jsonl --pct 0.05
```
"""

_REMOTE = """
The folder contains the code of the model as well, for environments without the package:

```python
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
```

```
lm_eval --model hf --model_args pretrained={name},trust_remote_code=True --tasks arc_easy
```
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """What a card says about a model."""

    base: str  # folder or hub name
    gates: str  # where their weights come from
    origin: str  # of all other tensors
    dtype: str
    num_layers: int
    num_experts: int
    num_parameters: int  # of the whole model
    num_added_parameters: int  # of the gates


def write_model_card(folder: Path, facts: CardFacts, *, base_folder: Path, name: str) -> None:
    """Writes README.md. name: that the finished folder will have."""
    # A path on this machine means nothing to others, and the hub rejects it as `base_model`.
    is_on_hub = is_hub_name(facts.base) and not Path(facts.base).exists()
    base = facts.base if is_on_hub else Path(facts.base).name
    metadata = f"base_model: {base}\n" if is_on_hub else ""
    license_name = _license_of(base_folder)
    metadata += f"license: {license_name}\n" if license_name else ""
    text = _CARD.format(
        metadata=metadata,
        title=name,
        base=f"`{base}`",
        origin=facts.origin,
        num_layers=facts.num_layers,
        num_experts=facts.num_experts,
        num_parameters=facts.num_parameters,
        num_added_parameters=facts.num_added_parameters,
        dtype=facts.dtype,
        gates=facts.gates,
        name=name,
        remote=_REMOTE.format(name=name) if has_remote_code(folder) else "",
    )
    (folder / CARD_NAME).write_text(text, encoding="utf-8")


def _license_of(base_folder: Path) -> str | None:
    """The license in the metadata of the base's own card, which the new model inherits."""
    card = base_folder / CARD_NAME
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    metadata = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = metadata and re.search(r"^license: *([\w.-]+) *$", metadata[1], re.MULTILINE)
    return found[1] if found else None
