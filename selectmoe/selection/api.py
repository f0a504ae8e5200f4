"""`selectmoe.select`: a selection from Python, in one process."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectmoe.config.columns import ColumnRules
from selectmoe.config.loading import from_values, resolved
from selectmoe.config.selection import SelectConfig
from selectmoe.corpus.normalize import write_shards
from selectmoe.data.folders import CONFIG_NAME
from selectmoe.data.named_corpora import corpus_specs
from selectmoe.data.readers import require_readable
from selectmoe.data.rows import RowLocation, parse_row
from selectmoe.data.writers import write_json
from selectmoe.errors import ConfigError
from selectmoe.model.selector_files import find_selector
from selectmoe.paths import model_or_embedded
from selectmoe.records import RejectedRow, Sample
from selectmoe.selection.backends import LocalBackend
from selectmoe.selection.in_process import InProcess
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.stage import run_selection


@dataclass(frozen=True, slots=True)
class Selection:
    """What `select` kept."""

    rows: list[dict[str, Any]]
    """The kept rows as in selected_data.jsonl: dataset, id, messages, score, percentile, source,
    and what else the corpus says of them."""
    manifest: dict[str, Any]
    """Configuration, counts, thresholds and speed."""


def select(
    corpus: str | Path | Iterable[Mapping[str, Any]],
    *,
    pct: float | None = None,
    model: str | Path | None = None,
    model_checkpoint_path: str | Path | None = None,
    output: str | Path | None = None,
    **settings: object,
) -> Selection:
    """Scores a corpus and keeps exactly max(1, floor(pct * rows scored)) rows, the best ones unless
    `selection__strategy` is another; pct is 0.05 where no other budget is set.

    >>> selection = select("corpus.jsonl", pct=0.05)
    >>> selection = select("corpus.jsonl", selection__rows=500, selection__strategy="sampled")
    >>> selection = select(datasets.load_dataset("databricks/databricks-dolly-15k", split="train"))

    corpus: what `--data` of the command takes, or rows such as a `datasets.Dataset` or a list of
        dictionaries, in one of the layouts of a corpus file.
    output: a new folder for the files of a run; by default they are removed at the end.
    settings: any of `selectmoe select --help` with `__` for the dot, e.g. `scoring__dtype`.
    Raises SelectMoeError for a setting, a row or a model that breaks a rule.
    """
    is_path = isinstance(corpus, str | Path)
    config = from_values(
        SelectConfig,
        {
            "selection_percentage": None if pct is None else float(pct),
            "dataset.paths": (str(corpus),) if is_path else (),
            "model": None if model is None else str(model),
            "model_checkpoint_path": model_checkpoint_path and str(model_checkpoint_path),
            **{key.replace("__", "."): value for key, value in settings.items()},
        },
    )
    config.require_ranked_signals()
    model = model_or_embedded(config.model, config.revision)
    find_selector(model, config.model_checkpoint_path).require_readable()
    require_readable(corpus_specs(config.dataset))
    with tempfile.TemporaryDirectory(prefix="selectmoe-") as scratch:
        folder = RunFolder(Path(output or scratch).absolute())
        folder.root.mkdir(parents=True, exist_ok=True)
        if any(folder.root.iterdir()):
            raise ConfigError(f"output must be a new or an empty folder, got {folder.root}")
        # As a command does: by it a corpus that has the run below it knows it as one.
        write_json(folder.root / CONFIG_NAME, resolved(config))
        if not isinstance(corpus, str | Path):
            write_shards(
                _parsed(corpus, config.dataset.column_rules),
                folder.corpus,
                rows_per_shard=config.rows_per_shard,
                duplicates=config.selection.duplicates,
            )
        manifest = run_selection(
            config, folder.root, backend=LocalBackend(config), runner=InProcess(config)
        )
        with folder.selected_data.open(encoding="utf-8") as file:
            return Selection([json.loads(line) for line in file], manifest)


def _parsed(
    rows: Iterable[Mapping[str, Any]], rules: ColumnRules
) -> Iterator[Sample | RejectedRow]:
    for number, row in enumerate(rows, start=1):
        yield parse_row(row, RowLocation(file="rows", row=number, dataset="rows"), rules)
