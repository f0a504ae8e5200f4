"""Cost of a warm-up step relative to inference, measured as in the benchmark on a small batch."""

from itertools import islice

import pytest
import torch

from benchmarks.bench_training import (
    MAX_MEMORY_RATIO,
    Costs,
    CpuPeak,
    Turn,
    exceeded_limits,
    highest_sum,
    measure,
)
from selectmoe.data.readers import read_corpus
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.records import Sample


@pytest.fixture(scope="module")
def costs():
    rows = (row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample))
    samples = list(islice(rows, 4))
    return measure(str(EMBEDDED_SELECTOR), samples, max_tokens=1_024, repeats=1, uses_gpu=False)


def costs_of(*, step_seconds: float, step_bytes: float) -> Costs:
    return Costs(
        seconds=(Turn(1.0, step_seconds),),
        peak_bytes=(Turn(100.0, step_bytes),),
        held_bytes=Turn(100.0, 100.0),
        num_tokens=1,
        num_tokens_padded=1,
        num_padded_batches=1,
        largest_gate_change=1.0,
    )


def test_a_step_needs_little_more_memory_than_inference(costs):
    assert max(costs.memory_ratios) <= MAX_MEMORY_RATIO
    # Activations alone stay within the limit, too.
    assert max(costs.activation_ratios) <= MAX_MEMORY_RATIO
    # A step needs more memory than inference: the inputs of the gates, until the backward pass.
    assert min(costs.activation_ratios) > 1


def test_the_measured_step_trains_the_gates(costs):
    # Three AdamW steps with a peak learning rate of 5e-3; the first and last are small.
    assert costs.largest_gate_change > 1e-3
    assert costs.held_bytes.step > costs.held_bytes.inference  # optimizer states


def test_inference_needs_memory_for_weights_and_a_few_hidden_states(costs):
    assert costs.held_bytes.inference >= 2.9e6 * 4  # 2.9 million parameters in float32
    hidden_state = costs.num_tokens_padded / costs.num_padded_batches * 128 * 4
    for turn in costs.peak_bytes:
        # A layer needs about ten of them at a time; without memory events this would be 0.
        assert 2 * hidden_state < turn.inference < 100 * hidden_state


def test_the_cpu_meter_measures_the_peak_of_allocated_tensors():
    torch.zeros(10)  # an allocation before the start does not count
    meter = CpuPeak()
    meter.start()
    first = torch.empty(1_000_000)
    del first
    second, third = torch.empty(2_000_000), torch.empty(500_000)
    assert second.numel() + third.numel() == 2_500_000
    # Exact: the allocator reports the requested bytes.
    assert meter.stop() == 4 * 2_500_000
    assert highest_sum([4, 2, -4, 1]) == 6


@pytest.mark.parametrize(
    ("step_seconds", "step_bytes", "num_exceeded"),
    [(2.1, 190.0, 0), (2.3, 190.0, 1), (2.1, 210.0, 1), (2.3, 210.0, 2)],
)
def test_a_ratio_above_its_limit_is_reported(step_seconds, step_bytes, num_exceeded):
    exceeded = exceeded_limits(costs_of(step_seconds=step_seconds, step_bytes=step_bytes))
    assert len(exceeded) == num_exceeded
