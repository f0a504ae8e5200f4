"""Rules that follow from the settings of a gate warm-up; imports no torch."""

from pathlib import Path

from selectmoe.config.warmup import TrainingConfig, WarmupDatasetConfig
from selectmoe.corruptions.kinds import CORRUPTIONS
from selectmoe.errors import ConfigError, DataError

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


def is_contrastive(training: TrainingConfig) -> bool:
    return training.quality_loss_type == "contrastive"


def learns_detached(training: TrainingConfig) -> bool:
    """True where no gradient needs to flow through the model: only the gates are trained, by a loss
    on their own logits. A trash expert gets a gradient only through the outputs of the layers."""
    only_quality_gates = training.train_quality_gates and not training.train_moe_gates
    return training.peft_mode == "full_rank" and is_contrastive(training) and only_quality_gates


def corruption_kinds(training: TrainingConfig) -> tuple[str, ...]:
    """The kinds of corrupted copies; none for a loss that does not use copies."""
    unknown = sorted(set(training.corruptions) - set(CORRUPTIONS))
    if unknown:
        raise ConfigError(
            f"training.corruptions must be among {', '.join(CORRUPTIONS)}, got {unknown[0]!r}"
        )
    return (training.corruptions or tuple(CORRUPTIONS)) if is_contrastive(training) else ()


def corpus_specs(dataset: WarmupDatasetConfig) -> tuple[str, ...]:
    """The corpora that the settings name, as specs of `read_corpora`; () means the demo corpus.

    Raises DataError for a name without a file in the folder.
    """
    return (*dataset.paths, *(_find_corpus(name, dataset.folder) for name in dataset.names))


def _find_corpus(name: str, folder: str | None) -> str:
    assert folder is not None  # WarmupDatasetConfig requires it
    for ending in ("", *ENDINGS):
        path = Path(folder) / (name + ending)
        if path.exists():
            return str(path)
    files = sorted(path.name for path in Path(folder).glob("*")) if Path(folder).is_dir() else []
    contents = ", ".join(files[:8]) or "nothing"
    raise DataError(
        f"dataset.names: {name!r} must be a folder or a {', '.join(ENDINGS)} file in {folder}, "
        f"which contains {contents}"
    )
