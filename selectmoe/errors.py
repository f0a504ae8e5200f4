"""Everything that a user of Select-MoE can cause, as one tree.

    SelectMoeError
    ├── ConfigError (ValueError)            a setting is unknown, of a wrong type or out of range
    │   └── NotEnoughMemoryError            a training needs more than the machine has free
    ├── DataError (ValueError)              a file or a row breaks the input contract
    │   └── TooManyRejectedError            more rows were rejected than `max_rejected` allows
    ├── ModelError (ValueError)             a model folder is not what the command needs
    │   └── ParityError                     a converted model does not compute what its base does
    ├── ResumeError (RuntimeError)          an output folder belongs to another run
    ├── TrainingStoppedError (RuntimeError) training cannot lead anywhere: a loss that is no number
    ├── ClusterError (RuntimeError)         no cluster answers, or it has not what a run needs
    ├── ScoringError (RuntimeError)         scoring ended with shards left
    ├── TrainingError (RuntimeError)        workers were lost more often than allowed, or failed
    └── EvaluationError (RuntimeError)      the worker was lost, or failed

TrainingStoppedError and NotEnoughMemoryError live in `training/`, the last four in `jobs/`.
A message names the file, row or key, then the rule, then the value. The commands in `jobs/` print
it on one line and exit with status 2; nothing else in the package catches it.
"""


class SelectMoeError(Exception):
    """A mistake that the user can mend; never a bug of ours."""


class ConfigError(SelectMoeError, ValueError):
    """A setting is unknown, of a wrong type or out of range."""


class DataError(SelectMoeError, ValueError):
    """A file or a row breaks the input contract."""


class TooManyRejectedError(DataError):
    """More rows were rejected than `max_rejected` allows."""


class ModelError(SelectMoeError, ValueError):
    """A model folder is not what the command needs."""


class ParityError(ModelError):
    """A converted model does not compute what its base computes."""


class ResumeError(SelectMoeError, RuntimeError):
    """An output folder belongs to another run."""
