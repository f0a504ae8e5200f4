"""Tokens a second of the engine against the plain way, on the same rows in one run.

    python benchmarks/bench_scoring.py --data ../shared/data/instructions/dolly.jsonl

The plain way is what one writes first: the causal LM with its router logits, batches of 16 rows in
file order, padded to the longest, with an attention mask. Both sides tokenise beforehand, run
`--repeats` times in turn, and must give the same scores to 1e-5. Without --data the demo corpus
is scored.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import describe_run, write_result  # noqa: E402
from selectmoe.data.packing import collate  # noqa: E402
from selectmoe.data.readers import read_corpus  # noqa: E402
from selectmoe.gate_scores import (  # noqa: E402
    SCORE_FORMULAS,
    good_margins,
    layer_scores,
    sample_scores,
    scored_tokens,
)
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM  # noqa: E402
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR  # noqa: E402
from selectmoe.records import Sample, ScoredSample, TokenizedSample  # noqa: E402
from selectmoe.scoring import ScoringEngine  # noqa: E402

PLAIN_ROWS_PER_BATCH = 16
FORMULA = "answer_margin"
TOLERANCE = 1e-5  # float32 sums of other shapes


@torch.no_grad()
def score_plainly(model: SelectMoeForCausalLM, rows: Sequence[TokenizedSample]) -> np.ndarray:
    """The plain way: float32 (N,)."""
    found = []
    for start in range(0, len(rows), PLAIN_ROWS_PER_BATCH):
        part = rows[start : start + PLAIN_ROWS_PER_BATCH]
        batch = collate(part, np.arange(len(part)))
        attention_mask_BT = torch.from_numpy(batch.attention_mask)
        output = model(
            input_ids=torch.from_numpy(batch.token_ids),
            attention_mask=attention_mask_BT.long(),
            output_router_logits=True,
        )
        logits_LBT2 = torch.stack([layer["quality_logits"] for layer in output.router_logits])
        formula = SCORE_FORMULAS[FORMULA]
        mask_BT = scored_tokens(
            torch.from_numpy(batch.answer_mask), attention_mask_BT, formula.tokens
        )
        by_layer_BL = layer_scores(good_margins(logits_LBT2), mask_BT, formula)
        found.append(sample_scores(by_layer_BL, formula).numpy())
    return np.concatenate(found)


def score_with_engine(engine: ScoringEngine, rows: Sequence[TokenizedSample]) -> np.ndarray:
    outcomes = engine.score_tokenized(rows)
    return np.array([o.score for o in outcomes if isinstance(o, ScoredSample)], dtype=np.float32)


def timed(score: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    scores = score()
    return time.perf_counter() - started, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=str(DEMO_CORPUS))
    parser.add_argument("--model", default=str(EMBEDDED_SELECTOR))
    parser.add_argument("--num-rows", type=int, default=1_000, help="the first so many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    samples = [row for row in read_corpus(args.data) if isinstance(row, Sample)][: args.num_rows]
    engine = ScoringEngine.from_pretrained(args.model, device="cpu", formula=FORMULA)
    rows = engine.tokenizer.tokenize(samples)
    num_tokens = sum(len(row.token_ids) for row in rows)
    plain = SelectMoeForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    seconds: dict[str, list[float]] = {"plain": [], "engine": []}
    for _ in range(args.repeats):
        plain_seconds, plain_scores = timed(lambda: score_plainly(plain, rows))
        engine_seconds, engine_scores = timed(lambda: score_with_engine(engine, rows))
        seconds["plain"].append(plain_seconds)
        seconds["engine"].append(engine_seconds)
    difference = float(np.abs(plain_scores - engine_scores).max())
    ratios = [p / e for p, e in zip(seconds["plain"], seconds["engine"], strict=True)]
    result: dict[str, object] = {
        **describe_run(),
        "num_rows": len(rows),
        "num_tokens": num_tokens,
        "plain_tokens_per_second": round(num_tokens / statistics.median(seconds["plain"])),
        "engine_tokens_per_second": round(num_tokens / statistics.median(seconds["engine"])),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "max_score_difference": difference,
    }
    write_result("bench_scoring", result)
    if difference > TOLERANCE:
        sys.exit(f"scores differ by {difference:.1e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
