"""Scoring backends: where the model that scores the rows of stage 2 lives.

LocalBackend   workers of the run load the model themselves
HttpBackend    a score server, over the network

`jobs` adds a third, for a Ray Serve deployment on the same cluster. All give the same scores to the
last digit as long as a server batches the rows of a request by themselves (`batching="own"`) and
runs on the same kind of processor.
"""

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np

from selectmoe.client import ScoreClient, ScoreFailure, ScoreResult, ServerInfo
from selectmoe.client.score_client import API_KEY_VARIABLE
from selectmoe.config.loading import resolved
from selectmoe.config.selection import SelectConfig
from selectmoe.data.turn_plan import TOKENIZER_REASONS
from selectmoe.errors import ConfigError, ResumeError, ScoreRequestError
from selectmoe.model.checkpoint import pinned_model
from selectmoe.model.selector_files import SelectorFiles, find_selector
from selectmoe.paths import model_or_embedded
from selectmoe.records import Sample, ScoredSample, UnscoredSample
from selectmoe.scoring.calibration import (
    Calibration,
    describe,
    from_json,
    match_calibration,
    stored_calibration,
)
from selectmoe.selection.scored_shards import SampleScorer

INFO_TIMEOUT_SECONDS = 10.0  # a server that is up describes itself at once
# For one shard: as long as a lost replica of a large model takes to come back.
PATIENCE_SECONDS = 900.0
SERVER_DEVICE = "server"  # it does not tell its device
NO_SIGNALS: Mapping[str, int] = {}  # `signal_sizes` of what asks a server
LOCAL_SETTINGS = (
    "scoring.row_layout",
    "scoring.attn_implementation",
    "scoring.experts_implementation",
    "num_threads_per_actor",
)

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """The model that scores a run, and how a worker gets at it. Picklable: workers receive it."""

    @property
    def model(self) -> str: ...
    @property
    def weights_sha256(self) -> str: ...
    @property
    def is_remote(self) -> bool:
        """True where a server computes and the workers of the run only wait for it."""
        ...

    def calibration(self) -> Calibration | None:
        """The calibration of these weights and settings; None where there is none."""
        ...

    def with_calibration(self, calibration: Calibration | None) -> "Backend":
        """The backend with the calibration that a run began with, by which its scores are adjusted.

        Raises ResumeError where the model is elsewhere and has another one by now.
        """
        ...

    def open_scorer(self) -> SampleScorer:
        """Called once on each worker."""
        ...


class LocalBackend:
    """The model of the configuration, loaded by every worker."""

    is_remote = False

    def __init__(self, config: SelectConfig) -> None:
        self.config = config
        self.model = pinned_model(model_or_embedded(config.model, config.revision))
        self.weights_sha256 = self.files().weights_hash()
        self._of_run: Calibration | None = None

    def files(self) -> SelectorFiles:
        return find_selector(self.model, self.config.model_checkpoint_path)

    def calibration(self) -> Calibration | None:
        return match_calibration(
            stored_calibration(self.files()),
            self.config.scoring,
            weights_hash=lambda: self.weights_sha256,
        )

    def with_calibration(self, calibration: Calibration | None) -> "LocalBackend":
        of_run = copy.copy(self)
        of_run._of_run = calibration
        return of_run

    def open_scorer(self) -> SampleScorer:
        import torch

        from selectmoe.scoring.engine import ScoringEngine

        # A fixed number of threads: a sum that is split otherwise rounds otherwise, and the same
        # corpus would not give the same bytes on another machine.
        torch.set_num_threads(self.config.num_threads_per_actor)
        return ScoringEngine.from_pretrained(
            self.model,
            model_checkpoint_path=self.config.model_checkpoint_path,
            config=self.config.scoring,
            calibration=self._of_run,
        )


@dataclass(frozen=True, kw_only=True)
class ServedBackend:
    """What the backends that ask a server have in common: it describes its model itself."""

    info: ServerInfo

    @property
    def model(self) -> str:
        return self.info.model

    @property
    def weights_sha256(self) -> str:
        return self.info.weights_hash

    @property
    def is_remote(self) -> bool:
        return True

    def calibration(self) -> Calibration | None:
        return None if self.info.calibration is None else from_json(self.info.calibration)

    def with_calibration(self, calibration: Calibration | None) -> Self:
        ours, theirs = (
            part and describe(part)["length"] for part in (calibration, self.calibration())
        )
        if ours != theirs:
            raise ResumeError(
                "this run was started with another length adjustment of scores than the server "
                "has now (its calibration was made anew); start a new run"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class HttpBackend(ServedBackend):
    """A score server at a URL."""

    url: str
    api_key: str | None = field(repr=False)

    @classmethod
    def connect(cls, config: SelectConfig) -> "HttpBackend":
        """Raises SelectMoeError where no server answers, or it scores by other settings."""
        # Read here: a worker on another node has another environment.
        api_key = os.environ.get(API_KEY_VARIABLE) or None
        with ScoreClient(
            config.via, api_key=api_key, timeout_seconds=INFO_TIMEOUT_SECONDS
        ) as client:
            info = client.info()
        require_agreement(config, config.via, info)
        if info.max_samples < config.rows_per_shard:
            logger.warning(
                "%s takes %d samples a request, fewer than rows_per_shard=%d: shards are sent in "
                "parts, and a score may differ from that of via=actors in its last digit",
                config.via,
                info.max_samples,
                config.rows_per_shard,
            )
        return cls(info=info, url=config.via, api_key=api_key)

    def open_scorer(self) -> SampleScorer:
        return HttpScorer(self.url, self.api_key, dtype=self.info.dtype)


class HttpScorer:
    """Asks a score server; several threads may use one."""

    def __init__(self, url: str, api_key: str | None, *, dtype: str) -> None:
        self.device_and_dtype = (SERVER_DEVICE, dtype)
        self.signal_sizes = NO_SIGNALS
        self.client = ScoreClient(url, api_key=api_key, timeout_seconds=PATIENCE_SECONDS)

    def score(self, samples: Sequence[Sample]) -> list[ScoredSample | UnscoredSample]:
        """All samples form batches of their own, so a shard gets the bytes of a local engine."""
        answers = self.client.score_many(samples, detail="layers", batching="own")
        return [
            self._as_scored(sample, answer) for sample, answer in zip(samples, answers, strict=True)
        ]

    def _as_scored(
        self, sample: Sample, answer: ScoreResult | ScoreFailure
    ) -> ScoredSample | UnscoredSample:
        """The server's answer as a record of the pipeline."""
        if isinstance(answer, ScoreResult):
            return ScoredSample(
                sample_id=sample.sample_id,
                score=answer.score,
                num_tokens=answer.num_tokens,
                num_answer_tokens=answer.num_answer_tokens,
                truncated=answer.truncated,
                layer_scores=np.array(answer.layers, dtype=np.float32),
            )
        if answer.error_type == "validation" and answer.reason not in TOKENIZER_REASONS:
            # Our own reader accepted the row, so a server of another version would reject them all.
            raise ScoreRequestError(
                f"{self.client.url} rejected {sample.source or sample.sample_id} as invalid: "
                f"{answer.error}",
                error_type=answer.error_type,
            )
        return UnscoredSample(sample.sample_id, answer.reason or answer.error_type, answer.error)


def require_agreement(config: SelectConfig, name: str, info: ServerInfo) -> None:
    """Raises ConfigError where a server would score by other settings than the run is to record.

    A setting that is null is left to the server, and so is the model where none is given.
    """
    if config.scoring.signals:
        raise ConfigError(
            f"scoring.signals needs via=actors, got {list(config.scoring.signals)}: {name} gives "
            "scores alone"
        )
    given, defaults = resolved(config), resolved(SelectConfig())
    for key in LOCAL_SETTINGS:
        if given[key] != defaults[key]:
            raise ConfigError(f"{key} applies to via=actors; {name} is configured on the server")
    settings = (
        ("scoring.formula", info.formula),
        ("scoring.length", info.length),
        ("scoring.turns", info.turns),
        ("scoring.dtype", info.dtype),
        ("scoring.max_tokens_per_batch", info.max_tokens_per_batch),
        ("scoring.max_sequence_length", info.max_sequence_length),
    )
    for key, theirs in settings:
        if given[key] not in (None, theirs):
            raise ConfigError(
                f"{key} is {given[key]} here, and {name} scores with {theirs}; give {key}={theirs} "
                "or name another server"
            )
    if config.model is None and config.model_checkpoint_path is None:
        return
    weights_hash = hash_of_weights(config)
    if weights_hash != info.weights_hash:
        raise ConfigError(
            f"{name} scores with other weights (SHA-256 {info.weights_hash[:12]}…) than "
            f"model={config.model} model_checkpoint_path={config.model_checkpoint_path} has "
            f"({weights_hash[:12]}…); leave both out to use the server's"
        )


def hash_of_weights(config: SelectConfig) -> str:
    """SHA-256 of the model's weights and stage 1's."""
    model = pinned_model(model_or_embedded(config.model, config.revision))
    return find_selector(model, config.model_checkpoint_path).weights_hash()
