"""Compares a converted model with its base: tensors, logits with gates forced open, and drift.

Both models are loaded from their folders, one at a time and on the CPU, so that never more than one
is in memory.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerBase

from selectmoe.errors import ModelError, ParityError
from selectmoe.model.checkpoint import model_folder, require_olmoe, require_select_moe
from selectmoe.model.configuration_select_moe import SelectMoeConfig
from selectmoe.model.conversion import is_added, meta_tensors, read_config
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM
from selectmoe.model.quiet_loading import Model, load_model
from selectmoe.model.tokenizer_loading import load_tokenizer, quiet_transformers
from selectmoe.model.weight_files import (
    HEAD,
    StoredTensor,
    TensorReader,
    common_dtype,
    hub_tensors,
    require_tensors,
    stored_tensors,
)

# Shape letters: T = tokens of the text, V = vocabulary.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2**-7}
"""How far the logits may differ with the gates forced open, as a fraction of the largest one where
that exceeds 1: rounding grows with the numbers.

Both models then do the same operations in the same order, so 0 is expected. float32: room for a
library that orders a sum by where its memory lies. bfloat16: one step between neighbouring numbers
of the largest logit's size, which is what such a sum would cost here."""

PARITY_TEXT = """\
A quality gate is a small thing: two numbers for every token, and a softmax that makes one of them
the share of good. When it is open, the experts behind it speak as they did before; when it closes,
they fall silent, and the token passes through the layer as it came. Nobody tells the gate what good
means. It is shown an answer and a spoiled copy of the same answer, again and again, until it leans
towards the first.

The harbour was quiet before six. Two men carried crates of mackerel up the steps, 48 of them at
12.5 kg each, and the third, who kept the book, wrote 600 kg under the date, 14 March 1987. "That
makes 1,140.00," he said, "at one ninety a kilo. Less the ice."

def running_mean(values: list[float], width: int = 3) -> list[float]:
    \"\"\"Means of neighbours; the ends are left out.\"\"\"
    sums = [sum(values[i : i + width]) for i in range(len(values) - width + 1)]
    return [total / width for total in sums]

Question: A train leaves at 09:40 and arrives at 13:05. How long is the journey?
Answer: From 09:40 to 13:00 are 3 hours and 20 minutes; 5 more make 3 hours and 25 minutes.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DtypeParity:
    """Logits of both models in one dtype, compared by maximum or mean absolute difference."""

    largest_logit: float
    tolerance: float  # of the next line
    forced_open_max_difference: float
    # The rest is drift: the effect of the gates as initialized.
    drift_max_difference: float
    drift_mean_difference: float
    drift_kl_nats_per_token: float  # of the converted model's next token from the base's
    base_perplexity: float
    perplexity: float

    @property
    def passed(self) -> bool:
        # Not `>`: a difference that is NaN is no match either.
        return self.forced_open_max_difference <= self.tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """The comparison of a converted model with its base."""

    base: str
    converted: str
    num_tokens: int
    num_tensors: int  # of the base, in the hub's layout, all compared bit by bit
    different_tensors: tuple[str, ...]
    same_token_ids: bool  # both tokenizers read the text alike
    by_dtype: Mapping[str, DtypeParity]
    torch_version: str
    transformers_version: str

    @property
    def passed(self) -> bool:
        same_parts = not self.different_tensors and self.same_token_ids
        return same_parts and all(parity.passed for parity in self.by_dtype.values())

    def to_json(self) -> dict[str, object]:
        """The report for a JSON file; numbers that are not finite become null."""
        by_dtype = {
            name: {
                key: value if math.isfinite(value) else None
                for key, value in asdict(parity).items()
            }
            for name, parity in self.by_dtype.items()
        }
        return {"passed": self.passed, **asdict(self), "by_dtype": by_dtype}


@quiet_transformers()
def verify_conversion(base: str | Path, converted: str | Path) -> ParityReport:
    """Compares a Select-MoE folder with the OLMoE, a folder or hub name, that it was made from.

    Raises ModelError where one of them is not a model of its kind, and ParityError where they
    cannot be compared; a mismatch is only reported (see require_parity).
    """
    require_olmoe(str(base))
    require_select_moe(str(converted))
    base_folder, new_folder = model_folder(str(base)), model_folder(str(converted))
    base_stored, shapes = _tensors_of(base_folder, OlmoeForCausalLM, OlmoeConfig)
    new_stored, new_shapes = _tensors_of(new_folder, SelectMoeForCausalLM, SelectMoeConfig)
    if shapes != {name: shape for name, shape in new_shapes.items() if not is_added(name)}:
        raise ParityError(f"{converted}: has tensors of other names or shapes than {base}")
    tokenizer, new_tokenizer = load_tokenizer(base_folder), load_tokenizer(new_folder)
    config = read_config(OlmoeConfig, base_folder)
    ids_T = _token_ids(tokenizer, config)
    names = sorted(shapes.keys() - ({HEAD} - base_stored.keys()))  # a tied head may be in no file
    return ParityReport(
        base=str(base),
        converted=str(converted),
        num_tokens=len(ids_T),
        num_tensors=len(names),
        different_tensors=_find_differences(names, base_stored, new_stored),
        same_token_ids=torch.equal(ids_T, _token_ids(new_tokenizer, config)),
        by_dtype={
            name: _compare(base_folder, new_folder, ids_T, dtype=name) for name in TOLERANCES
        },
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
    )


def require_parity(report: ParityReport) -> None:
    """Raises ParityError, which lists all differences, if the report shows a mismatch."""
    wrong = []
    if report.different_tensors:
        wrong.append(
            f"{len(report.different_tensors)} of {report.num_tensors} tensors differ, the first is "
            f"{report.different_tensors[0]!r}"
        )
    if not report.same_token_ids:
        wrong.append("the tokenizers read the same text differently")
    wrong += [
        f"{dtype} logits differ by {parity.forced_open_max_difference:.2g} "
        f"(allowed {parity.tolerance:.2g})"
        for dtype, parity in report.by_dtype.items()
        if not parity.passed
    ]
    if wrong:
        raise ParityError(
            f"{report.converted}: does not compute what {report.base} computes: {'; '.join(wrong)}"
        )


def _tensors_of(
    folder: Path, model_class: type[OlmoeForCausalLM], config_class: type[OlmoeConfig]
) -> tuple[dict[str, StoredTensor], dict[str, torch.Size]]:
    """The folder's tensors as stored, checked to be complete, and their shapes by hub name."""
    config = read_config(config_class, folder)
    stored = stored_tensors(folder)
    fused = meta_tensors(model_class, config)
    require_tensors(folder, stored, fused, tied=config.tie_word_embeddings)
    return stored, {name: tensor.shape for name, tensor in hub_tensors(fused).items()}


def _token_ids(tokenizer: PreTrainedTokenizerBase, config: OlmoeConfig) -> Tensor:
    ids = tokenizer(PARITY_TEXT)["input_ids"][: config.max_position_embeddings]
    if len(ids) < 2 or max(ids) >= config.vocab_size:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer does not fit the model: it makes {len(ids)} "
            f"tokens of the text, ids up to {max(ids, default=0)} of {config.vocab_size}"
        )
    return torch.tensor(ids)


def _find_differences(
    names: list[str], base: Mapping[str, StoredTensor], converted: Mapping[str, StoredTensor]
) -> tuple[str, ...]:
    """Names of the tensors that are not the same bit by bit; reads one pair at a time.

    Equal logits are not enough: a text need not reach every expert.
    """
    old, new = TensorReader(base), TensorReader(converted)
    return tuple(name for name in names if not _same_bits(old.read(name), new.read(name)))


def _same_bits(old: Tensor, new: Tensor) -> bool:
    # A base of mixed dtypes was stored in the one that holds them all.
    old_bytes = old.to(new.dtype).contiguous().view(torch.uint8)
    return torch.equal(old_bytes, new.contiguous().view(torch.uint8))


def _compare(base: Path, converted: Path, ids_T: Tensor, *, dtype: str) -> DtypeParity:
    base_TV = _logits(_load(OlmoeForCausalLM, base, dtype=dtype), ids_T)
    if not base_TV.isfinite().all():
        raise ParityError(f"{base}: its logits are not finite in {dtype}: nothing to compare with")
    model = _load(SelectMoeForCausalLM, converted, dtype=dtype, quality_gate_forced_open=True)
    forced_open_TV = _logits(model, ids_T)
    model.force_gates_open(False)
    gated_TV = _logits(model, ids_T)
    largest = base_TV.abs().max().item()
    return DtypeParity(
        largest_logit=largest,
        tolerance=TOLERANCES[dtype] * max(1.0, largest),
        forced_open_max_difference=(forced_open_TV - base_TV).abs().max().item(),
        drift_max_difference=(gated_TV - base_TV).abs().max().item(),
        drift_mean_difference=(gated_TV - base_TV).abs().mean().item(),
        drift_kl_nats_per_token=_kl_nats_per_token(base_TV, gated_TV),
        base_perplexity=_perplexity(base_TV, ids_T),
        perplexity=_perplexity(gated_TV, ids_T),
    )


def _load(
    model_class: type[Model],
    folder: Path,
    *,
    dtype: str,
    **settings: Any,  # noqa: ANN401 (handed on to from_pretrained, which types them)
) -> Model:
    settings["attn_implementation"] = "sdpa"
    settings["experts_implementation"] = "eager"  # runs on every release and processor
    if dtype == "bfloat16":
        return load_model(model_class, folder, dtype=torch.bfloat16, **settings)
    # Loading bfloat16 files as float32 takes twice the memory of casting them afterwards.
    stored = common_dtype(stored_tensors(folder))
    model: Model = load_model(model_class, folder, dtype=stored, **settings).float()
    return model


@torch.inference_mode()
def _logits(model: OlmoeForCausalLM, ids_T: Tensor) -> Tensor:
    logits_TV: Tensor = model(input_ids=ids_T[None], use_cache=False).logits[0].double()
    return logits_TV


def _kl_nats_per_token(base_TV: Tensor, gated_TV: Tensor) -> float:
    base_log_probs_TV, gated_log_probs_TV = base_TV.log_softmax(-1), gated_TV.log_softmax(-1)
    kl_T = (base_log_probs_TV.exp() * (base_log_probs_TV - gated_log_probs_TV)).sum(-1)
    return kl_T.mean().item()


def _perplexity(logits_TV: Tensor, ids_T: Tensor) -> float:
    return cross_entropy(logits_TV[:-1], ids_T[1:]).exp().item()
