"""Replicas that divide an evaluation give the results of one model."""

import json

import numpy as np

from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.evaluation.lm_eval_run import evaluate, load_lm
from selectmoe.evaluation.replicas import divide, losses_of, respond
from tests.numerics.test_evaluation_settings import TOLERANCE, likelihoods

CONFIG = EvaluateConfig(limit=7)


class InThisProcess:
    """A replica with a model of its own, which needs no process of its own to answer."""

    def __init__(self) -> None:
        self.lm = load_lm(CONFIG, device="cpu")
        self.num_requests = 0

    def respond(self, request_type, arguments):
        self.num_requests += len(arguments)
        answered = respond(self.lm, request_type, arguments)
        return lambda: answered

    def answer_losses(self, samples):
        self.num_requests += len(samples)
        found = losses_of(self.lm, samples)
        return lambda: found


def test_three_replicas_give_the_results_of_one():
    others = [InThisProcess(), InThisProcess()]
    one, three = (
        {result.task: result for result in evaluate(CONFIG, device="cpu", others=replicas)}
        for replicas in ((), others)
    )
    # 7 rows of 4 choices and 7 conversations: 3 rows here and 2 on each of the others.
    assert [other.num_requests for other in others] == [10, 10]
    np.testing.assert_allclose(
        likelihoods(three["demo_choices"]), likelihoods(one["demo_choices"]), rtol=0, atol=TOLERANCE
    )
    loss = "demo_answer_loss"
    for ours, theirs in zip(three[loss].samples, one[loss].samples, strict=True):
        assert (ours.sample, ours.weights) == (theirs.sample, theirs.weights)
        assert abs(ours.values["nll_per_token"] - theirs.values["nll_per_token"]) < TOLERANCE


def test_choices_of_a_row_stay_together():
    from lm_eval.api.instance import Instance

    requests = [
        Instance("loglikelihood", {}, ("", ""), choice, ("task", row, 1))
        for row in range(5)
        for choice in range(2)
    ]
    assert divide(requests, 2) == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7]]
    assert divide(requests[:2], 3) == [[0, 1], [], []]


def test_truncated_prompts_of_all_replicas_are_counted(tmp_path):
    row = {"question": "why " * 1_100, "choices": ["yes, it is", "no, not"], "answer": 0}
    file = tmp_path / "long.jsonl"
    file.write_text((json.dumps(row) + "\n") * 2)
    config = EvaluateConfig(tasks=(str(file),))
    [result] = evaluate(config, device="cpu", others=[InThisProcess()])
    assert result.num_truncated == 4
