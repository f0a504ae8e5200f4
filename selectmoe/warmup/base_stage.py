"""Gate warm-up on a base. By features: the workers compute once what gates would read of the rows
and of their corrupted copies, and rank 0 fits the gates to it. By steps: as on a Select-MoE.

<run>/features/*.safetensors    what the gates read (`feature_shards`); may be deleted afterwards
<run>/layers.json               the layers that were tried, where they were chosen here
<run>/gates.safetensors, gates_config.json, calibration.json    the selector folder
"""

import hashlib
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from selectmoe.config.engine import EngineConfig
from selectmoe.config.warmup import TrainingConfig, WarmupConfig
from selectmoe.data.writers import write_json
from selectmoe.model.base_weights import hash_base
from selectmoe.model.checkpoint import model_folder
from selectmoe.model.decoder_layers import decoder_layers
from selectmoe.model.gates_config import GATES_NAME, file_sha256
from selectmoe.paths import model_or_embedded
from selectmoe.scoring.calibration import Calibration, calibrate, describe, save_calibration
from selectmoe.training.metrics_lines import METRICS_NAME
from selectmoe.training.worker import TrainingWorker
from selectmoe.warmup.base_model import base_shape, load_base, save_selector
from selectmoe.warmup.feature_shards import (
    CopySettings,
    FeatureWork,
    RowFeatures,
    compute_share,
    load_features,
)
from selectmoe.warmup.gate_features import FeatureReader
from selectmoe.warmup.gate_fit import fit_gates
from selectmoe.warmup.gate_model import Trainee
from selectmoe.warmup.gate_objectives import ContrastiveObjective
from selectmoe.warmup.held_out import copy_weights, rows_with_copies
from selectmoe.warmup.layer_choice import PENALTIES, PenaltyChoice, choose_layers, choose_penalty
from selectmoe.warmup.rows import load_training_rows, warmup_tokenizer
from selectmoe.warmup.settings import chooses_layers, corruption_kinds, layers_to_read
from selectmoe.warmup.stage import WarmupReport, step_settings, train
from selectmoe.warmup.step_batches import StepBatches
from selectmoe.warmup.trainable_gates import BaseGateTrainer, TrainableGates

LAYERS_NAME = "layers.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseWarmupReport:
    """What rank 0 reports of gates on a base."""

    weights: str  # path of gates.safetensors
    num_parameters_trained: int
    num_copies: int
    layers: list[int]
    penalty: float
    held_out_auroc: float  # rows against copies, by gates that were fitted without them
    fit_seconds: float  # layers, penalty, gates and calibration
    calibration: dict[str, Any] | None


def run_base_warmup(config: WarmupConfig, worker: TrainingWorker) -> BaseWarmupReport | None:
    """One worker's part of stage 1 on a base, on the tokenized rows in `worker.output`. Rank 0
    writes and reports; it waits for the features of the others."""
    model = model_or_embedded(config.model, config.revision)
    work = feature_work(config, worker)
    compute_features(work, config.training, worker, model=model)
    if worker.rank > 0:
        return None
    features = load_features(work)
    started = time.perf_counter()
    learned = rows_with_copies(features)
    features = features.some_rows(learned)
    read = layers_to_read(config.training, base_shape(model).num_hidden_layers)
    positions = chosen_positions(features, config, worker)
    features = features.layers(positions)
    choice = choose_penalty(features, penalties(config.training), seed=config.seed)
    gates = fit_gates(
        features.rows_NLH,
        features.copies_MLH,
        copy_weights(features.parents_M),
        penalty=choice.penalty,
    )
    layers = tuple(read[position] for position in positions)
    gate_set = save_selector(worker.output, gates, model=model, layers=layers)
    calibration = calibrate_held_out(work, learned, choice, model=model)
    save_calibration(worker.output, calibration)
    report = BaseWarmupReport(
        weights=str(worker.output / GATES_NAME),
        num_parameters_trained=gate_set.weights_L2H.numel() + gate_set.biases_L2.numel(),
        num_copies=len(features.parents_M),
        layers=list(layers),
        penalty=choice.penalty,
        held_out_auroc=round(choice.held_out.auroc, 4),
        fit_seconds=round(time.perf_counter() - started, 3),
        calibration=describe(calibration),
    )
    log_metrics(worker, phase="gates", **asdict(report))
    return report


def run_base_steps(config: WarmupConfig, worker: TrainingWorker) -> WarmupReport:
    """One worker's part of stage 1 on a base by optimizer steps; rank 0 writes."""
    model, training = model_or_embedded(config.model, config.revision), config.training
    base = load_base(model_folder(model), training, worker)
    layers = layers_to_read(training, base_shape(model).num_hidden_layers)
    gates = TrainableGates(base, layers)
    del base  # without its head and the layers above the last gate, it is inside `gates`
    objective = ContrastiveObjective(training.label_weight, training.quality_loss_weight)
    rows, chat = load_training_rows(worker.output), warmup_tokenizer(config)
    trainer = train(
        Trainee(gates, objective, is_adapter=False),
        StepBatches(rows, chat, step_settings(training, worker, seed=config.seed, for_base=True)),
        training,
        worker=worker,
        trainer_class=BaseGateTrainer,
    )
    if worker.rank == 0:
        save_selector(worker.output, gates.linear_gates(), model=model, layers=layers)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return WarmupReport(
        weights=str(worker.output / GATES_NAME),
        num_steps=training.num_steps,
        num_parameters_trained=sum(p.numel() for p in gates.quality_gate.parameters()),
        last_metrics=logs[-1] if logs else {},
    )


def feature_work(config: WarmupConfig, worker: TrainingWorker) -> FeatureWork:
    training = config.training
    return FeatureWork(
        run=worker.output,
        rows=load_training_rows(worker.output),
        copies=CopySettings(
            kinds=corruption_kinds(training, for_base=True),
            num_copies=training.num_copies,
            seed=config.seed,
        ),
        tokenizer=warmup_tokenizer(config),
        max_tokens_per_batch=training.max_tokens_per_batch
        or (16_384 if worker.uses_gpu else 4_096),
    )


def compute_features(
    work: FeatureWork, training: TrainingConfig, worker: TrainingWorker, *, model: str
) -> None:
    """This worker's share of the features; loads the base only where some are missing."""
    if not any(n % worker.num_workers == worker.rank for n in work.missing()):
        return
    base = load_base(model_folder(model), training, worker)
    reader = FeatureReader(base, layers_to_read(training, len(decoder_layers(base))))

    def on_progress(num_rows: int, tokens_per_second: float) -> None:
        if worker.rank == 0:
            log_metrics(
                worker,
                phase="features",
                rows=num_rows,
                num_rows=len(work.rows.samples),
                tokens_per_second=worker.num_workers * tokens_per_second,
            )

    compute_share(
        work, reader, rank=worker.rank, num_workers=worker.num_workers, on_progress=on_progress
    )


def penalties(training: TrainingConfig) -> tuple[float, ...]:
    """Penalties of the fit to try."""
    return PENALTIES if training.penalty is None else (training.penalty,)


def chosen_positions(
    features: RowFeatures, config: WarmupConfig, worker: TrainingWorker
) -> list[int]:
    """Which of the layers that were read get a gate."""
    num_layers = features.rows_NLH.shape[1]
    if not chooses_layers(config.training):
        return list(range(num_layers))
    best, tried = choose_layers(features, seed=config.seed)
    write_json(worker.output / LAYERS_NAME, [asdict(window) for window in tried])
    log_metrics(worker, phase="layers", num_layers=num_layers, **asdict(best))
    return list(range(best.first, best.last + 1))


def calibrate_held_out(
    work: FeatureWork, learned: np.ndarray, choice: PenaltyChoice, *, model: str
) -> Calibration:
    """The calibration of the rows' held-out margins: those of rows that gates were fitted to are
    further from their copies' than any other row's will be.

    learned: positions of the rows that have a copy, among which `choice.rows` are positions.
    """
    indices = learned[choice.rows]
    counts = [int(work.rows.tokenized[index].answer_mask.sum()) for index in indices]
    corpus = Counter(work.rows.samples[index].dataset for index in indices)
    hashes = hash_base(model_folder(model)) + file_sha256(work.run / GATES_NAME)
    weights_hash = hashlib.sha256(hashes.encode()).hexdigest()
    return calibrate(
        choice.held_out.rows_N,
        counts,
        config=EngineConfig(),
        max_sequence_length=work.tokenizer.max_sequence_length,
        weights_hash=weights_hash,
        corpus=dict(sorted(corpus.items())),
    )


def log_metrics(worker: TrainingWorker, **row: object) -> None:
    """Appends a line to metrics.jsonl, which the driver shows."""
    with (worker.output / METRICS_NAME).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
