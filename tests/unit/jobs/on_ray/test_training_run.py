"""Without a number of workers a run takes every free GPU, and says so."""

import logging

import pytest

from jobs.on_ray.training_run import with_num_workers
from selectmoe.config.finetune import FinetuneConfig
from selectmoe.config.loading import load_config
from selectmoe.config.warmup import WarmupConfig
from selectmoe.errors import ConfigError


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "jobs")
    return caplog


@pytest.mark.parametrize("stage", [FinetuneConfig, WarmupConfig])
def test_all_free_gpus_are_used_and_named(said, stage):
    config = with_num_workers(load_config(stage, []), num_free_gpus=4)
    assert config.scaling.num_workers == 4
    assert said.messages == ["training on all 4 free GPUs; --num-workers sets another number"]


@pytest.mark.parametrize("num_free_gpus", [0, 1])
def test_without_several_gpus_there_is_one_worker(said, num_free_gpus):
    config = with_num_workers(load_config(FinetuneConfig, []), num_free_gpus=num_free_gpus)
    assert config.scaling.num_workers == 1
    assert said.messages == []


@pytest.mark.parametrize("setting", ["scaling.num_workers=2", "scaling.use_gpu=false"])
def test_a_given_number_and_cpus_are_kept(setting):
    config = load_config(FinetuneConfig, [setting])
    number = with_num_workers(config, num_free_gpus=8).scaling.num_workers
    assert number == (config.scaling.num_workers or 1)


def test_of_gpus_that_do_not_divide_a_step_as_many_are_used_as_do(said):
    # 32 rows a step in batches of 4: 8 workers, or 4 of 7.
    config = with_num_workers(load_config(FinetuneConfig, []), num_free_gpus=7)
    assert config.scaling.num_workers == 4
    assert said.messages[0].startswith("training on 4 of the 7 free GPUs")


def test_a_single_worker_cannot_shard():
    config = load_config(FinetuneConfig, ["training.strategy=fsdp"])
    assert with_num_workers(config, num_free_gpus=2).scaling.num_workers == 2
    with pytest.raises(ConfigError, match=r"fsdp needs scaling\.num_workers at least 2, got 1"):
        with_num_workers(config, num_free_gpus=1)
    with pytest.raises(ConfigError, match=r"fsdp shards the fused experts"):
        load_config(
            FinetuneConfig,
            ["training.strategy=fsdp", "training.lora.target_modules=mlp.experts.gate_up_proj"],
        )
