"""Build the embedded selector: add gates to the tiny base, warm them up, save it in bfloat16.

    python recipes/train_tiny_selector.py --base DIR --instructions DIR --num-steps 600

--base: a checkpoint saved by recipes/contrast_tiny_base.py. `make selector` runs all recipes in
order. The tenth of the rows that is held out from the base is held out from the gates, too. The
model card reports the AUROC per kind of corruption on one half of it, the test set; the other half
is the validation set.
"""

import argparse
import json
import logging
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, OlmoeConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recipes.calibrate_selector import calibrate_selector  # noqa: E402
from recipes.gate_warmup import GateWarmup, warm_up_gates  # noqa: E402
from recipes.held_out_auroc import auroc_by_kind, copies_by_kind, score_samples  # noqa: E402
from recipes.held_out_rows import is_held_out, is_test_row, read_samples  # noqa: E402
from recipes.train_tiny_base import training_parser  # noqa: E402
from selectmoe.data.writers import write_json  # noqa: E402
from selectmoe.model.conversion import ADDED_PARTS, gated_config  # noqa: E402
from selectmoe.model.devices import choose_experts  # noqa: E402
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM  # noqa: E402
from selectmoe.model.quiet_loading import load_model  # noqa: E402
from selectmoe.records import Sample  # noqa: E402
from selectmoe.scoring.engine import ScoringEngine  # noqa: E402

TARGET = ROOT / "selectmoe" / "assets" / "tiny_selector"
CARD = ROOT / "recipes" / "tiny_selector_card.md"
NUM_EVALUATED = 600


def add_gates(base: Path, seed: int) -> SelectMoeForCausalLM:
    """The base with newly initialized gates, in float32."""
    torch.manual_seed(seed)
    return load_model(
        SelectMoeForCausalLM,
        base,
        new_parts=ADDED_PARTS,
        config=gated_config(OlmoeConfig.from_pretrained(base), {}),
        dtype=torch.float32,
        experts_implementation=choose_experts(None, on_gpu=torch.cuda.is_available()),
    )


def parse_arguments() -> argparse.Namespace:
    # Not the seeds of the gates through which the base was trained (0 and 2): those gates would
    # start with the very weights that its features were learned for.
    parser = training_parser(__doc__, save_path=TARGET, seed=1)
    parser.add_argument("--base", type=Path, required=True, help="checkpoint of the base")
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32, help="samples per step")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    rows = read_samples([str(args.instructions)])
    training = [row for row in rows if not is_held_out(row.sample_id)]
    model = train_selector(training, args)
    calibrate_selector(args.save_path, training, seed=args.seed)
    auroc = evaluate_selector(rows, args)
    report = training_report(auroc, args)
    write_json(args.save_path / "training_report.json", report)
    (args.save_path / "README.md").write_text(model_card(model, report), "utf-8")
    print(json.dumps(auroc, indent=1), f"mean {report['auroc_mean']}")


def train_selector(training: list[Sample], args: argparse.Namespace) -> SelectMoeForCausalLM:
    """Warms the gates up and saves model and tokenizer."""
    model = add_gates(args.base, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    settings = GateWarmup(
        num_steps=args.num_steps,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        max_tokens_per_batch=4_096,
        # Selection compares a row with all others, not only with its own copy.
        label_weight=1.0,
        seed=args.seed,
    )
    scratch = args.save_path.with_name("warmup")
    warm_up_gates(model.model, tokenizer, training, settings=settings, output=scratch)
    shutil.rmtree(scratch)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(args.save_path)
    tokenizer.save_pretrained(args.save_path)
    return model


def evaluate_selector(rows: list[Sample], args: argparse.Namespace) -> dict[str, float]:
    """AUROC per kind of corruption, on rows of the test set."""
    test_rows = [row for row in rows if is_test_row(row.sample_id)]
    order = np.random.default_rng(args.seed).permutation(len(test_rows))
    evaluated = [test_rows[i] for i in order[:NUM_EVALUATED]]
    engine = ScoringEngine.from_pretrained(args.save_path)
    return auroc_by_kind(partial(score_samples, engine), evaluated, copies_by_kind(evaluated))


def training_report(auroc: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    curve, contrast_curve = (
        json.loads((args.base / name).read_text("utf-8"))
        for name in ("loss_curve.json", "contrast_curve.json")
    )
    return {
        "num_warmup_steps": args.num_steps,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "num_rows_evaluated": NUM_EVALUATED,
        "auroc_held_out": auroc,
        "auroc_mean": round(float(np.mean(list(auroc.values()))), 3),
        "base_loss_curve": curve,
        "contrast_curve": contrast_curve,
    }


def model_card(model: SelectMoeForCausalLM, report: dict[str, Any]) -> str:
    """The model card: the template with the measurements of this run."""
    curve, contrast_curve = report["base_loss_curve"], report["contrast_curve"]
    return CARD.read_text("utf-8").format(
        num_parameters=f"{model.num_parameters():,}",
        config=model.config,
        num_steps=report["num_warmup_steps"],
        num_rows=report["num_rows_evaluated"],
        num_tokens=f"{curve[-1]['tokens'] / 1e6:.1f} M",
        held_out_loss=f"{curve[-1]['held_out_loss']:.2f}",
        num_contrast_tokens=f"{contrast_curve[-1]['tokens'] / 1e6:.1f} M",
        auroc_mean=f"{report['auroc_mean']:.3f}",
        auroc="\n".join(f"| {k} | {v:.3f} |" for k, v in report["auroc_held_out"].items()),
        curve=table_rows(curve, ("train_loss", "held_out_loss")),
        contrast_curve=table_rows(
            contrast_curve, ("held_out_contrast", "held_out_loss", "held_out_pairs_right")
        ),
    )


def table_rows(curve: list[dict[str, float]], keys: tuple[str, ...]) -> str:
    """About ten points of a curve, including the last, as rows of a Markdown table."""
    every = max(len(curve) // 10, 1)
    points = [*curve[:-1:every], curve[-1]]
    return "\n".join(
        f"| {point['tokens'] / 1e6:.1f} | " + " | ".join(f"{point[key]:.2f}" for key in keys) + " |"
        for point in points
    )


if __name__ == "__main__":
    main()
