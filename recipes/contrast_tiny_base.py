"""Give the tiny base features that a gate can read: it learns to tell a sample from a worse copy.

    python recipes/contrast_tiny_base.py --base DIR --instructions DIR --save-path DIR \
        --num-tokens 32

A linear gate reads only what stands in the hidden states. A base of billions of parameters has
features of quality from pre-training alone; three million parameters have other worries, so here
the whole base learns with the contrastive loss of the warm-up, through gates that are thrown away
afterwards, beside its language-model loss. What is saved is a plain OLMoE.

A pair says of hundreds of tokens only that some are worse than others. So a second head that is
thrown away too learns which: a token is damaged where it and the two before it do not follow each
other in the real row, or not so often. It reads what the gates read.

The schedule follows the tokens, so the same command on the same machine gives the same base; on one
core a million tokens took three minutes.
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
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerBase
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recipes.train_tiny_base import is_held_out, schedule  # noqa: E402
from recipes.train_tiny_selector import gated  # noqa: E402
from selectmoe.corruptions.kinds import CORRUPTIONS  # noqa: E402
from selectmoe.data.chat import ChatTokenizer  # noqa: E402
from selectmoe.data.readers import read_corpus  # noqa: E402
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM  # noqa: E402
from selectmoe.model.quality_losses import contrastive  # noqa: E402
from selectmoe.records import Sample  # noqa: E402
from selectmoe.scoring.formulas import good_margins, scored_tokens  # noqa: E402
from selectmoe.warmup.contrastive_pairs import ContrastivePairs  # noqa: E402

# Shape letters: L = layers, B = rows of a batch (real ones first, then their copies), T = tokens.
TOKENS_PER_STEP, MAX_SEQUENCE_LENGTH = 4_096, 512
NUM_HELD_OUT_BATCHES = 20
# Found within the first million tokens; each other kind is shown three times as often.
EASY_KINDS = {
    "gibberish",
    "wrong_script",
    "refusal",
    "echoed_question",
    "mojibake",
    "run_on",
    "markup_noise",
}
# Hardly worse than the real row: little to learn from.
SUBTLE_KINDS = {"other_turn", "swapped_names"}


def pairs_of(
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
    """A logit a token and layer, from what the gates of the layers read: is it damaged?"""

    def __init__(self, model: SelectMoeForCausalLM) -> None:
        super().__init__()
        config = model.config
        self.weight_LH = torch.nn.Parameter(
            torch.zeros(config.num_hidden_layers, config.hidden_size)
        )
        self.bias_L = torch.nn.Parameter(torch.zeros(config.num_hidden_layers))
        self._read: dict[int, Tensor] = {}
        for index, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(partial(self._keep, index))

    def _keep(self, index: int, _: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        self._read[index] = inputs[0]

    def forward(self) -> Tensor:
        """[L, B, T], of the batch that the model read last."""
        read_LBTH = torch.stack([self._read[index] for index in range(len(self._read))])
        logits_LBT = torch.einsum("lbth,lh->lbt", read_LBTH, self.weight_LH)
        return logits_LBT + self.bias_L[:, None, None]


def damaged_tokens(input_ids_BT: Tensor) -> Tensor:
    """True in a copy where a token and the two before it follow each other more often than in the
    real row: [B, T]."""
    rows = input_ids_BT.tolist()
    half = len(rows) // 2
    damaged_BT = np.zeros(input_ids_BT.shape, bool)
    for index in range(half):
        real, copy = rows[index], rows[half + index]
        left = Counter(zip(real, real[1:], real[2:], strict=False))
        for position, triple in enumerate(zip(copy, copy[1:], copy[2:], strict=False), start=2):
            left[triple] -= 1
            damaged_BT[half + index, position] = left[triple] < 0
    return torch.from_numpy(damaged_BT)


def damage_loss(heads: DamageHeads, batch: dict[str, Tensor]) -> Tensor:
    """Mean over layers and the tokens of answers, real ones and copies."""
    logits_LBT = heads()
    answer_BT = scored_tokens(batch["answer_mask"], batch["attention_mask"], "answer")
    damaged_BT = damaged_tokens(batch["input_ids"])
    chosen_LN = logits_LBT[:, answer_BT]
    labels_LN = damaged_BT[answer_BT].float().expand_as(chosen_LN)
    return binary_cross_entropy_with_logits(chosen_LN, labels_LN)


def losses(
    model: SelectMoeForCausalLM, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Contrastive, language-model (of the real rows alone) and load-balancing loss, and the share
    of the copies that score below their real row."""
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
    labels_B = torch.arange(len(margins_B)) < half
    contrast = contrastive(margins_B, labels_B) + contrastive(
        margins_B, labels_B, pair_ids=torch.arange(half).repeat(2), form="ranking"
    )
    logits = model.lm_head(decoded.last_hidden_state[:half, :-1])
    targets = batch["input_ids"][:half, 1:].masked_fill(~batch["attention_mask"][:half, 1:], -100)
    lm_loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
    balance: Any = load_balancing_loss_func(
        decoded.router_logits,
        model.config.num_experts,
        model.config.num_experts_per_tok,
        batch["attention_mask"],
    )
    above = float((margins_B[:half] > margins_B[half:]).float().mean())
    return contrast, lm_loss, balance, above


@torch.no_grad()
def held_out_means(model: SelectMoeForCausalLM, pairs: ContrastivePairs) -> dict[str, float]:
    model.eval()
    rows = [losses(model, batch) for batch in islice(iter(pairs), NUM_HELD_OUT_BATCHES)]
    model.train()
    contrast, lm_loss, _, above = zip(*rows, strict=True)
    return {
        "held_out_contrast": round(float(np.mean([float(x) for x in contrast])), 4),
        "held_out_loss": round(float(np.mean([float(x) for x in lm_loss])), 4),
        "held_out_pairs_right": round(float(np.mean(above)), 4),
    }


def train(
    model: SelectMoeForCausalLM,
    pairs: ContrastivePairs,
    held_out: ContrastivePairs,
    args: argparse.Namespace,
) -> list[dict[str, float]]:
    heads = DamageHeads(model)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05)
    started, curve, next_report, num_tokens = time.monotonic(), [], 0.02, 0
    budget = 1e6 * args.num_tokens
    model.train()
    model.model.detach_gates()  # gates learn from the contrast alone; the base from both
    for step, batch in enumerate(pairs):
        share = num_tokens / budget
        if share >= 1:
            break
        # Open in every other step: the base must be a language model without gates, too.
        model.force_gates_open(step % 2 == 0)
        contrast, lm_loss, balance, _ = losses(model, batch)
        damage = damage_loss(heads, batch)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(share)
        total = contrast + args.lm_weight * lm_loss + args.damage_weight * damage + 0.01 * balance
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_tokens += batch["input_ids"].numel()
        if share >= next_report:
            next_report = share + 0.04
            model.force_gates_open(False)
            entry = {
                "tokens": args.tokens_before + num_tokens,
                "minutes": round((time.monotonic() - started) / 60, 1),
                "contrast": round(contrast.item(), 4),
                "train_loss": round(lm_loss.item(), 4),
                "damage": round(damage.item(), 4),
                **held_out_means(model, held_out),
            }
            curve.append(entry)
            print(json.dumps(entry), flush=True)
            save_base(model, args.save_path)
    return curve


def save_base(model: SelectMoeForCausalLM, folder: Path) -> None:
    """The OLMoE alone: everything but the gates."""
    settings = {k: v for k, v in model.config.to_dict().items() if not k.startswith("quality_")}
    for key in ("model_type", "architectures", "dtype"):
        settings.pop(key, None)
    config = OlmoeConfig(
        **{key: value for key, value in settings.items() if not key.startswith("trash_")}
    )
    base = OlmoeForCausalLM(config)
    state = {name: t for name, t in model.state_dict().items() if "quality_gate" not in name}
    base.load_state_dict(state)
    base.save_pretrained(folder)


def earlier_curve(base: Path) -> list[dict[str, float]]:
    """Of a base that this recipe made: several runs of it may follow each other."""
    file = base / "contrast_curve.json"
    found: list[dict[str, float]] = json.loads(file.read_text()) if file.exists() else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument("--save-path", type=Path, required=True)
    parser.add_argument("--num-tokens", type=float, default=32.0, help="in millions")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak")
    parser.add_argument("--lm-weight", type=float, default=0.5)
    parser.add_argument("--damage-weight", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    before = earlier_curve(args.base)
    args.tokens_before = int(before[-1]["tokens"]) if before else 0
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    rows = [row for row in read_corpus(str(args.instructions)) if isinstance(row, Sample)]
    held_out = [row for row in rows if is_held_out(row.sample_id)]
    random.Random(args.seed).shuffle(held_out)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    tokenizer.save_pretrained(args.save_path)
    model = gated(args.base, args.seed)
    training = [row for row in rows if not is_held_out(row.sample_id)]
    curve = train(
        model,
        pairs_of(training, tokenizer, seed=args.seed),
        pairs_of(held_out[:1_000], tokenizer, seed=args.seed + 1),
        args,
    )
    save_base(model, args.save_path)
    shutil.copy(args.base / "loss_curve.json", args.save_path)
    curves = [*earlier_curve(args.base), *curve]
    (args.save_path / "contrast_curve.json").write_text(json.dumps(curves, indent=1))


if __name__ == "__main__":
    main()
