"""What the settings of a warm-up come down to; loads no torch, since the job asks first."""

from pathlib import Path

from selectmoe.config.warmup import TrainingConfig, WarmupDatasetConfig
from selectmoe.corruptions.kinds import CORRUPTIONS
from selectmoe.errors import ConfigError, DataError

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


def is_contrastive(training: TrainingConfig) -> bool:
    return training.quality_loss_type == "contrastive"


def learns_detached(training: TrainingConfig) -> bool:
    """True where no gradient need pass through the model: gates alone, and a loss on their logits
    alone. A trash expert has a gradient only through what the layers return."""
    only_quality_gates = training.train_quality_gates and not training.train_moe_gates
    return training.peft_mode == "full_rank" and is_contrastive(training) and only_quality_gates


def corruption_kinds(training: TrainingConfig) -> tuple[str, ...]:
    """The kinds of copies that are wanted: none for a loss that knows no copies."""
    unknown = sorted(set(training.corruptions) - set(CORRUPTIONS))
    if unknown:
        raise ConfigError(
            f"training.corruptions must be among {', '.join(CORRUPTIONS)}, got {unknown[0]!r}"
        )
    return (training.corruptions or tuple(CORRUPTIONS)) if is_contrastive(training) else ()


def corpus_specs(dataset: WarmupDatasetConfig) -> tuple[str, ...]:
    """The corpora that the settings name, as `read_corpora` takes them; none is the demo corpus.

    Raises DataError for a name that stands for nothing in the folder.
    """
    return (*dataset.paths, *(_named_corpus(name, dataset.folder) for name in dataset.names))


def _named_corpus(name: str, folder: str | None) -> str:
    assert folder is not None  # WarmupDatasetConfig asks for it
    for ending in ("", *ENDINGS):
        path = Path(folder) / (name + ending)
        if path.exists():
            return str(path)
    there = sorted(path.name for path in Path(folder).glob("*")) if Path(folder).is_dir() else []
    shown = ", ".join(there[:8]) or "nothing"
    raise DataError(
        f"dataset.names: {name!r} must be a folder or a {', '.join(ENDINGS)} file in {folder}, "
        f"which holds {shown}"
    )
