"""Sums over batches that give the means of all rows, and the collapse that they show."""

import pytest
import torch

from selectmoe.errors import TrainingStoppedError
from selectmoe.warmup.gate_objectives import MicroLoss
from selectmoe.warmup.gate_statistics import CollapseWatch, GateStatistics, collapse_of
from selectmoe.warmup.step_batches import MicroBatch


def batch_of(answers: list[list[int]], num_real: int) -> MicroBatch:
    answer_mask = torch.tensor(answers).bool()
    return MicroBatch(
        sample_ids=tuple("ab")[:num_real],
        token_ids_BT=torch.zeros_like(answer_mask, dtype=torch.long),
        attention_mask_BT=torch.ones_like(answer_mask),
        answer_mask_BT=answer_mask,
        labels_BT=torch.zeros_like(answer_mask, dtype=torch.long),
        num_real=num_real,
        share_of_step=0.5,
        num_labels_of_step=1,
    )


def test_batches_of_several_sizes_give_the_means_of_their_rows():
    statistics = GateStatistics(num_layers=1, device=torch.device("cpu"))
    # Margins of the answer tokens: 2 and 4 (real, mean 3), 1 (its copy); then 0 (real), 5 (copy).
    first = torch.tensor([[[2.0, 4.0, 9.0], [9.0, 1.0, 9.0]]])
    second = torch.tensor([[[0.0], [5.0]]])
    statistics.add(
        MicroLoss(torch.zeros(()), {"label_loss": torch.tensor(0.25)}, first),
        batch_of([[1, 1, 0], [0, 1, 0]], 1),
        num_tokens=6,
    )
    statistics.add(
        MicroLoss(torch.zeros(()), {"label_loss": torch.tensor(0.5)}, second),
        batch_of([[1], [1]], 1),
        num_tokens=2,
    )
    statistics.num_steps = 1
    logs = statistics.to_logs(num_workers=1, seconds=2.0)
    sigmoid = torch.tensor([2.0, 4.0, 0.0]).sigmoid().tolist()
    good = ((sigmoid[0] + sigmoid[1]) / 2 + sigmoid[2]) / 2
    assert logs["good_probability"] == pytest.approx(good)
    assert logs["good_probability_layer_00"] == pytest.approx(good)
    assert logs["margin_mean"] == pytest.approx((3 + 1 + 0 + 5) / 4)
    spread = torch.tensor([3.0, 1.0, 0.0, 5.0]).std(correction=0).item()
    assert logs["margin_spread"] == pytest.approx(spread)
    assert logs["pairs_in_order"] == 0.5
    assert logs["label_loss"] == 0.75
    assert logs["tokens_per_second"] == 4.0


def layers(*values: float, **others: float) -> dict[str, float]:
    named = {f"good_probability_layer_{n:02d}": value for n, value in enumerate(values)}
    return {**named, "margin_mean": 0.0, "margin_spread": 1.0, **others}


@pytest.mark.parametrize(
    ("logs", "complaint"),
    [
        (layers(0.9995, 0.9999), "every layer keeps everything"),
        (layers(0.0001, 0.0009), "every layer discards everything"),
        (layers(0.9995, 0.4), None),
        (layers(0.0001, 0.4), None),
        # The contrastive loss may open all gates as long as they order rows.
        (layers(0.9995, 0.9999, label_loss=0.1, margin_spread=0.5), None),
        (layers(0.5, 0.5, label_loss=0.7, margin_spread=1e-6), "the margins of all rows are 0"),
    ],
)
def test_what_counts_as_a_collapse(logs, complaint):
    found = collapse_of(logs)
    assert found is None if complaint is None else complaint in found


def test_a_collapse_stops_only_when_it_lasts():
    watch, bad, well = CollapseWatch(), layers(1.0, 1.0), layers(0.5, 0.5)
    for logs in (bad, bad, well, bad, bad):
        watch.check(logs)
    with pytest.raises(TrainingStoppedError, match=r"the gates have collapsed: .* in 3 logs in a"):
        watch.check(bad)
