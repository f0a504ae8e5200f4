"""Silences lm-eval and its libraries, and counts the warnings about truncated prompts."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = ("lm_eval", "datasets", "transformers", "peft")


class TruncationCounter(logging.Handler):
    """Counts the warnings of lm-eval about truncated inputs, and drops all other records."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.num_truncated = 0

    def emit(self, record: logging.LogRecord) -> None:
        # lm-eval truncates a prompt that is too long from the left, and only logs a warning.
        is_of_lm_eval = record.name.startswith("lm_eval")
        self.num_truncated += is_of_lm_eval and "runcati" in record.getMessage()


@contextlib.contextmanager
def quiet() -> Iterator[TruncationCounter]:
    """Suppresses what these libraries print, log and warn; exceptions pass."""
    counter = TruncationCounter()
    with contextlib.ExitStack() as stack:
        devnull = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(_handled_by(counter))
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(devnull))
        stack.enter_context(contextlib.redirect_stderr(devnull))
        yield counter


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
