"""The model to evaluate behind lm-eval's interface."""

import inspect
from collections.abc import Mapping
from typing import Any

from selectmoe.config.evaluation import EvaluateConfig, parse_model_args
from selectmoe.errors import ConfigError

# The automatic batch size of lm-eval tries the largest first, and runs out of memory on a CPU.
CPU_BATCH_SIZE = 16


def split_model_args(config: EvaluateConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of lm-eval's model, arguments of transformers' from_pretrained)."""
    from lm_eval.models.huggingface import HFLM

    arguments = parse_model_args(config.model_args)
    own = inspect.signature(HFLM.__init__).parameters.keys() - {"trust_remote_code"}
    of_lm_eval = {name: value for name, value in arguments.items() if name in own}
    return of_lm_eval, {name: arguments[name] for name in arguments.keys() - own}


def wrap_model(
    model: Any,  # noqa: ANN401 (a PreTrainedModel or a PeftModel)
    tokenizer: Any,  # noqa: ANN401 (a tokenizer of either kind)
    config: EvaluateConfig,
    *,
    device: str,
    arguments: Mapping[str, Any],
) -> Any:  # noqa: ANN401 (lm-eval's HFLM)
    """The loaded model as lm-eval's HFLM. arguments: further ones of HFLM.

    It is not loaded by lm-eval (`pretrained=`, `peft=`), which with an adapter resizes the
    vocabulary to the tokenizer's: a model and its adapter would then not be comparable.
    Raises ConfigError for an argument that lm-eval refuses, and for a missing chat template.
    """
    from lm_eval.models.huggingface import HFLM

    if config.apply_chat_template and not tokenizer.chat_template:
        raise ConfigError(
            f"apply_chat_template needs a chat template, and {tokenizer.name_or_path}, whose "
            "tokenizer is used, has none"
        )
    try:
        return HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size(config, device=device),
            **arguments,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model_args: lm-eval refuses them: {error}") from error


def batch_size(config: EvaluateConfig, *, device: str) -> int | str:
    """A number, or lm-eval's "auto"."""
    size = str(config.batch_size or "auto")
    if size.startswith("auto"):
        return CPU_BATCH_SIZE if device == "cpu" else size
    return int(size)
