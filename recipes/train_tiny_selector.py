"""Build the embedded selector: add gates to the tiny base, fit them, save it in bfloat16.

    python recipes/train_tiny_selector.py --base DIR --instructions DIR

--base: a checkpoint saved by recipes/contrast_tiny_base.py, or an earlier selector, whose gates are
replaced. `make selector` runs all recipes in order. The gates only read: they are forced open, so
that the model computes what its base does, and are the solution of a logistic regression on the
inputs that they get for rows and corrupted copies (selectmoe/warmup/gate_fit.py). The tenth of the
rows that is held out from the base is held out from the gates, too. The model card reports the
AUROC per kind of corruption on one half of it, the test set; the other half is the validation set.
"""

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, OlmoeConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recipes.held_out_auroc import auroc_by_kind, copies_by_kind, score_samples  # noqa: E402
from recipes.held_out_rows import is_held_out, is_test_row, read_samples  # noqa: E402
from recipes.train_tiny_base import training_parser  # noqa: E402
from selectmoe.corruptions.kinds import CORRUPTIONS  # noqa: E402
from selectmoe.data.chat import ChatTokenizer  # noqa: E402
from selectmoe.data.writers import write_json  # noqa: E402
from selectmoe.errors import SelectMoeError  # noqa: E402
from selectmoe.model.checkpoint import read_model_config  # noqa: E402
from selectmoe.model.configuration_select_moe import SelectMoeConfig  # noqa: E402
from selectmoe.model.conversion import ADDED_PARTS, gated_config, read_config  # noqa: E402
from selectmoe.model.devices import choose_experts  # noqa: E402
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM  # noqa: E402
from selectmoe.model.quiet_loading import load_model  # noqa: E402
from selectmoe.records import Sample  # noqa: E402
from selectmoe.scoring.calibration import Calibration, save_calibration  # noqa: E402
from selectmoe.scoring.engine import ScoringEngine  # noqa: E402
from selectmoe.warmup.calibration import calibrate_on, sampled_positions  # noqa: E402
from selectmoe.warmup.gate_features import gate_features  # noqa: E402
from selectmoe.warmup.gate_fit import fit_gates, set_gates  # noqa: E402
from selectmoe.warmup.step_batches import make_copy  # noqa: E402

TARGET = ROOT / "selectmoe" / "assets" / "tiny_selector"
CARD = ROOT / "recipes" / "tiny_selector_card.md"
NUM_EVALUATED = 600
MAX_SEQUENCE_LENGTH = 1_024
# Replies without content three times: two fifths of the copies. A gate sees little of a row whose
# answer has two tokens.
REPLIES = ("punctuation", "placeholder", "preamble", "link", "one_word", "one_number")
KINDS = (*CORRUPTIONS, *REPLIES, *REPLIES)


def add_gates(base: Path, seed: int) -> SelectMoeForCausalLM:
    """The base with newly initialized gates, or a selector with its own, in float32."""
    torch.manual_seed(seed)
    is_selector = read_model_config(str(base))["model_type"] == SelectMoeConfig.model_type
    config = (
        read_config(SelectMoeConfig, base)
        if is_selector
        else gated_config(OlmoeConfig.from_pretrained(base), {})
    )
    return load_model(
        SelectMoeForCausalLM,
        base,
        new_parts=ADDED_PARTS,
        config=config,
        dtype=torch.float32,
        experts_implementation=choose_experts(None, on_gpu=torch.cuda.is_available()),
    )


def parse_arguments() -> argparse.Namespace:
    parser = training_parser(__doc__, save_path=TARGET, seed=1)
    parser.add_argument("--base", type=Path, required=True, help="checkpoint of the base")
    parser.add_argument("--num-rows", type=int, default=5_000, help="rows to fit the gates to")
    parser.add_argument("--num-copies", type=int, default=6, help="corrupted copies of each row")
    parser.add_argument("--penalty", type=float, default=1e-4, help="of the squared weights")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    rows = read_samples([str(args.instructions)])
    training = [row for row in rows if not is_held_out(row.sample_id)]
    model = train_selector(training, args)
    save_calibration(args.save_path, calibrate_selector(args.save_path, training, seed=args.seed))
    auroc = evaluate_selector(rows, args)
    report = training_report(auroc, args)
    write_json(args.save_path / "training_report.json", report)
    (args.save_path / "README.md").write_text(model_card(model, report), "utf-8")
    print(json.dumps(auroc, indent=1), f"mean {report['auroc_mean']}")


def train_selector(training: list[Sample], args: argparse.Namespace) -> SelectMoeForCausalLM:
    """Fits the gates and saves model and tokenizer."""
    model = add_gates(args.base, args.seed)
    model.force_gates_open()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    chat = ChatTokenizer(tokenizer, max_sequence_length=MAX_SEQUENCE_LENGTH)
    rows, copies = rows_and_copies(training, args)
    logging.info("%d rows and %d corrupted copies", len(rows), len(copies))
    real, corrupted = (gate_features(model.model, chat.tokenize(part)) for part in (rows, copies))
    gates = fit_gates(real, corrupted, np.ones(len(copies)), penalty=args.penalty)
    set_gates(model.model, gates)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(args.save_path)
    tokenizer.save_pretrained(args.save_path)
    return model


def rows_and_copies(
    training: list[Sample], args: argparse.Namespace
) -> tuple[list[Sample], list[Sample]]:
    """A sample of the rows, and copies of them by random kinds."""
    random = Random(args.seed)
    rows = random.sample(training, min(args.num_rows, len(training)))
    copies = [
        make_copy(row, training, kinds=KINDS, random=random)
        for row in rows
        for _ in range(args.num_copies)
    ]
    return rows, [copy for copy in copies if copy is not None]


def calibrate_selector(folder: Path, training: list[Sample], *, seed: int) -> Calibration:
    """The calibration of the saved selector on rows that it was trained on."""
    engine = ScoringEngine.from_pretrained(folder, calibration=None)
    positions = sampled_positions(len(training), seed=seed)
    return calibrate_on(engine, [training[position] for position in positions])


def evaluate_selector(rows: list[Sample], args: argparse.Namespace) -> dict[str, float]:
    """AUROC per kind of corruption, on rows of the test set."""
    test_rows = [row for row in rows if is_test_row(row.sample_id)]
    order = np.random.default_rng(args.seed).permutation(len(test_rows))
    evaluated = [test_rows[i] for i in order[:NUM_EVALUATED]]
    engine = ScoringEngine.from_pretrained(args.save_path)
    return auroc_by_kind(partial(score_samples, engine), evaluated, copies_by_kind(evaluated))


def training_report(auroc: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    curve, contrast_curve = training_curves(args.base)
    return {
        "num_rows": args.num_rows,
        "num_copies_per_row": args.num_copies,
        "penalty": args.penalty,
        "seed": args.seed,
        "num_rows_evaluated": NUM_EVALUATED,
        "auroc_held_out": auroc,
        "auroc_mean": round(float(np.mean(list(auroc.values()))), 3),
        "base_loss_curve": curve,
        "contrast_curve": contrast_curve,
    }


def training_curves(base: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The loss curves of the base's two trainings; an earlier selector keeps them in its report."""
    report = base / "training_report.json"
    if report.is_file():
        content = json.loads(report.read_text("utf-8"))
        return content["base_loss_curve"], content["contrast_curve"]
    curve, contrast_curve = (
        json.loads((base / name).read_text("utf-8"))
        for name in ("loss_curve.json", "contrast_curve.json")
    )
    return curve, contrast_curve


def model_card(model: SelectMoeForCausalLM, report: dict[str, Any]) -> str:
    """The model card: the template with the measurements of this run."""
    curve, contrast_curve = report["base_loss_curve"], report["contrast_curve"]
    return CARD.read_text("utf-8").format(
        num_parameters=f"{model.num_parameters():,}",
        config=model.config,
        num_fitted=f"{report['num_rows']:,}",
        num_copies=report["num_copies_per_row"],
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
    try:
        main()
    except SelectMoeError as error:
        sys.exit(f"error: {error}")
