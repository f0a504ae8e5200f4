"""Tokens a second of the engine against the plain way and transformers' fastest, and the floor.

    python benchmarks/bench_scoring.py --data ../shared/data/instructions/dolly.jsonl
    python benchmarks/bench_scoring.py --shape olmoe-1b-7b --device cuda

plain         what one writes first: the causal LM with its router logits, batches of 16 rows in
              file order, padded to the longest, with an attention mask
transformers  its own fastest settings: the base model without a head, sdpa, grouped_mm experts,
              rows sorted by length, batches of the engine's token budget
engine        ScoringEngine as it is by default on the device
packed        ScoringEngine with rows end to end, where that is not the default

All read the same token ids, run `--repeats` times in turn, and are held against the plain way in
float32 first. The floor is `flop_per_token` at the speed of one large product, measured in the same
run. Without --data the demo corpus is scored. No Ray.
"""

import argparse
import copy
import dataclasses
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: its profiler tells each start and end, and what was allocated before.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import numpy as np
import torch
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import describe_run, one_line_errors, print_result, write_result  # noqa: E402
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

PLAIN_ROWS_PER_BATCH = 16
FORMULA: Formula = "answer_margin"
TOLERANCE = 1e-5  # float32 sums of other shapes
PARTS = ("projections", "attention", "gates", "routing", "experts")  # as the packed pass names them

Rows = Sequence[TokenizedSample]


def batches_in_order(rows: Rows) -> Iterable[PaddedBatch]:
    for start in range(0, len(rows), PLAIN_ROWS_PER_BATCH):
        yield collate_padded(rows, np.arange(start, min(start + PLAIN_ROWS_PER_BATCH, len(rows))))


@torch.no_grad()
def score_batches(
    margins: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batches: Iterable[PaddedBatch],
    device: torch.device,
) -> np.ndarray:
    """margins: (token ids [B, T], attention mask) -> float32 [L, B, T]. float32 (rows,)."""
    formula, positions, found = SCORE_FORMULAS[FORMULA], [], []
    for batch in batches:
        ids_BT, attention_BT, answer_BT = (
            torch.from_numpy(array).to(device)
            for array in (batch.token_ids, batch.attention_mask, batch.answer_mask)
        )
        mask_BT = scored_tokens(answer_BT, attention_BT, formula.tokens)
        by_layer_BL = layer_scores(margins(ids_BT, attention_BT), mask_BT, formula)
        found.append(sample_scores(by_layer_BL, formula))
        positions.append(batch.positions)
    scores = torch.cat(found).cpu().numpy()
    ordered = np.empty_like(scores)
    ordered[np.concatenate(positions)] = scores
    return ordered


def score_plainly(model: SelectMoeForCausalLM, rows: Rows) -> np.ndarray:
    def margins(ids_BT: torch.Tensor, attention_BT: torch.Tensor) -> torch.Tensor:
        output = model(
            input_ids=ids_BT, attention_mask=attention_BT.long(), output_router_logits=True
        )
        return good_margins(torch.stack([x["quality_logits"] for x in output.router_logits]))

    return score_batches(margins, batches_in_order(rows), model.device)


def score_as_transformers(model: SelectMoeForCausalLM, rows: Rows, budget: int) -> np.ndarray:
    def margins(ids_BT: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        decoded = model.model(input_ids=ids_BT, use_cache=False, output_quality_logits=True)
        return good_margins(torch.stack(decoded["quality_logits"]))

    return score_batches(margins, pad_samples(rows, max_tokens_per_batch=budget), model.device)


def score_with_engine(engine: ScoringEngine, rows: Rows) -> np.ndarray:
    outcomes = engine.score_tokenized(rows)
    return np.array([o.score for o in outcomes if isinstance(o, ScoredSample)], dtype=np.float32)


def ways_to_score(
    subject: Subject, model: SelectMoeForCausalLM, max_tokens: int | None
) -> tuple[dict[str, Callable[[Rows], np.ndarray]], ScoringEngine]:
    """The ways by name, and the engine with packed batches. Each sets the model up for itself."""
    config = EngineConfig(
        formula=FORMULA, max_sequence_length=MAX_SEQUENCE_LENGTH, max_tokens_per_batch=max_tokens
    )
    by_default = ScoringEngine(model.model, subject.tokenizer, config)
    packed = by_default
    if by_default.packed is None:
        config = dataclasses.replace(config, row_layout="packed")
        packed = ScoringEngine(model.model, subject.tokenizer, config)
    engine_experts = choose_experts(None, on_gpu=model.device.type != "cpu")

    def way(score: Callable[[Rows], np.ndarray], experts: str, *, skips: bool) -> Any:  # noqa: ANN401
        def prepared(rows: Rows) -> np.ndarray:
            model.set_experts_implementation(experts)
            model.model.layers[-1].mlp.gate_only = skips
            return score(rows)

        return prepared

    budget = by_default.max_tokens_per_batch
    ways = {
        "plain": way(lambda rows: score_plainly(model, rows), "grouped_mm", skips=False),
        "transformers": way(
            lambda rows: score_as_transformers(model, rows, budget), "grouped_mm", skips=False
        ),
        "engine": way(lambda rows: score_with_engine(by_default, rows), engine_experts, skips=True),
    }
    if packed is not by_default:
        ways["packed"] = lambda rows: score_with_engine(packed, rows)
    return ways, packed


def in_dtype(model: SelectMoeForCausalLM, dtype: str) -> SelectMoeForCausalLM:
    """As loading in the dtype: `to` alone would round rotary frequencies, too."""
    rotary = copy.deepcopy(model.model.rotary_emb)
    untyped: Any = model
    untyped.to(DTYPES[dtype])
    model.model.rotary_emb = rotary
    return model


def drift(scores: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    return {
        "max_score_difference": float(np.abs(scores - reference).max()),
        "rank_correlation": round(float(spearmanr(scores, reference).statistic), 5),
    }


def bfloat16_drift(subject: Subject, reference: np.ndarray, rows: Rows) -> dict[str, float]:
    half = in_dtype(copy.deepcopy(subject.model), "bfloat16")
    ways, _ = ways_to_score(subject, half, None)
    return drift(ways["engine"](rows), reference)


def measure(
    ways: dict[str, Callable[[Rows], np.ndarray]], rows: Rows, *, repeats: int, on_gpu: bool
) -> dict[str, dict[str, Any]]:
    """Each way in turn, `repeats` times: seconds, and the peak of memory."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks = dict.fromkeys(ways, 0)
    for _ in range(repeats):
        for name, score in ways.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            score(rows)  # ends with its numbers on the host
            seconds[name].append(time.perf_counter() - started)
            peaks[name] = torch.cuda.max_memory_allocated() if on_gpu else process_peak_bytes()
    num_tokens = sum(len(row.token_ids) for row in rows)
    return {
        name: {
            "tokens_per_second": round(num_tokens / statistics.median(taken)),
            "samples_per_second": round(len(rows) / statistics.median(taken), 1),
            "seconds": [round(value, 3) for value in taken],
            # Of a CPU it is the whole process's so far, so only the first way's says something.
            "peak_memory_mb": round(peaks[name] / 1e6),
        }
        for name, taken in seconds.items()
    }


def process_peak_bytes() -> int:
    return 1_024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux


def breakdown(engine: ScoringEngine, subject: Subject, rows: Rows) -> dict[str, float]:
    """Shares of the packed engine's time, of the device where that is a GPU; and tokenising's
    seconds beside it, which a thread spends meanwhile."""
    on_gpu = engine.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=activities) as profiler:
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
    return {**shares, "other": other, "tokenizing_beside_it": round(tokenizing, 3)}


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="embedded", help="random weights of it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--data", default=str(DEMO_CORPUS))
    parser.add_argument("--model", type=Path, default=EMBEDDED_SELECTOR)
    parser.add_argument("--num-rows", type=int, default=1_000, help="the first so many")
    parser.add_argument("--num-checked", type=int, default=200, help="rows held against float32")
    parser.add_argument("--max-tokens", type=int, help="the budget; default: the engine's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="60 rows, once; writes no file")
    args = parser.parse_args()
    if args.quick:
        args.num_rows, args.num_checked, args.repeats = 60, 60, 1
    return args


def main() -> None:
    args = parsed_arguments()
    torch.set_num_threads(args.threads)
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no CUDA device here")
    dtype = str(choose_dtype(args.dtype, on_gpu=on_gpu)).removeprefix("torch.")
    subject = load_subject(
        args.shape, data=args.data, num_rows=args.num_rows, device=args.device, model=args.model
    )
    rows, checked = subject.rows, subject.rows[: args.num_checked]
    reference = score_plainly(subject.model, checked)
    rounded = {} if on_gpu else {"bfloat16": bfloat16_drift(subject, reference, checked)}
    model = in_dtype(subject.model, dtype)
    ways, packed = ways_to_score(subject, model, args.max_tokens)
    drifts = {name: drift(score(checked), reference) for name, score in ways.items()}
    speeds = measure(ways, rows, repeats=args.repeats, on_gpu=on_gpu)
    flop = flop_per_token(model.config, [len(row.token_ids) for row in rows])
    floor = product_flops(args.device, DTYPES[dtype]) / flop
    for speed in speeds.values():
        speed["share_of_floor"] = round(speed["tokens_per_second"] / floor, 3)
    plain = speeds["plain"]["seconds"]
    result: dict[str, object] = {
        **describe_run(),
        "shape": args.shape,
        "device": args.device,
        "dtype": dtype,
        "token_ids": "random" if args.shape == "olmoe-1b-7b" else "of the corpus",
        "num_rows": len(rows),
        "num_tokens": sum(len(row.token_ids) for row in rows),
        "budget_tokens": packed.max_tokens_per_batch,
        "against_float32": {**drifts, **rounded},
        "mflop_per_token": round(flop / 1e6, 3),
        "floor_tokens_per_second": round(floor),
        "ways": speeds,
        "times_as_fast_as_plain": {
            name: [round(p / s, 2) for p, s in zip(plain, speed["seconds"], strict=True)]
            for name, speed in speeds.items()
        },
        "packed_time_shares": breakdown(packed, subject, checked),
    }
    usual = args.shape == "embedded" and not on_gpu
    if args.quick:
        print_result(result)
    else:
        write_result(f"bench_scoring{'' if usual else f'_{args.shape}_{args.device}'}", result)
    worst = max(found["max_score_difference"] for found in drifts.values())
    if dtype == "float32" and not on_gpu and worst > TOLERANCE:
        sys.exit(f"scores differ by {worst:.1e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    with one_line_errors():
        main()
