"""Throughput of the scoring engine against plain transformers code and against the hardware's peak.

    python benchmarks/bench_scoring.py --data ../shared/data/instructions/dolly.jsonl
    python benchmarks/bench_scoring.py --shape olmoe-1b-7b --device cuda

naive         a straightforward loop: the causal LM with its router logits, batches of 16 rows in
              file order, padded to the longest, with an attention mask
transformers  the fastest settings of transformers: the base model without a head, sdpa, grouped_mm
              experts, rows sorted by length, batches of the engine's token budget
engine        ScoringEngine with its defaults for the device
packed        ScoringEngine with packed rows, where that is not the default

All get the same token ids, run `--repeats` times in turn, and are first compared with naive in
float32. MFU is the model FLOPs utilization: `flop_per_token` times tokens per second, over the
FLOP/s of one large matrix product that is measured in the same run. Without --data the demo corpus
is scored. No Ray.
"""

import argparse
import copy
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# Set before torch is imported: its profiler logs every start and stop.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import numpy as np
import torch
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import one_line_errors, report  # noqa: E402
from benchmarks.scoring_shapes import (  # noqa: E402
    MAX_SEQUENCE_LENGTH,
    SHAPES,
    Subject,
    flop_per_token,
    load_subject,
    product_flops,
)
from selectmoe.config.engine import EngineConfig, Formula  # noqa: E402
from selectmoe.data.packing import collate_padded, pad_samples  # noqa: E402
from selectmoe.model.devices import DTYPES, choose_dtype, choose_experts  # noqa: E402
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM  # noqa: E402
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR  # noqa: E402
from selectmoe.records import PaddedBatch, ScoredSample, TokenizedSample  # noqa: E402
from selectmoe.scoring.engine import ScoringEngine  # noqa: E402
from selectmoe.scoring.formulas import (  # noqa: E402
    SCORE_FORMULAS,
    good_margins,
    layer_scores,
    sample_scores,
    scored_tokens,
)

NAIVE_BATCH_SIZE = 16
FORMULA: Formula = "answer_margin"
TOLERANCE = 1e-5  # float32 sums over tensors of other shapes
PARTS = ("projections", "attention", "gates", "routing", "experts")  # ranges of the packed forward

Rows = Sequence[TokenizedSample]
Scorer = Callable[[Rows], np.ndarray]


def batches_in_order(rows: Rows) -> Iterable[PaddedBatch]:
    for start in range(0, len(rows), NAIVE_BATCH_SIZE):
        yield collate_padded(rows, np.arange(start, min(start + NAIVE_BATCH_SIZE, len(rows))))


@torch.no_grad()
def score_batches(
    margins: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batches: Iterable[PaddedBatch],
    device: torch.device,
) -> np.ndarray:
    """margins maps token ids and attention mask [B, T] to float32 [L, B, T]; returns (rows,)."""
    formula, positions, scores_by_batch = SCORE_FORMULAS[FORMULA], [], []
    for batch in batches:
        ids_BT, attention_BT, answer_BT = (
            torch.from_numpy(array).to(device)
            for array in (batch.token_ids, batch.attention_mask, batch.answer_mask)
        )
        mask_BT = scored_tokens(answer_BT, attention_BT, formula.tokens)
        by_layer_BL = layer_scores(margins(ids_BT, attention_BT), mask_BT, formula)
        scores_by_batch.append(sample_scores(by_layer_BL, formula))
        positions.append(batch.positions)
    scores = torch.cat(scores_by_batch).cpu().numpy()
    ordered = np.empty_like(scores)
    ordered[np.concatenate(positions)] = scores
    return ordered


def score_naively(model: SelectMoeForCausalLM, rows: Rows) -> np.ndarray:
    def margins(ids_BT: torch.Tensor, attention_BT: torch.Tensor) -> torch.Tensor:
        output = model(
            input_ids=ids_BT, attention_mask=attention_BT.long(), output_router_logits=True
        )
        return good_margins(torch.stack([x["quality_logits"] for x in output.router_logits]))

    return score_batches(margins, batches_in_order(rows), model.device)


def score_with_transformers(model: SelectMoeForCausalLM, rows: Rows, budget: int) -> np.ndarray:
    def margins(ids_BT: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        decoded = model.model(input_ids=ids_BT, use_cache=False, output_quality_logits=True)
        return good_margins(torch.stack(decoded["quality_logits"]))

    return score_batches(margins, pad_samples(rows, max_tokens_per_batch=budget), model.device)


def score_with_engine(engine: ScoringEngine, rows: Rows) -> np.ndarray:
    outcomes = engine.score_tokenized(rows)
    return np.array([o.score for o in outcomes if isinstance(o, ScoredSample)], dtype=np.float32)


def scoring_functions(
    subject: Subject, model: SelectMoeForCausalLM, max_tokens: int | None
) -> tuple[dict[str, Scorer], ScoringEngine]:
    """The implementations by name, and the engine with packed rows."""
    config = EngineConfig(
        formula=FORMULA, max_sequence_length=MAX_SEQUENCE_LENGTH, max_tokens_per_batch=max_tokens
    )
    by_default = ScoringEngine(model.model, subject.tokenizer, config)
    packed = by_default
    if by_default.packed is None:
        config = replace(config, row_layout="packed")
        packed = ScoringEngine(model.model, subject.tokenizer, config)
    engine_experts = choose_experts(None, on_gpu=model.device.type != "cpu")

    def with_experts(score: Scorer, experts: str, *, gate_only: bool) -> Scorer:
        def score_rows(rows: Rows) -> np.ndarray:
            # The implementations share one model, so each sets it up before every run.
            model.set_experts_implementation(experts)
            model.model.layers[-1].mlp.gate_only = gate_only
            return score(rows)

        return score_rows

    budget = by_default.max_tokens_per_batch
    scorers: dict[str, Scorer] = {
        "naive": partial(score_naively, model),
        "transformers": partial(score_with_transformers, model, budget=budget),
    }
    scorers = {
        name: with_experts(score, "grouped_mm", gate_only=False) for name, score in scorers.items()
    }
    engine = partial(score_with_engine, by_default)
    scorers["engine"] = with_experts(engine, engine_experts, gate_only=True)
    if packed is not by_default:
        scorers["packed"] = partial(score_with_engine, packed)
    return scorers, packed


def in_dtype(model: SelectMoeForCausalLM, dtype: str) -> SelectMoeForCausalLM:
    """Converts as `from_pretrained` does; `to` alone would also round the rotary frequencies."""
    rotary = copy.deepcopy(model.model.rotary_emb)
    untyped: Any = model
    untyped.to(DTYPES[dtype])
    model.model.rotary_emb = rotary
    return model


def compare_scores(scores: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    return {
        "max_score_difference": float(np.abs(scores - reference).max()),
        "rank_correlation": round(float(spearmanr(scores, reference).statistic), 5),
    }


def compare_bfloat16(subject: Subject, reference: np.ndarray, rows: Rows) -> dict[str, float]:
    model = in_dtype(copy.deepcopy(subject.model), "bfloat16")
    scorers, _ = scoring_functions(subject, model, None)
    return compare_scores(scorers["engine"](rows), reference)


def measure(
    scorers: Mapping[str, Scorer], rows: Rows, *, repeats: int, on_gpu: bool
) -> dict[str, dict[str, Any]]:
    """Runs all implementations in turn, `repeats` times: speed and peak memory."""
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    peaks = dict.fromkeys(scorers, 0)
    for _ in range(repeats):
        for name, score in scorers.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            score(rows)  # copies the scores to the host, so the device has finished
            seconds[name].append(time.perf_counter() - started)
            peaks[name] = torch.cuda.max_memory_allocated() if on_gpu else process_peak_bytes()
    num_tokens = sum(len(row.token_ids) for row in rows)
    return {
        name: {
            "tokens_per_second": round(num_tokens / statistics.median(taken)),
            "samples_per_second": round(len(rows) / statistics.median(taken), 1),
            "seconds": [round(value, 3) for value in taken],
            # On a CPU it is the peak of the process so far: only that of the first one is its own.
            "peak_memory_mb": round(peaks[name] / 1e6),
        }
        for name, taken in seconds.items()
    }


def process_peak_bytes() -> int:
    return 1_024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux


def breakdown(engine: ScoringEngine, subject: Subject, rows: Rows) -> dict[str, float]:
    """Fractions of the packed forward pass's time, on the device if that is a GPU; and the time of
    tokenization, which runs in a background thread, as a fraction of the same total."""
    on_gpu = engine.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        started = time.perf_counter()
        score_with_engine(engine, rows)
        taken = time.perf_counter() - started
    events = [e for e in profiler.key_averages() if e.device_type == torch.profiler.DeviceType.CPU]
    spent = {
        event.key: (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6
        for event in events
        if event.key in PARTS
    }
    total = sum(e.self_device_time_total for e in events) / 1e6 if on_gpu else taken
    shares = {name: round(spent.get(name, 0.0) / total, 3) for name in PARTS}
    started = time.perf_counter()
    engine.tokenizer.tokenize(subject.samples[: len(rows)])
    tokenizing = (time.perf_counter() - started) / taken
    other = round(1 - sum(shares.values()), 3)
    return {**shares, "other": other, "tokenizing_in_background": round(tokenizing, 3)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="embedded", help="model size")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--data", default=str(DEMO_CORPUS))
    parser.add_argument("--model", type=Path, default=EMBEDDED_SELECTOR)
    parser.add_argument("--num-rows", type=int, default=1_000, help="number of rows")
    parser.add_argument("--num-checked", type=int, default=200, help="rows of the comparison")
    parser.add_argument("--max-tokens", type=int, help="tokens per batch; default: the engine's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="60 rows, one repeat; no result file")
    args = parser.parse_args()
    if args.quick:
        args.num_rows, args.num_checked, args.repeats = 60, 60, 1
    return args


def run(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    on_gpu = args.device == "cuda"
    subject = load_subject(
        args.shape, data=args.data, num_rows=args.num_rows, device=args.device, model=args.model
    )
    rows, checked = subject.rows, subject.rows[: args.num_checked]
    reference = score_naively(subject.model, checked)
    rounded = {} if on_gpu else {"bfloat16": compare_bfloat16(subject, reference, checked)}
    model = in_dtype(subject.model, dtype)
    scorers, packed = scoring_functions(subject, model, args.max_tokens)
    differences = {
        name: compare_scores(score(checked), reference) for name, score in scorers.items()
    }
    speeds = measure(scorers, rows, repeats=args.repeats, on_gpu=on_gpu)
    flop = flop_per_token(model.config, [len(row.token_ids) for row in rows])
    return {
        "shape": args.shape,
        "device": args.device,
        "dtype": dtype,
        "token_ids": "random" if args.shape == "olmoe-1b-7b" else "of the corpus",
        "num_rows": len(rows),
        "num_tokens": sum(len(row.token_ids) for row in rows),
        "max_tokens_per_batch": packed.max_tokens_per_batch,
        "against_float32": {**differences, **rounded},
        "mflop_per_token": round(flop / 1e6, 3),
        **compare_speeds(speeds, product_flops(args.device, DTYPES[dtype]) / flop),
        "packed_time_fractions": breakdown(packed, subject, checked),
    }


def compare_speeds(
    speeds: dict[str, dict[str, Any]], peak_tokens_per_second: float
) -> dict[str, Any]:
    naive = speeds["naive"]["seconds"]
    return {
        "peak_tokens_per_second": round(peak_tokens_per_second),
        "implementations": {
            name: {**speed, "mfu": round(speed["tokens_per_second"] / peak_tokens_per_second, 3)}
            for name, speed in speeds.items()
        },
        "speedup_over_naive": {
            name: [round(n / s, 2) for n, s in zip(naive, speed["seconds"], strict=True)]
            for name, speed in speeds.items()
        },
    }


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("error: --device cuda: torch finds no CUDA device")
    dtype = str(choose_dtype(args.dtype, on_gpu=on_gpu)).removeprefix("torch.")
    measured = run(args, dtype)
    name = "bench_scoring"
    if args.shape != "embedded" or on_gpu:
        name += f"_{args.shape}_{args.device}"
    report(name, measured, quick=args.quick)
    compared = measured["against_float32"]
    worst = max(compared[name]["max_score_difference"] for name in measured["implementations"])
    if dtype == "float32" and not on_gpu and worst > TOLERANCE:
        sys.exit(f"error: scores differ by {worst:.1e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    with one_line_errors():
        main()
