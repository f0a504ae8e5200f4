"""Divides the requests of an evaluation over replicas of the model, each with a GPU of its own.

The first replica is in this process and runs lm-eval; the others answer requests, so that results
are those of one model, up to the rounding of other batches.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from selectmoe.evaluation.answer_loss import AnswerLoss, answer_losses
from selectmoe.evaluation.quiet_lm_eval import quiet
from selectmoe.records import RejectedRow, Sample

REQUEST_TYPES = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class Replica(Protocol):
    """Another process with the same model."""

    def respond(
        self, request_type: str, arguments: Sequence[tuple[Any, ...]]
    ) -> Callable[[], tuple[list[Any], int]]:
        """Starts; the returned function waits for (responses, number of truncated prompts)."""

    def answer_losses(
        self, samples: Sequence[Sample]
    ) -> Callable[[], tuple[list[AnswerLoss], list[RejectedRow]]]:
        """Starts; the returned function waits for the losses."""


def respond(
    lm: Any,  # noqa: ANN401 (lm-eval's HFLM)
    request_type: str,
    arguments: Sequence[tuple[Any, ...]],
) -> tuple[list[Any], int]:
    """The responses of lm-eval's model to requests by their arguments, and how many prompts it
    truncated."""
    from lm_eval.api.instance import Instance

    requests = [Instance(request_type, {}, each, n) for n, each in enumerate(arguments)]
    with quiet() as truncations:
        responses = getattr(lm, request_type)(requests, disable_tqdm=True)
    return list(responses), truncations.num_truncated


def losses_of(
    lm: Any,  # noqa: ANN401 (lm-eval's HFLM)
    samples: Sequence[Sample],
) -> tuple[list[AnswerLoss], list[RejectedRow]]:
    return answer_losses(lm.model, lm.tokenizer, samples, max_sequence_length=lm.max_length)


class Replicas:
    """lm-eval's model in this process and others like it; without others it adds nothing."""

    def __init__(self, lm: Any, others: Sequence[Replica] = ()) -> None:  # noqa: ANN401
        self.lm = lm
        self.others = others
        self.num_truncated = 0  # by the others
        if others:
            for request_type in REQUEST_TYPES:
                setattr(lm, request_type, self._divided(request_type, getattr(lm, request_type)))

    def _divided(self, request_type: str, own: Callable[..., Any]) -> Callable[..., list[Any]]:
        """A method of the model that answers a share of the requests itself."""

        def answer(requests: Sequence[Any], **settings: Any) -> list[Any]:  # noqa: ANN401
            shares = divide(requests, 1 + len(self.others))
            waiting = [
                replica.respond(request_type, [requests[i].args for i in share])
                for replica, share in zip(self.others, shares[1:], strict=True)
                if share
            ]
            responses: dict[int, Any] = {}
            if shares[0]:
                answered = own([requests[i] for i in shares[0]], **settings)
                responses |= dict(zip(shares[0], answered, strict=True))
            for wait, share in zip(waiting, filter(None, shares[1:]), strict=True):
                answered, num_truncated = wait()
                responses |= dict(zip(share, answered, strict=True))
                self.num_truncated += num_truncated
            return [responses[i] for i in range(len(requests))]

        return answer

    def answer_losses(
        self, samples: Sequence[Sample]
    ) -> tuple[list[AnswerLoss], list[RejectedRow]]:
        """As the function of that name, in the order of `samples`."""
        num = 1 + len(self.others)
        waiting = [
            replica.answer_losses(samples[rank::num])
            for rank, replica in enumerate(self.others, start=1)
        ]
        parts = [losses_of(self.lm, samples[::num]), *(wait() for wait in waiting)]
        losses = [
            AnswerLoss(loss.position * num + rank, loss.nll, loss.num_tokens, loss.num_bytes)
            for rank, (part, _) in enumerate(parts)
            for loss in part
        ]
        rejected = [row for _, rows in parts for row in rows]
        return sorted(losses, key=lambda loss: loss.position), rejected


def divide(requests: Sequence[Any], num_shares: int) -> list[list[int]]:
    """The positions of each share. Requests of one row stay together: lm-eval computes the common
    beginning of its choices once."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    rows: dict[tuple[str, int], int] = {}
    for position, request in enumerate(requests):
        row = rows.setdefault((request.task_name, request.doc_id), len(rows))
        shares[row % num_shares].append(position)
    return shares
