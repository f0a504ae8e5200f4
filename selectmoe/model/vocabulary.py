"""Token ids that a model has no embedding for; imports no torch."""

from collections.abc import Iterable, Iterator

from selectmoe.errors import ModelError
from selectmoe.records import TokenizedSample


def known_tokens(
    samples: Iterable[TokenizedSample], *, vocabulary_size: int, model: str
) -> Iterator[TokenizedSample]:
    """The samples as they are. Raises ModelError at the first token that the model cannot embed:
    its tokenizer was extended, and its embeddings were not, or it is that of another model."""
    for sample in samples:
        highest = int(sample.token_ids.max(initial=-1))
        if highest >= vocabulary_size:
            raise ModelError(
                f"{model}: its tokenizer gives the token {highest}, and the model knows "
                f"{vocabulary_size}; resize its embeddings, or use the tokenizer of this model"
            )
        yield sample
