"""Train the base model of the embedded selector, a tiny OLMoE: its tokenizer, then its weights.

    python recipes/train_tiny_base.py --text DIR --instructions DIR --save-path DIR --num-tokens 16

--text: a folder of .txt or .txt.gz files. --instructions: a folder of .jsonl files with
conversations. One row in ten (by a hash of its id) is held out; the model card shows the loss on
these rows. The learning-rate schedule is a function of the number of tokens, in millions.
"""

import argparse
import gzip
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recipes.held_out_rows import is_held_out  # noqa: E402

VOCAB_SIZE = 4_096
CONTEXT_TOKENS = 1_024
END, PAD, ROLES = "<|endoftext|>", "<|pad|>", ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENS_PER_STEP = 4_096
# Most steps train on short windows (cheap attention); one in five on the whole context, so that
# every rotary position is trained.
SHORT_WINDOW, LONG_EVERY = 512, 5
PEAK_LEARNING_RATE, WARMUP_RATIO, FINAL_RATIO = 3e-3, 0.02, 0.05
INSTRUCTION_SHARE = 0.6


def read_documents(directory: Path) -> list[str]:
    """Groups of paragraphs, about 4,000 characters each, of every text file."""
    documents: list[str] = []
    for path in sorted(directory.iterdir()):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            group: list[str] = []
            for paragraph in file.read().split("\n\n"):
                group.append(paragraph)
                if sum(map(len, group)) > 4_000:
                    documents.append("\n\n".join(group).strip())
                    group = []
        documents.append("\n\n".join(group).strip())
    return documents


def read_conversations(directory: Path) -> Iterator[tuple[str, str]]:
    """Yields (id, conversation rendered by the chat template)."""
    for path in sorted(directory.glob("*.jsonl")):
        for line in path.open(encoding="utf-8"):
            row = json.loads(line)
            turns = [
                f"<|{message['role']}|>{message['content']}"
                + (END if message["role"] == "assistant" else "")
                for message in row["messages"]
            ]
            yield row["id"], "".join(turns)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, PAD, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        model_max_length=CONTEXT_TOKENS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def token_stream(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], *, ends_with_eos: bool
) -> np.ndarray:
    """All texts as one array of token ids, separated by the end-of-text token."""
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), 1_000):
        encoded = tokenizer(texts[start : start + 1_000], add_special_tokens=False)
        for row in encoded["input_ids"]:
            closed = row if ends_with_eos else [*row, tokenizer.eos_token_id]
            ids.append(np.array(closed, np.uint16))
    return np.concatenate(ids)


def build_model(tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    config = OlmoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        norm_topk_prob=True,
    )
    model = OlmoeForCausalLM(config)
    # On two CPU cores a loop over eight small experts is 1.2x as fast as one grouped matmul.
    model.set_experts_implementation("grouped_mm" if torch.cuda.is_available() else "eager")
    return model


def schedule(progress: float) -> float:
    """Multiplier of the peak learning rate after this fraction of the tokens: linear warm-up, then
    cosine decay to FINAL_RATIO."""
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARMUP_RATIO) / (1 - WARMUP_RATIO)))
    return FINAL_RATIO + (1 - FINAL_RATIO) * cosine


def new_optimizer(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05)


def optimizer_step(optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> None:
    """Backward pass, gradient clipping and one step at this learning rate."""
    [group] = optimizer.param_groups
    group["lr"] = learning_rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


class WindowSampler:
    """Random windows of the two token streams, deterministic given the seed."""

    def __init__(self, instructions: np.ndarray, text: np.ndarray, *, seed: int) -> None:
        self.streams = (instructions, text)
        self.random = random.Random(seed)

    def batch(self, step: int) -> torch.Tensor:
        window = CONTEXT_TOKENS if step % LONG_EVERY == 0 else SHORT_WINDOW
        rows = []
        for _ in range(TOKENS_PER_STEP // window):
            stream = self.streams[self.random.random() >= INSTRUCTION_SHARE]
            start = self.random.randrange(len(stream) - window)
            rows.append(stream[start : start + window].astype(np.int64))
        return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def held_out_loss(model: OlmoeForCausalLM, stream: np.ndarray) -> float:
    """Mean negative log-likelihood in nats per token, over the first 64 windows."""
    windows = stream[: 64 * SHORT_WINDOW].astype(np.int64).reshape(-1, 8, SHORT_WINDOW)
    model.eval()
    losses = [
        float(model(input_ids=ids, labels=ids, use_cache=False).loss)
        for ids in torch.from_numpy(windows)
    ]
    model.train()
    return sum(losses) / len(losses)


def train(
    model: OlmoeForCausalLM, sampler: WindowSampler, held_out: np.ndarray, args: argparse.Namespace
) -> list[dict[str, float]]:
    optimizer = new_optimizer(model.parameters())
    started, curve, step, next_report = time.monotonic(), [], 0, 0.0
    model.train()
    stop = (args.stop_after or args.num_tokens) / args.num_tokens
    while (progress := step * TOKENS_PER_STEP / (1e6 * args.num_tokens)) < stop:
        ids = sampler.batch(step)
        loss = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True).loss
        optimizer_step(optimizer, loss, PEAK_LEARNING_RATE * schedule(progress))
        step += 1
        if progress >= next_report:
            next_report = progress + 0.02
            entry = {
                "tokens": step * TOKENS_PER_STEP,
                "minutes": round((time.monotonic() - started) / 60, 1),
                "train_loss": round(loss.item(), 4),
                "held_out_loss": round(held_out_loss(model, held_out), 4),
            }
            curve.append(entry)
            print(json.dumps(entry), flush=True)
            model.save_pretrained(args.save_path)
    return curve


def training_parser(
    description: str | None, *, save_path: Path | None = None, seed: int = 0
) -> argparse.ArgumentParser:
    """A parser with the options of all recipes that train, and their defaults."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--instructions", type=Path, required=True, help="folder of conversations")
    parser.add_argument(
        "--save-path", type=Path, required=save_path is None, default=save_path,
        help="output folder",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=seed)
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = training_parser(__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder of text files")
    parser.add_argument(
        "--num-tokens", type=float, default=16.0,
        help="millions of tokens of the learning-rate schedule",
    )  # fmt: skip
    parser.add_argument("--stop-after", type=float, help="millions of tokens to train on, if fewer")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    documents = read_documents(args.text)
    conversations = list(read_conversations(args.instructions))
    training = [text for sample_id, text in conversations if not is_held_out(sample_id)]
    held_out = [text for sample_id, text in conversations if is_held_out(sample_id)]
    random.Random(args.seed).shuffle(training)
    random.Random(args.seed).shuffle(held_out)
    tokenizer = train_tokenizer(iter(training[:15_000] + documents[:3_000]))
    tokenizer.save_pretrained(args.save_path)
    sampler = WindowSampler(
        token_stream(tokenizer, training, ends_with_eos=True),
        token_stream(tokenizer, documents, ends_with_eos=False),
        seed=args.seed,
    )
    model = build_model(tokenizer)
    curve = train(model, sampler, token_stream(tokenizer, held_out, ends_with_eos=True), args)
    model.save_pretrained(args.save_path)
    (args.save_path / "loss_curve.json").write_text(json.dumps(curve, indent=1))


if __name__ == "__main__":
    main()
