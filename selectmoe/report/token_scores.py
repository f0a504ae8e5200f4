"""Scores the tokens of a report's example rows once more, with the model that scored the run."""

from collections.abc import Sequence
from typing import Any

from selectmoe.config.loading import from_values, setting_types
from selectmoe.config.selection import SelectConfig
from selectmoe.errors import SelectMoeError
from selectmoe.model.checkpoint import weights_size
from selectmoe.model.free_memory import free_memory, in_words
from selectmoe.paths import model_or_embedded
from selectmoe.records import Sample, ScoredTokens, TokenizedSample
from selectmoe.report.examples import ScoredText, ScoreTexts
from selectmoe.selection.backends import HttpBackend, LocalBackend
from selectmoe.selection.in_process import require_engine_fits

# A larger model on a CPU takes minutes to load and to score 50 rows.
MAX_BYTES_ON_CPU = 1_000_000_000
# Gates are causal: tokens have the same scores in a conversation that is truncated later.
MOST_TOKENS = 1_024


class NoTokenScoresError(SelectMoeError):
    """Why the report has no token scores; it is written without them."""


def token_scorer(manifest: dict[str, Any], *, on_gpu: bool) -> ScoreTexts:
    """What scores tokens as the run in a manifest did.

    on_gpu: False where a GPU of this machine may be another's, as in the driver of a cluster.
    Raises NoTokenScoresError, or another SelectMoeError, where the model is not at hand.
    """
    config = config_of(manifest)
    if config.via == "serve":
        raise NoTokenScoresError("a Ray Serve deployment gives a run no token scores")
    if config.via != "actors":
        backend = HttpBackend.connect(config)
        _require_same_weights(backend.weights_sha256, manifest)
        return _ServerTokens(backend)
    on_gpu = on_gpu and has_gpu()
    if not on_gpu:
        _require_small(model_or_embedded(config.model, config.revision))
    local = LocalBackend(config)
    _require_same_weights(local.weights_sha256, manifest)
    return _LocalTokens(config, local, on_gpu=on_gpu)


def config_of(manifest: dict[str, Any]) -> SelectConfig:
    """The configuration of a run, also of one of an earlier version with other settings."""
    known = setting_types(SelectConfig)
    settings = {key: value for key, value in manifest["config"].items() if key in known}
    return from_values(SelectConfig, settings)


def has_gpu() -> bool:
    """Whether this process can score on a GPU; what the run itself has freed is given back."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return torch.cuda.is_available()


def _require_small(model: str) -> None:
    size = weights_size(model)
    if size > MAX_BYTES_ON_CPU:
        raise NoTokenScoresError(
            f"the model has {in_words(size)} of weights, which takes minutes on a CPU; 'selectmoe "
            "report RUN' on a machine with a GPU adds them"
        )


def _require_same_weights(now: str, manifest: dict[str, Any]) -> None:
    before = manifest["scoring"]["weights_sha256"]
    if now != before:
        raise NoTokenScoresError(
            f"the weights have changed since the run: their SHA-256 was {before[:12]}… and is "
            f"{now[:12]}… now"
        )


class _LocalTokens:
    """A ScoreTexts with the model in this process."""

    def __init__(self, config: SelectConfig, backend: LocalBackend, *, on_gpu: bool) -> None:
        free, kind = free_memory(on_gpu=on_gpu)
        require_engine_fits(config, backend.model, on_gpu=on_gpu, free=free, kind=kind)
        from selectmoe.scoring.engine import ScoringEngine

        self.engine = ScoringEngine.from_pretrained(
            backend.model,
            model_checkpoint_path=config.model_checkpoint_path,
            device="cuda" if on_gpu else "cpu",
            config=config.scoring,
            calibration=None,  # tokens have raw scores
            signals=(),
            max_sequence_length=min(config.scoring.max_sequence_length or MOST_TOKENS, MOST_TOKENS),
        )

    def __call__(self, samples: Sequence[Sample]) -> list[ScoredText | None]:
        tokenized = self.engine.tokenizer.tokenize_to_score(samples)
        accepted = [entry for entry in tokenized if isinstance(entry, TokenizedSample)]
        outcomes = iter(self.engine.score_each_token(accepted))
        return [
            self._text(sample, next(outcomes)) if isinstance(entry, TokenizedSample) else None
            for sample, entry in zip(samples, tokenized, strict=True)
        ]

    def _text(self, sample: Sample, outcome: object) -> ScoredText | None:
        if not isinstance(outcome, ScoredTokens):
            return None
        text, _ = self.engine.tokenizer.render(sample.messages, sample.tools)
        tokens = self.engine.tokenizer.token_texts(sample)
        return ScoredText(
            text,
            [
                (token.text, token.start, token.end, token.is_answer, score)
                for token, score in zip(tokens, outcome.token_scores.tolist(), strict=True)
            ],
        )


class _ServerTokens:
    """A ScoreTexts that asks a score server."""

    def __init__(self, backend: HttpBackend) -> None:
        from selectmoe.client import ScoreClient

        self.client = ScoreClient(backend.url, api_key=backend.api_key)

    def __call__(self, samples: Sequence[Sample]) -> list[ScoredText | None]:
        from selectmoe.client import ScoreResult

        answers = self.client.score_many(samples, detail="tokens", batching="own")
        return [
            ScoredText(
                "",
                [
                    (token.text, token.start, token.end, token.is_answer, token.score)
                    for token in answer.tokens or ()
                ],
            )
            if isinstance(answer, ScoreResult)
            else None
            for answer in answers
        ]
