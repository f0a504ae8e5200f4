"""lm-eval, datasets and tqdm without their noise, and with the one complaint that counts."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = ("lm_eval", "datasets", "transformers", "peft")


class Noise(logging.Handler):
    """What was logged while it was quiet, as far as it tells of the results."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.num_truncated = 0

    def emit(self, record: logging.LogRecord) -> None:
        # lm-eval cuts a question that is too long from the left, and only says so.
        is_of_lm_eval = record.name.startswith("lm_eval")
        self.num_truncated += is_of_lm_eval and "runcati" in record.getMessage()


@contextlib.contextmanager
def quiet() -> Iterator[Noise]:
    """Keeps off the terminal what these libraries print, log and warn of.

    Exceptions are no output and pass.
    """
    noise = Noise()
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(_handled_by(noise))
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield noise


@contextlib.contextmanager
def _handled_by(handler: logging.Handler) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(entry.handlers, entry.propagate) for entry in loggers]
    for entry in loggers:
        entry.handlers, entry.propagate = [handler], False
    try:
        yield
    finally:
        for entry, (handlers, propagate) in zip(loggers, before, strict=True):
            entry.handlers, entry.propagate = handlers, propagate
