"""Everything that a user of Select-MoE can cause, as one tree.

    SelectMoeError
    ├── ConfigError (ValueError)       a setting is unknown, of a wrong type or out of range
    ├── DataError (ValueError)         a file or a row breaks the input contract
    │   └── TooManyRejectedError       more rows were rejected than `max_rejected` allows
    ├── ModelError (ValueError)        a model folder is not what the command needs
    │   └── ParityError                a converted model does not compute what its base computes
    └── ResumeError (RuntimeError)     an output folder belongs to another run

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
