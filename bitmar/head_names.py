"""Names of attention heads: `encoder.L2H3` is head 3 of layer 2 of the encoder, both counted from 0."""

from __future__ import annotations

import re
from dataclasses import dataclass

# kinds of attention, and how metrics call them
TITLES = {"encoder": "Encoder", "decoder": "Decoder", "cross_modal": "CrossModal", "memory": "Memory"}
KINDS = tuple(TITLES)
CAUSAL = ("encoder", "decoder")  # of them, over the text itself
_NAME = re.compile(r"(?:(\w+)\.)?L(\d+)H(\d+)")


@dataclass(frozen=True, order=True)
class HeadName:
    kind: str
    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.kind}.L{self.layer}H{self.head}"

    @property
    def place(self) -> str:
        """The layer, as `encoder.L2`."""
        return f"{self.kind}.L{self.layer}"


def parse_head(text: str, kind: str | None = None) -> HeadName:
    """`kind`: of a name that gives none (L2H3). Raises ValueError."""
    found = _NAME.fullmatch(text.strip())
    if found is None or (found[1] or kind) not in KINDS:
        raise ValueError(f"{text!r} names no head; one is written KIND.L2H3, KIND one of {', '.join(KINDS)}")
    return HeadName(found[1] or str(kind), int(found[2]), int(found[3]))


def parse_heads(text: str, kind: str | None = None) -> tuple[HeadName, ...]:
    """A list with commas: encoder.L2H3,decoder.L0H1. Raises ValueError."""
    return tuple(parse_head(part, kind) for part in text.split(",") if part.strip())
