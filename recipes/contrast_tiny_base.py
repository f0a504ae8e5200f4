"""Contrastive training of the tiny base, which gives it features that a quality gate can read.

    python recipes/contrast_tiny_base.py --base DIR --instructions DIR --save-path DIR \
        --num-tokens 32

A gate is linear: it finds only features that the hidden states already have. A base of billions of
parameters may have features of quality from pre-training; next-token prediction alone gives a base
of three million parameters none. Here the whole base trains on the gate warm-up's contrastive loss,
through gates that are discarded afterwards, plus its language-modeling loss. The result is saved
as an ordinary OLMoE checkpoint.

The contrastive label is one bit for hundreds of tokens. A second head, also discarded, predicts
which tokens of a corrupted copy are damaged: those where the token and the two before it occur
in this order more often than in the original. It has the same inputs as the gates.

The learning-rate schedule is a function of the number of tokens, so the same command on the same
machine gives the same weights. A million tokens took three minutes on one core.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerBase
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recipes.contrastive_pairs import ContrastivePairs  # noqa: E402
from recipes.held_out_rows import is_held_out, read_samples  # noqa: E402
from recipes.train_tiny_base import (  # noqa: E402
    new_optimizer,
    optimizer_step,
    schedule,
    training_parser,
)
from recipes.train_tiny_selector import add_gates  # noqa: E402
from selectmoe.corruptions.kinds import CORRUPTIONS  # noqa: E402
from selectmoe.data.chat import ChatTokenizer  # noqa: E402
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM  # noqa: E402
from selectmoe.model.quality_losses import contrastive  # noqa: E402
from selectmoe.records import Sample  # noqa: E402
from selectmoe.scoring.formulas import good_margins, scored_tokens  # noqa: E402

# Shape letters: L = layers, B = rows of a batch (originals first, then their corrupted copies),
# T = tokens, H = hidden size, N = answer tokens of the batch.
TOKENS_PER_STEP, MAX_SEQUENCE_LENGTH = 4_096, 512
NUM_HELD_OUT_BATCHES = 20
# Learned within the first million tokens; every other kind is sampled three times as often.
EASY_KINDS = {
    "gibberish",
    "wrong_script",
    "refusal",
    "echoed_question",
    "mojibake",
    "run_on",
    "markup_noise",
}
# Hardly worse than the original: a weak training signal, so sampled as rarely as the easy kinds.
SUBTLE_KINDS = {"other_turn", "swapped_names"}


def make_pairs(
    samples: list[Sample], tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> ContrastivePairs:
    return ContrastivePairs(
        samples,
        ChatTokenizer(tokenizer, max_sequence_length=MAX_SEQUENCE_LENGTH),
        kinds=[
            kind
            for kind in CORRUPTIONS
            for _ in range(1 if kind in EASY_KINDS | SUBTLE_KINDS else 3)
        ],
        max_tokens_per_batch=TOKENS_PER_STEP,
        seed=seed,
    )


class DamageHeads(torch.nn.Module):
    """One linear head per layer on the inputs of its gate: a logit per token, damaged or not."""

    def __init__(self, model: SelectMoeForCausalLM) -> None:
        super().__init__()
        config = model.config
        self.weight_LH = torch.nn.Parameter(
            torch.zeros(config.num_hidden_layers, config.hidden_size)
        )
        self.bias_L = torch.nn.Parameter(torch.zeros(config.num_hidden_layers))
        self._inputs: dict[int, Tensor] = {}
        for index, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(partial(self._record, index))

    def _record(self, index: int, _: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        self._inputs[index] = inputs[0]

    def forward(self) -> Tensor:
        """Logits [L, B, T] of the batch in the model's last forward pass."""
        inputs_LBTH = torch.stack([self._inputs[index] for index in range(len(self._inputs))])
        logits_LBT = torch.einsum("lbth,lh->lbt", inputs_LBTH, self.weight_LH)
        return logits_LBT + self.bias_L[:, None, None]


def damaged_tokens(input_ids_BT: Tensor) -> Tensor:
    """True where a trigram that ends here occurs more often in the copy than in
    the original: [B, T], False for the originals."""
    rows = input_ids_BT.tolist()
    half = len(rows) // 2
    damaged_BT = np.zeros(input_ids_BT.shape, bool)
    for index in range(half):
        original, copy = rows[index], rows[half + index]
        remaining = Counter(zip(original, original[1:], original[2:], strict=False))
        for position, trigram in enumerate(zip(copy, copy[1:], copy[2:], strict=False), start=2):
            remaining[trigram] -= 1
            damaged_BT[half + index, position] = remaining[trigram] < 0
    return torch.from_numpy(damaged_BT)


def damage_loss(heads: DamageHeads, batch: dict[str, Tensor]) -> Tensor:
    """Mean over layers and answer tokens, of originals and copies."""
    answer_BT = scored_tokens(batch["answer_mask"], batch["attention_mask"], "answer")
    damaged_BT = damaged_tokens(batch["input_ids"])
    logits_LN = heads()[:, answer_BT]
    labels_LN = damaged_BT[answer_BT].float().expand_as(logits_LN)
    return binary_cross_entropy_with_logits(logits_LN, labels_LN)


class Losses(NamedTuple):
    """The losses of one batch."""

    contrastive: Tensor
    language_model: Tensor  # of the originals alone
    load_balancing: Tensor
    pair_accuracy: float  # fraction of originals that score above their copy


def compute_losses(model: SelectMoeForCausalLM, batch: dict[str, Tensor]) -> Losses:
    decoded = model.model(
        input_ids=batch["input_ids"],
        use_cache=False,
        output_quality_logits=True,
        output_router_logits=True,
    )
    margins_LBT = good_margins(torch.stack(decoded["quality_logits"]))
    mask_BT = scored_tokens(batch["answer_mask"], batch["attention_mask"], "answer").float()
    margins_B = (margins_LBT.mean(0) * mask_BT).sum(1) / mask_BT.sum(1)
    half = len(margins_B) // 2
    balance: Any = load_balancing_loss_func(
        decoded.router_logits,
        model.config.num_experts,
        model.config.num_experts_per_tok,
        batch["attention_mask"],
    )
    return Losses(
        contrastive=contrastive_loss(margins_B),
        language_model=language_model_loss(model, decoded.last_hidden_state[:half], batch),
        load_balancing=balance,
        pair_accuracy=float((margins_B[:half] > margins_B[half:]).float().mean()),
    )


def contrastive_loss(margins_B: Tensor) -> Tensor:
    """The label form plus the ranking form."""
    half = len(margins_B) // 2
    labels_B = torch.arange(len(margins_B)) < half
    pair_ids_B = torch.arange(half).repeat(2)
    ranking = contrastive(margins_B, labels_B, pair_ids=pair_ids_B, form="ranking")
    return contrastive(margins_B, labels_B) + ranking


def language_model_loss(
    model: SelectMoeForCausalLM, hidden_BTH: Tensor, batch: dict[str, Tensor]
) -> Tensor:
    """Next-token cross-entropy over the rows of `hidden_BTH`, the first ones of the batch."""
    half = len(hidden_BTH)
    logits = model.lm_head(hidden_BTH[:, :-1])
    targets = batch["input_ids"][:half, 1:].masked_fill(~batch["attention_mask"][:half, 1:], -100)
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: SelectMoeForCausalLM, pairs: ContrastivePairs) -> dict[str, float]:
    model.eval()
    batches = [compute_losses(model, batch) for batch in islice(iter(pairs), NUM_HELD_OUT_BATCHES)]
    model.train()
    means = [np.mean([float(value) for value in values]) for values in zip(*batches, strict=True)]
    contrast, lm_loss, _, accuracy = (round(float(mean), 4) for mean in means)
    return {
        "held_out_contrast": contrast,
        "held_out_loss": lm_loss,
        "held_out_pairs_right": accuracy,
    }


def train(
    model: SelectMoeForCausalLM,
    pairs: ContrastivePairs,
    held_out: ContrastivePairs,
    args: argparse.Namespace,
) -> list[dict[str, float]]:
    heads = DamageHeads(model)
    optimizer = new_optimizer([*model.parameters(), *heads.parameters()])
    started, curve, next_report, num_tokens = time.monotonic(), [], 0.02, 0
    model.train()
    model.model.detach_gates()  # the contrastive loss alone trains the gates; both train the base
    for step, batch in enumerate(pairs):
        progress = num_tokens / (1e6 * args.num_tokens)
        if progress >= 1:
            break
        # Open in every other step: the base must be a language model without gates, too.
        model.force_gates_open(step % 2 == 0)
        losses = compute_losses(model, batch)
        damage = damage_loss(heads, batch)
        total = losses.contrastive + args.lm_weight * losses.language_model
        total = total + args.damage_weight * damage + 0.01 * losses.load_balancing
        optimizer_step(optimizer, total, args.learning_rate * schedule(progress))
        num_tokens += batch["input_ids"].numel()
        if progress >= next_report:
            next_report = progress + 0.04
            model.force_gates_open(False)
            entry = {
                "tokens": args.tokens_before + num_tokens,
                "minutes": round((time.monotonic() - started) / 60, 1),
                "contrast": round(losses.contrastive.item(), 4),
                "train_loss": round(losses.language_model.item(), 4),
                "damage": round(damage.item(), 4),
                **evaluate(model, held_out),
            }
            curve.append(entry)
            print(json.dumps(entry), flush=True)
            save_base(model, args.save_path)
    return curve


def save_base(model: SelectMoeForCausalLM, folder: Path) -> None:
    """Saves the OLMoE alone: everything but the gates."""
    added = ("quality_", "trash_")
    settings = {k: v for k, v in model.config.to_dict().items() if not k.startswith(added)}
    for key in ("model_type", "architectures", "dtype"):
        settings.pop(key, None)
    base = OlmoeForCausalLM(OlmoeConfig(**settings))
    state = {name: t for name, t in model.state_dict().items() if "quality_gate" not in name}
    base.load_state_dict(state)
    base.save_pretrained(folder)


def read_curve(base: Path) -> list[dict[str, float]]:
    """The curve of a base that this recipe made before: it can be run several times in a row."""
    file = base / "contrast_curve.json"
    curve: list[dict[str, float]] = json.loads(file.read_text()) if file.exists() else []
    return curve


def parse_arguments() -> argparse.Namespace:
    parser = training_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="checkpoint of the base")
    parser.add_argument("--num-tokens", type=float, default=32.0, help="millions of tokens")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--lm-weight", type=float, default=0.5)
    parser.add_argument("--damage-weight", type=float, default=1.0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    before = read_curve(args.base)
    args.tokens_before = int(before[-1]["tokens"]) if before else 0
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    rows = read_samples([str(args.instructions)])
    held_out = [row for row in rows if is_held_out(row.sample_id)]
    random.Random(args.seed).shuffle(held_out)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    tokenizer.save_pretrained(args.save_path)
    model = add_gates(args.base, args.seed)
    training = [row for row in rows if not is_held_out(row.sample_id)]
    curve = train(
        model,
        make_pairs(training, tokenizer, seed=args.seed),
        make_pairs(held_out[:1_000], tokenizer, seed=args.seed + 1),
        args,
    )
    save_base(model, args.save_path)
    shutil.copy(args.base / "loss_curve.json", args.save_path)
    (args.save_path / "contrast_curve.json").write_text(json.dumps([*before, *curve], indent=1))


if __name__ == "__main__":
    main()
