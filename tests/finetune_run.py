"""A finetuning on a tiny target, by its parts and without Ray."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from selectmoe.config.finetune import (
    FinetuneConfig,
    FinetuneDatasetConfig,
    FinetuneTrainingConfig,
)
from selectmoe.config.lora import LoraSettings
from selectmoe.config.scaling import ScalingConfig
from selectmoe.finetune.stage import finetune
from selectmoe.finetune.supervised_data import prepare_supervised_rows
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.training.worker import TrainingWorker
from tests.tiny_olmoe import tiny_tokenizer
from tests.tiny_target import conversation, write_rows

NUM_ROWS = 20  # 5 steps of 4 rows an epoch
LORA = LoraSettings(r=4, lora_alpha=8, lora_dropout=0.1)


class Run:
    """A finetuning on numbers; settings of training by keyword."""

    def __init__(self, folder: Path, model: Path | None, **training) -> None:
        self.output = folder / "run"
        self.rows_file = folder / "rows.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.rows_file.exists():
            write_rows(self.rows_file, [conversation(n) for n in range(NUM_ROWS)])
        settings = {
            "num_epochs": 2, "effective_batch_size": 4, "batch_size": 2, "learning_rate": 1e-2,
            "logging_steps": 1, "lora": LORA,
        }  # fmt: skip
        self.config = FinetuneConfig(
            model=str(model) if model else None,
            dataset=FinetuneDatasetConfig(data_path=str(self.rows_file), max_sequence_length=64),
            training=FinetuneTrainingConfig(**(settings | training)),
            scaling=ScalingConfig(num_checkpoints=20),
        )

    def train(self, *, resume_from: str | None = None, callbacks=()):
        tokenizer = tiny_tokenizer() if self.config.model else self.embedded_tokenizer()
        prepare_supervised_rows(self.config, tokenizer, self.output)
        return finetune(
            self.config,
            tokenizer,
            TrainingWorker(
                output=self.output,
                scratch=self.output,
                resume_from=str(self.output / resume_from) if resume_from else None,
                callbacks=tuple(callbacks),
            ),
        )

    def adapter(self, checkpoint: str) -> dict[str, torch.Tensor]:
        return load_file(self.output / checkpoint / "adapter_model.safetensors")

    def metrics(self) -> list[dict]:
        lines = (self.output / "metrics.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @staticmethod
    def embedded_folder():
        return EMBEDDED_SELECTOR

    @staticmethod
    def embedded_tokenizer():
        return AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR)


def assert_same(one, other, *, atol=0.0):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=atol)


def spoiled(llama, folder):
    """A copy of the model in which one letter's embedding is no number; only row 7 has it."""
    copy = folder / "spoiled"
    shutil.copytree(llama, copy)
    weights = load_file(copy / "model.safetensors")
    [token] = tiny_tokenizer()("~")["input_ids"]
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    rows = [conversation(n) for n in range(NUM_ROWS)]
    rows[7]["messages"][0]["content"] = "~"
    write_rows(folder / "rows.jsonl", rows)
    return copy
