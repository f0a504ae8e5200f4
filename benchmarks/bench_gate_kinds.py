"""Which kinds of corrupted copies, layers and penalty teach gates on a base what people rate.

    python benchmarks/bench_gate_kinds.py --data DIR --model BASE [--device cuda]
    python benchmarks/bench_gate_kinds.py --quick

--data: a folder with instructions/ (.jsonl files of the datasets cot, dolly, flan_v2 and oasst1),
quality/ and preferences/ (answers rated by people or a model). --model: the folder of a causal
language model, or its name on the hub. --quick takes the demo corpus and a small random model.

Gates are fitted to features that are computed once. Layers, penalty and mix are chosen by half A
(validation rows, even halves, the files' split "train"); half B, by which nothing is chosen,
reports the mixes that were trained on all training rows. The seeds of a mix are the thirds of these
rows.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gate_kinds_features import autocast_error, likelihoods, read_features
from benchmarks.gate_kinds_fits import (
    ALL,
    LENGTH_KINDS,
    NUM_SEEDS,
    GateFitter,
    Mix,
    mixes,
    of_groups,
)
from benchmarks.gate_kinds_metrics import Metrics, measure, measure_in_full, rating_mean, total
from benchmarks.gate_kinds_rows import Extent, draw_rows
from benchmarks.gate_kinds_sets import KindRows, make_sets
from benchmarks.quality_warmups import LEFT_OUT
from benchmarks.results import one_line_errors, report
from selectmoe.data.chat import ChatTokenizer
from selectmoe.model.checkpoint import model_folder
from selectmoe.model.quiet_loading import load_model
from selectmoe.model.tokenizer_loading import load_tokenizer
from selectmoe.paths import EMBEDDED_SELECTOR

MAX_SEQUENCE_LENGTH = 1_024
PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
PENALTY_OF_LAYERS = 1e-3  # while layers are compared, before a penalty is chosen
SMALLEST_GAIN = 0.001  # of `total` by which a group must be worse than nothing to be left out
# First and last layer of windows, of the 30 layers of SmolLM2-135M; scaled to other depths.
DEPTH = 30
WINDOWS = (
    (0, 29), (0, 9), (10, 19), (20, 29), (12, 23), (12, 20), (12, 17), (14, 17), (15, 29), (9, 17),
    (6, 17), (0, 17), (10, 20), (16, 23), (8, 14),
)  # fmt: skip
PENALTY_WINDOWS = ((0, 29), (12, 23), (12, 17), (14, 20))
CHOSEN_WINDOW = (12, 17)
FINAL_WINDOWS = {"all": PENALTY_WINDOWS[:2], "replies x3": PENALTY_WINDOWS[:2]}
GREEDY = "greedy"
QUICK = Extent(
    num_training_per_family=24,
    num_validation_per_family=8,
    num_test_per_family=8,
    num_short=4,
    num_calibration_per_family=40,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """What is tried."""

    mixes: Mapping[str, Mix]
    iterations: int = 150
    """Of L-BFGS."""
    final_iterations: int = 250


QUICK_PLAN = Plan(
    mixes={name: mixes()[name] for name in ("all", "only gibberish", "only group order")},
    iterations=10,
    final_iterations=10,
)


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What is compared with what, on one base."""

    fitter: GateFitter
    rows: KindRows
    num_layers: int
    plan: Plan

    def layers(self, window: tuple[int, int]) -> range:
        first, last = (round(edge * self.num_layers / DEPTH) for edge in (window[0], window[1] + 1))
        return range(first, max(last, first + 1))

    def of_mix(self, mix: Mix, layers: range, penalty: float, *, seed: int) -> Metrics:
        """On half A, of gates fitted to a third of the training rows."""
        scores_N = self.fitter.scores(
            mix, layers, penalty=penalty, seed=seed, iterations=self.plan.iterations
        )
        return measure(scores_N, self.rows.halves["A"], self.rows.num_answer_N)

    def in_full(self, scores_N: np.ndarray) -> dict[str, Any]:
        return {
            name: measure_in_full(scores_N, half, self.rows.num_answer_N)
            for name, half in self.rows.halves.items()
        }

    def by_layers(self) -> dict[str, Metrics]:
        """Single layers and windows, one third of the rows, all kinds."""
        windows = [*(range(n, n + 1) for n in range(self.num_layers)), *map(self.layers, WINDOWS)]
        return {
            layer_range(layers): self.of_mix(Mix(ALL), layers, PENALTY_OF_LAYERS, seed=0)
            for layers in windows
        }

    def by_penalty(self) -> dict[str, dict[str, Metrics]]:
        """By window, then by penalty; one third of the rows, all kinds."""
        return {
            layer_range(layers): {
                f"{penalty:g}": self.of_mix(Mix(ALL), layers, penalty, seed=0)
                for penalty in PENALTIES
            }
            for layers in map(self.layers, PENALTY_WINDOWS)
        }

    def over_seeds(self, mix: Mix, penalty: float) -> dict[str, Metrics]:
        """Mean and standard deviation on half A, and those of the mean of the ratings."""
        layers = self.layers(CHOSEN_WINDOW)
        return mean_and_deviation([
            self.of_mix(mix, layers, penalty, seed=seed)
            for seed in range(NUM_SEEDS)
        ])  # fmt: skip

    def greedy(self, penalty: float) -> list[dict[str, Any]]:
        """Leaves out the group without which the mix is best, as long as that helps."""
        groups = list(LEFT_OUT)
        best = total(self.over_seeds(of_groups(groups), penalty)["mean"])
        steps: list[dict[str, Any]] = [{"groups": [*groups], "total": best}]
        while len(groups) > 2:
            tried = {
                group: total(
                    self.over_seeds(of_groups([g for g in groups if g != group]), penalty)["mean"]
                )
                for group in groups
            }
            worst = max(tried, key=lambda group: tried[group])
            if tried[worst] <= best + SMALLEST_GAIN:
                break
            groups.remove(worst)
            best = tried[worst]
            steps.append({"removed": worst, "groups": [*groups], "total": best, "tried": tried})
        return steps

    def finals(self, chosen: Mix, penalty: float) -> dict[str, dict[str, Any]]:
        """Mixes trained on all training rows, on both halves."""
        found = {}
        for name, mix in final_mixes(chosen).items():
            for window in (CHOSEN_WINDOW, *FINAL_WINDOWS.get(name, ())):
                layers = self.layers(window)
                scores_N = self.fitter.scores(
                    mix, layers, penalty=penalty, iterations=self.plan.final_iterations
                )
                found[f"{name} {layer_range(layers)}"] = self.in_full(scores_N)
        return found


def final_mixes(chosen: Mix) -> dict[str, Mix]:
    names = ("all", f"without {', '.join(LENGTH_KINDS)}", "mixed x5, replies x3", "replies x3")
    known = mixes()
    return {
        **{name: known[name] for name in names},
        GREEDY: chosen,
        "mixed_answers": known["only mixed_answers"],
    }


def mean_and_deviation(by_seed: Sequence[Metrics]) -> dict[str, Metrics]:
    """Also of the mean of the ratings, as "ratings"."""
    columns = [{**metrics, "ratings": rating_mean(metrics)} for metrics in by_seed]
    mean: Metrics = {}
    deviation: Metrics = {}
    for name in columns[0]:
        values = [value for column in columns if (value := column[name]) is not None]
        mean[name] = float(np.mean(values)) if values else None
        deviation[name] = float(np.std(values)) if values else None
    return {"mean": mean, "deviation": deviation}


def best_penalty(by_penalty: Mapping[str, Mapping[str, Metrics]], window: str) -> float:
    of_window = by_penalty[window]
    return float(max(of_window, key=lambda penalty: total(of_window[penalty])))


def layer_range(layers: range) -> str:
    return f"{layers[0]}-{layers[-1]}"


def load_base(model: str | None, device: str) -> tuple[nn.Module, ChatTokenizer]:
    """In float32; None is a small random model with the tokenizer of the embedded selector."""
    folder = EMBEDDED_SELECTOR if model is None else model_folder(model)
    tokenizer = load_tokenizer(folder)
    base: nn.Module
    if model is None:
        torch.manual_seed(0)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=5,
                num_attention_heads=2,
            )
        )
    else:
        model_class: Any = AutoModelForCausalLM
        base = load_model(model_class, folder, dtype=torch.float32)
    return base.to(device).eval(), ChatTokenizer(tokenizer, max_sequence_length=MAX_SEQUENCE_LENGTH)


def baselines(base: nn.Module, tokenizer: ChatTokenizer, rows: KindRows) -> dict[str, np.ndarray]:
    """Scores without gates; NaN where a likelihood is not computed."""
    numbers = rows.with_likelihood
    nll, pmi = likelihoods(base, tokenizer, [rows.samples[number] for number in numbers])
    scores = {name: np.full(len(rows.samples), np.nan) for name in ("-NLL", "PMI")}
    scores["-NLL"][numbers], scores["PMI"][numbers] = -nll, pmi
    return {"length": rows.num_answer_N.astype(float), **scores}


def compare(
    base: nn.Module, tokenizer: ChatTokenizer, rows: KindRows, plan: Plan
) -> dict[str, Any]:
    features_NLH = read_features(base, rows.tokenized)
    uses_autocast = features_NLH.is_cuda
    error = autocast_error(base, rows.tokenized, features_NLH) if uses_autocast else None
    without_gates = baselines(base, tokenizer, rows)
    comparison = Comparison(GateFitter(features_NLH, rows), rows, features_NLH.shape[1], plan)
    logger.info("layers and penalties")
    by_layers, by_penalty = comparison.by_layers(), comparison.by_penalty()
    penalty = best_penalty(by_penalty, layer_range(comparison.layers(CHOSEN_WINDOW)))
    logger.info("mixes, with the penalty %g", penalty)
    kinds = {name: comparison.over_seeds(mix, penalty) for name, mix in plan.mixes.items()}
    steps = comparison.greedy(penalty)
    chosen = of_groups(steps[-1]["groups"])
    return {
        "num_rows": len(rows.samples),
        "num_rows_without_answer": rows.num_dropped,
        "num_layers": comparison.num_layers,
        "autocast_error_by_layer": error,
        "baselines": {name: comparison.in_full(of) for name, of in without_gates.items()},
        "layers": by_layers,
        "penalties": by_penalty,
        "penalty": penalty,
        "kinds": kinds,
        "greedy": steps,
        "chosen_kinds": list(chosen.kinds),
        "finals": comparison.finals(chosen, penalty),
    }


def rounded(value: Any) -> Any:  # noqa: ANN401 (nested results)
    """Floats with four digits."""
    if isinstance(value, Mapping):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="folder with instructions/, quality/, preferences/"
    )
    parser.add_argument("--model", help="causal language model: a folder or a name on the hub")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="demo corpus, small random model")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not args.quick and not (args.data and args.model):
        parser.error("--data and --model are needed, or --quick")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    with one_line_errors():
        base, tokenizer = load_base(None if args.quick else args.model, args.device)
        drawn = draw_rows(None, QUICK) if args.quick else draw_rows(args.data, Extent())
        plan = QUICK_PLAN if args.quick else Plan(mixes=mixes())
        measured = compare(base, tokenizer, make_sets(drawn, tokenizer), plan)
    report("gate_kinds", rounded(measured), quick=args.quick)


if __name__ == "__main__":
    main()
