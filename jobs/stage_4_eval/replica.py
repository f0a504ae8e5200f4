"""Replicas of the evaluated model as Ray actors, one per GPU."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from selectmoe.config.evaluation import EvaluateConfig

if TYPE_CHECKING:
    from selectmoe.evaluation.answer_loss import AnswerLoss
    from selectmoe.records import RejectedRow, Sample


class ReplicaActor:
    """The model of a run in a process of its own."""

    def __init__(
        self, config: EvaluateConfig, prepare: Callable[[], None], *, use_gpu: bool
    ) -> None:
        """prepare: called before anything of torch or of the hub's clients is imported."""
        prepare()
        from selectmoe.evaluation.lm_eval_run import load_lm

        self.lm = load_lm(config, device="cuda" if use_gpu else "cpu")

    def respond(
        self, request_type: str, arguments: Sequence[tuple[Any, ...]]
    ) -> tuple[list[Any], int]:
        from selectmoe.evaluation.replicas import respond

        return respond(self.lm, request_type, arguments)

    def answer_losses(
        self, samples: "Sequence[Sample]"
    ) -> "tuple[list[AnswerLoss], list[RejectedRow]]":
        from selectmoe.evaluation.replicas import losses_of

        return losses_of(self.lm, samples)


class RemoteReplica:
    """A ReplicaActor as `selectmoe.evaluation.replicas` uses one."""

    def __init__(self, actor: Any) -> None:  # noqa: ANN401 (a handle of Ray's)
        self.actor = actor

    def respond(
        self, request_type: str, arguments: Sequence[tuple[Any, ...]]
    ) -> Callable[[], tuple[list[Any], int]]:
        return _waiting(self.actor.respond.remote(request_type, arguments))

    def answer_losses(
        self, samples: "Sequence[Sample]"
    ) -> "Callable[[], tuple[list[AnswerLoss], list[RejectedRow]]]":
        return _waiting(self.actor.answer_losses.remote(samples))


def _waiting(reference: Any) -> Callable[[], Any]:  # noqa: ANN401 (a reference of Ray's)
    def wait() -> Any:  # noqa: ANN401 (what the actor returned)
        import ray

        return ray.get(reference)

    return wait
