"""Train the tiny OLMoE that the embedded selector stands on: tokenizer first, then the model.

    python recipes/train_tiny_base.py --text DIR --instructions DIR --save-path DIR --num-tokens 16

DIR of --text holds .txt or .txt.gz files, DIR of --instructions holds .jsonl files of
conversations. One row in ten (by a hash of its id) is held out and never trained on; its loss is
the curve that the model card shows. The learning rate follows the number of tokens, in millions.
"""

import argparse
import gzip
import json
import math
import random
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 4_096
CONTEXT_TOKENS = 1_024
END, PAD, ROLES = "<|endoftext|>", "<|pad|>", ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENS_PER_STEP = 4_096
# Most steps read short windows (cheap attention); one in five reads the whole context, so that
# every rotary position is trained.
SHORT_WINDOW, LONG_EVERY = 512, 5
PEAK_LEARNING_RATE, WARMUP_SHARE, FINAL_SHARE = 3e-3, 0.02, 0.05
INSTRUCTION_SHARE = 0.6


def is_held_out(sample_id: str) -> bool:
    """True for the same tenth of the rows in every recipe; CRC-32, not hash(), which is salted."""
    return zlib.crc32(sample_id.encode()) % 10 == 0


def is_test_row(sample_id: str) -> bool:
    """True for half of the held-out tenth: what is reported. Choices are made on the other half."""
    return zlib.crc32(sample_id.encode()) % 20 == 10


def read_documents(directory: Path) -> list[str]:
    """Paragraph groups of about 4,000 characters from every text file."""
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
    """Yields (id, text in the chat template)."""
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
    tokenizer: PreTrainedTokenizerFast, texts: list[str], *, closed: bool
) -> np.ndarray:
    """All texts as one array of ids; `closed` texts already end with the end token."""
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), 1_000):
        for row in tokenizer(texts[start : start + 1_000], add_special_tokens=False)["input_ids"]:
            ids.append(np.array(row if closed else [*row, tokenizer.eos_token_id], np.uint16))
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
    # A loop over eight small experts is 1.2x as fast on two CPU cores; a GPU wants one product.
    model.set_experts_implementation("grouped_mm" if torch.cuda.is_available() else "eager")
    return model


def schedule(share: float) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine down to FINAL_SHARE of it;
    `share` of the tokens are read."""
    if share < WARMUP_SHARE:
        return share / WARMUP_SHARE
    cosine = 0.5 * (1 + math.cos(math.pi * (share - WARMUP_SHARE) / (1 - WARMUP_SHARE)))
    return FINAL_SHARE + (1 - FINAL_SHARE) * cosine


class WindowSampler:
    """Random windows of the two streams, deterministic from the seed."""

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
    """Mean negative log-likelihood, nats a token, of the first 64 windows."""
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05)
    started, curve, step, next_report = time.monotonic(), [], 0, 0.0
    model.train()
    stop = (args.stop_after or args.num_tokens) / args.num_tokens
    while (share := step * TOKENS_PER_STEP / (1e6 * args.num_tokens)) < stop:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * schedule(share)
        ids = sampler.batch(step)
        loss = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if share >= next_report:
            next_report = share + 0.02
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument("--save-path", type=Path, required=True)
    parser.add_argument("--num-tokens", type=float, default=16.0, help="length of the schedule, M")
    parser.add_argument("--stop-after", type=float, help="millions of tokens, before it ends")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
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
        token_stream(tokenizer, training, closed=True),
        token_stream(tokenizer, documents, closed=False),
        seed=args.seed,
    )
    model = build_model(tokenizer)
    curve = train(model, sampler, token_stream(tokenizer, held_out, closed=True), args)
    model.save_pretrained(args.save_path)
    (args.save_path / "loss_curve.json").write_text(json.dumps(curve, indent=1))


if __name__ == "__main__":
    main()
