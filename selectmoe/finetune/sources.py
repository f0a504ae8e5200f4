"""Chooses the conversations that finetuning uses: the selected ones, all, or a control sample."""

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from selectmoe.config.columns import ColumnRules
from selectmoe.config.finetune import FinetuneDatasetConfig
from selectmoe.corpus.shards import read_shard, row_key
from selectmoe.data.readers import read_corpus, require_readable
from selectmoe.errors import ConfigError, DataError
from selectmoe.finetune.controls import longest_rows, matched_rows
from selectmoe.paths import DEMO_CORPUS
from selectmoe.records import RejectedRow, Sample
from selectmoe.selection.run_folder import SELECTED_NAME, RunFolder
from selectmoe.selection.top_k import num_to_keep
from selectmoe.training.tokenized_rows import ChosenRows

NEED_SCORES = ("longest", "random_matched")
DRAWN_MODES = ("random", "random_matched")


def choose_rows(dataset: FinetuneDatasetConfig, *, seed: int) -> ChosenRows:
    """The rows of `dataset.mode`; a random draw depends on the rows and the seed alone.

    Raises what `require_source` raises, and DataError where no draw has the size that is asked for.
    """
    require_source(dataset)
    path = _path(dataset)
    run = selection_run(path)
    names = dataset.columns if run is None else {}  # the rows of a selection are messages
    read = functools.partial(read_corpus, rules=ColumnRules(names, keeps_extra=False))
    if dataset.mode == "selected":
        file = path if run is None else str(run / SELECTED_NAME)
        return ChosenRows(lambda: read(file), None, f"the rows of {file}")
    if run is None:
        corpus = ChosenRows(lambda: read(path), None, f"all rows of {path}")
    else:
        shards = corpus_shards(run)
        corpus = ChosenRows(lambda: _of_shards(shards), None, f"all rows that {run} read")
    if dataset.mode == "full":
        return corpus
    if dataset.mode in NEED_SCORES:
        assert run is not None
        return longest_rows(run) if dataset.mode == "longest" else matched_rows(run, seed=seed)
    if dataset.fraction is not None:
        return draw(corpus, fraction=dataset.fraction, seed=seed)
    assert run is not None
    return draw(corpus, num_rows=num_lines(run / SELECTED_NAME), seed=seed)


def require_source(dataset: FinetuneDatasetConfig) -> None:
    """Checks that the data exists, without reading it.

    Raises DataError where the file is missing, the selection is empty or its run unfinished, and
    ConfigError where the size of a random draw is not known.
    """
    path = _path(dataset)
    run = selection_run(path)
    if run is None:
        require_readable([path])
        if dataset.mode in NEED_SCORES:
            raise ConfigError(
                f"dataset.mode={dataset.mode} needs the scores of a selection: dataset.data_path "
                f"must be a stage 2 run or its {SELECTED_NAME}, got {path}"
            )
        if dataset.mode == "random" and dataset.fraction is None:
            raise ConfigError(
                "dataset.fraction must be set with dataset.mode=random unless dataset.data_path "
                f"is a stage 2 run or its {SELECTED_NAME}, got {path}"
            )
    elif dataset.mode != "selected":
        corpus_shards(run)
    file = Path(path).expanduser() if run is None else run / SELECTED_NAME
    if file.name == SELECTED_NAME and file.is_file() and not num_lines(file):
        raise DataError(f"{file}: the selection is empty: there are no rows to finetune on")


def selection_run(data_path: str) -> Path | None:
    """The folder of the stage 2 run that `data_path` is, or whose selected_data.jsonl it is."""
    path = Path(data_path).expanduser()
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and RunFolder(path).scored.is_dir() and not (path / SELECTED_NAME).is_file():
        raise DataError(
            f"{path}: the selection has not finished: it has no {SELECTED_NAME}; resume it with "
            f"'python jobs/select.py --resume {path}'"
        )
    is_its_file = path.name == SELECTED_NAME and (folder / "manifest.json").is_file()
    has_file = path.is_dir() and (folder / SELECTED_NAME).is_file()
    return folder if is_its_file or has_file else None


def corpus_shards(run: Path) -> list[Path]:
    """The rows that a selection chose from; those of another run where it re-selected from the
    scores of that run."""
    shards = RunFolder(run).corpus_shards()
    settings = run / "config.json"
    if not shards and settings.is_file():
        scored = json.loads(settings.read_text("utf-8")).get("scored")
        shards = RunFolder(Path(scored)).corpus_shards() if scored else []
    if not shards:
        raise DataError(
            f"{run}: the corpus of this selection no longer exists; set dataset.data_path to it, "
            "and dataset.fraction where dataset.mode=random"
        )
    return shards


def draw(
    corpus: ChosenRows, *, num_rows: int | None = None, fraction: float = 1.0, seed: int
) -> ChosenRows:
    """Exactly `num_rows` of a corpus, or max(1, floor(fraction * rows)): the first ones by a hash
    of the seed, the id and the content, so that the draw does not depend on how the corpus is
    split into files."""
    keys = np.array(
        [draw_key(row, seed) for row in corpus.read() if isinstance(row, Sample)], dtype=np.uint64
    )
    if num_rows is None:
        num_rows = num_to_keep(len(keys), fraction)
    if num_rows > len(keys):
        raise DataError(f"cannot draw {num_rows} rows at random: the corpus has {len(keys)}")
    chosen = np.zeros(len(keys), dtype=bool)
    # Stable: among rows with identical text the first ones are taken.
    chosen[np.argsort(keys, kind="stable")[:num_rows]] = True

    def read() -> Iterator[Sample | RejectedRow]:
        position = 0
        for row in corpus.read():
            if isinstance(row, Sample):
                if chosen[position]:
                    yield row
                position += 1

    return ChosenRows(read, num_rows, f"{num_rows:,} of {len(keys):,} rows at random")


def draw_key(sample: Sample, seed: int) -> int:
    """64 bits by which the rows are sorted into the random order of a seed."""
    digest = hashlib.blake2b(f"{seed}:{row_key(sample)}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def num_lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _path(dataset: FinetuneDatasetConfig) -> str:
    return dataset.data_path or str(DEMO_CORPUS)


def _of_shards(shards: list[Path]) -> Iterator[Sample | RejectedRow]:
    for shard in shards:
        for _, sample in read_shard(shard):
            yield sample
