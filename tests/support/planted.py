"""A BitMar built by hand, whose encoder heads do what they are told: nothing is rounded, nothing is trained.

Residual stream: a code of +-1 for the token (ID), the code of the token before (BEFORE, written by the first layer), a
constant (ONE) and a mark of the first token (FIRST).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmar.batch import Batch
from bitmar.config import ModelConfig
from bitmar.head_names import HeadName
from bitmar.model.attention import SelfAttention
from bitmar.model.bitmar import BitMar
from bitmar.model.text import TABLE_STD
from tests.support.batches import small_model

WIDTH, HEADS, HEAD, CODE = 128, 4, 32, 20
ID, BEFORE, ONE, FIRST, REST = slice(0, CODE), slice(32, 32 + CODE), 64, 65, slice(80, 80 + CODE)
PAIRS = HEAD // 2
SLOW = torch.cat([torch.arange(6, PAIRS), torch.arange(PAIRS + 6, HEAD)])  # that rotary positions hardly turn
PREVIOUS, SINK, EVEN, USELESS = (HeadName("encoder", 0, head) for head in range(HEADS))
INDUCTION, CURRENT = (HeadName("encoder", 1, head) for head in range(2))
BOS = 1


def planted_config() -> ModelConfig:
    return small_model(vocab_size=40, width=WIDTH, heads=HEADS, quantization=False, vision_quantization=False)


@torch.no_grad()
def planted_model() -> BitMar:
    """Heads of layer 0: previous token, first token, even, useless; of layer 1: induction, then current token."""
    torch.manual_seed(0)
    model = BitMar(planted_config()).eval()
    table = torch.zeros(model.config.vocab_size, WIDTH)
    table[:, ID] = torch.randint(0, 2, (len(table), CODE)).float() * 2 - 1
    table[:, ONE] = 1.0
    table[BOS, FIRST] = 3.0
    model.embedding.weight.copy_(TABLE_STD * table)
    for stack in (model.encoder.blocks, model.decoder.blocks):
        for block in stack:
            block.feed_forward.down.weight.zero_()  # type: ignore[union-attr]
    for block in model.decoder.blocks:
        block.attention.output.weight.zero_()  # type: ignore[union-attr]
    for layer in model.fusion.layers:
        layer.gate.zero_()  # type: ignore[union-attr, operator]
    model.memory["reader"].gate.zero_()  # type: ignore[union-attr, operator]
    first, second = (block.attention for block in model.encoder.blocks)
    assert isinstance(first, SelfAttention)
    assert isinstance(second, SelfAttention)
    useless = first.qkv.weight.clone()
    for attention in (first, second):
        attention.qkv.weight.zero_()
        attention.output.weight.zero_()
    at_distance(first, 0, 1)
    hand_on(first, 0, BEFORE)
    to_the_first(first, 1)
    hand_on(first, 1, REST)
    hand_on(first, 2, REST)
    for part in range(2):  # a head that looks at something and hands nothing on
        rows = slice(part * WIDTH + 3 * HEAD, part * WIDTH + 4 * HEAD)
        first.qkv.weight[rows] = useless[rows]
    to_what_followed(second, 0)
    hand_on(second, 0, ID, 5.0)
    for head in (1, 2, 3):
        at_distance(second, head, 0)
        hand_on(second, head, REST, 0.2)
    return model


def rows_of(attention: SelfAttention, part: int, head: int) -> Tensor:
    """What makes query (0), key (1) or value (2) of a head: a view [HEAD, WIDTH]."""
    begin = part * WIDTH + head * HEAD
    return attention.qkv.weight.data[begin : begin + HEAD]


def at_distance(attention: SelfAttention, head: int, distance: int) -> None:
    """Attend to the token so far back: the query is turned by that many positions in the three fastest pairs."""
    angle = distance * 500_000.0 ** (-torch.arange(3) / PAIRS)
    query, key = rows_of(attention, 0, head), rows_of(attention, 1, head)
    query[:3, ONE], query[PAIRS : PAIRS + 3, ONE] = 12 * angle.cos(), -12 * angle.sin()
    key[:3, ONE] = 3.0


def to_the_first(attention: SelfAttention, head: int) -> None:
    """Attend to what bears the mark of the first token."""
    rows_of(attention, 0, head)[PAIRS - 1, ONE] = 12.0
    rows_of(attention, 1, head)[PAIRS - 1, FIRST] = 2.0


def to_what_followed(attention: SelfAttention, head: int) -> None:
    """Attend to the tokens before which the current one stood."""
    rows_of(attention, 0, head)[SLOW, torch.arange(CODE)] = 2.0
    rows_of(attention, 1, head)[SLOW, torch.arange(BEFORE.start, BEFORE.stop)] = 1.0


def hand_on(attention: SelfAttention, head: int, where: slice, gain: float = 1.0) -> None:
    """Copy the attended token's code, so many times, into a part of the residual stream."""
    rows_of(attention, 2, head)[torch.arange(CODE), torch.arange(CODE)] = 1.0
    attention.output.weight.data[torch.arange(where.start, where.stop), head * HEAD + torch.arange(CODE)] = gain


def repeated_batch(rows: int = 8, half: int = 14, seed: int = 0) -> Batch:
    """The first token, random ones, and the same again; with images, which the model does not look at."""
    config, g = planted_config(), torch.Generator().manual_seed(seed)
    random = torch.randint(3, config.vocab_size, (rows, half), generator=g)
    tokens = torch.cat([torch.full((rows, 1), BOS), random, random], 1)
    length = tokens.shape[1]
    return Batch(
        tokens=tokens,
        targets=torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=2),
        segments=torch.ones(rows, length, dtype=torch.int32),
        positions=torch.arange(length, dtype=torch.int32).repeat(rows, 1),
        vision=torch.randn(rows, config.vision_encoder_dim, generator=g),
        has_vision=torch.ones(rows, dtype=torch.bool),
        image_ids=torch.arange(1, rows + 1),
        words=torch.full((rows,), length),
        rows=torch.arange(rows),
        valid=torch.ones(rows, dtype=torch.bool),
        packed=False,
    )
