"""What a chat template adds around the contents of messages, found with placeholders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selectmoe.errors import ChatTemplateError

# Private-use letters, and tabs to see whether a template trims; no template writes tabs itself.
PLACEHOLDER = "\t\ue000{}\ue001\t"
TRIMMED_PLACEHOLDER = PLACEHOLDER.strip()
_STRIPS: dict[tuple[bool, bool], Callable[[str], str]] = {  # by (keeps left, keeps right)
    (True, True): str,
    (False, True): str.lstrip,
    (True, False): str.rstrip,
    (False, False): str.strip,
}
# Ordinary text that reveals a template which does more to contents than strip them.
PROBE = ' Probe {}: "two" & <b>words</b>,\n\nsecond line.\n'
Span = tuple[int, int, int]
"""(slot, first character, end): where the content of a slot stands in a text."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What a template adds around the contents of one sequence of slots, one for each content."""

    pieces: tuple[str, ...]  # one before each content in `order`, and one after the last
    order: tuple[int, ...]  # slots as they are written; some templates move or repeat one
    strips: tuple[Callable[[str], str], ...]  # what the template does to white space around it

    def render(self, contents: Sequence[str]) -> tuple[str, list[Span]]:
        """The text, and where each content stands in it."""
        parts, spans = [self.pieces[0]], []
        length = len(parts[0])
        for slot, strip, piece in zip(self.order, self.strips, self.pieces[1:], strict=True):
            content = strip(contents[slot])
            spans.append((slot, length, length + len(content)))
            parts += (content, piece)
            length += len(content) + len(piece)
        return "".join(parts), spans

    def missing(self, num_slots: int) -> tuple[int, ...]:
        """The slots that the template leaves out."""
        return tuple(slot for slot in range(num_slots) if slot not in self.order)


def parse_skeleton(text: str) -> Skeleton:
    """The skeleton of what a template writes for placeholders."""
    pieces, order, strips = [], [], []
    rest = text
    while "\ue000" in rest:
        before, rest = rest.split("\ue000", 1)
        slot, rest = rest.split("\ue001", 1)
        keeps_left, keeps_right = before.endswith("\t"), rest.startswith("\t")
        pieces.append(before.removesuffix("\t"))
        rest = rest.removeprefix("\t")
        order.append(int(slot))
        strips.append(_STRIPS[keeps_left, keeps_right])
    return Skeleton((*pieces, rest), tuple(order), tuple(strips))


def require_unchanged(skeleton: Skeleton, probes: Sequence[str], text: str, roles: str) -> None:
    """Raises ChatTemplateError unless the skeleton gives what the template gave for the probes."""
    if skeleton.render(probes)[0] != text:
        raise ChatTemplateError(
            "the tokenizer's chat template changes the contents of messages, so that answers "
            f"cannot be found in its text, for the roles {roles}; give the model "
            "folder a template that inserts contents as they are"
        )


def left_out(role: str, index: int, roles: str) -> ChatTemplateError:
    """The error where a template does not write a turn that says something."""
    return ChatTemplateError(
        f"the tokenizer's chat template leaves out the {role} turn at messages[{index}] of the "
        f"roles {roles}"
    )
