"""The output head and the loss of the language model, a block of positions at a time: nothing holds all logits.

Shapes: N positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitmar.batch import IGNORE

# Logits held at a time. On a CPU a product of some hundred positions is near its best rate, and the logits of more
# than 32 MiB in fp32 a thread gain nothing; elsewhere enough to fill the device.
BLOCK_LOGITS_A_THREAD = 2**23
BLOCK_LOGITS_OF_A_DEVICE = 2**26


class TokenLosses(NamedTuple):
    """Cross-entropy in nats (fp32). Only `total` has a gradient."""

    total: Float[Tensor, ""]  # over all positions
    each: Float[Tensor, "N"]  # 0 where the target is IGNORE
    hits: Bool[Tensor, "N"]  # no logit is larger than the target's; False where it is IGNORE
    entropy: Float[Tensor, ""]  # of the predictions, summed over the positions with a target; 0 where not asked for


def token_losses(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "N"], entropy: bool = False
) -> TokenLosses:
    """Cross-entropy of the logits hidden weight^T. Under autocast its products run in the lower precision.

    The gradient, (softmax - target) times hidden or weight, is taken while a block's logits are there. A gradient of
    `total` scales it, which is why the positions' own losses have none.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return TokenLosses(*_TokenLosses.apply(hidden, weight, targets, dtype, entropy))  # type: ignore[misc]


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        counted = targets != IGNORE
        at = targets.clamp(min=0)[:, None]
        each = hidden.new_empty(len(hidden), dtype=torch.float32)
        hits, entropies = torch.empty_like(counted), hidden.new_zeros((), dtype=torch.float64)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        table_wanted = ctx.needs_input_grad[1]
        grad_weight = (torch.empty_like if len(hidden) else torch.zeros_like)(weight) if table_wanted else None
        with torch.autocast(hidden.device.type, enabled=False):
            rows, table = hidden.to(dtype), weight.to(dtype)
            by_logits = entropy and (grad_hidden is None or dtype != torch.float32)
            size = _block(len(hidden), weight, 2 if by_logits else 1)
            buffer = hidden.new_empty(size, len(weight), dtype=dtype)
            for block in _blocks(len(hidden), size):
                logits = torch.mm(rows[block], table.T, out=buffer[: len(rows[block])]).float()
                largest, own = logits.amax(1, keepdim=True), logits.gather(1, at[block])
                share = torch.softmax(logits, 1) if by_logits else torch.softmax(logits, 1, out=logits)
                log_total = largest - share.amax(1, keepdim=True).log()
                each[block] = (log_total - own)[:, 0]
                if by_logits:  # ln Z - sum of p x logit
                    entropies += ((log_total[:, 0] - torch.linalg.vecdot(share, logits)) * counted[block]).sum()
                hits[block] = (own == largest)[:, 0]
                if grad_hidden is not None:
                    share.scatter_add_(1, at[block], torch.full_like(own, -1))
                    gradient = share.to(dtype)
                    grad_hidden[block] = gradient @ table
                if grad_hidden is not None and grad_weight is not None:
                    masked = rows[block] * counted[block, None]
                    if dtype != grad_weight.dtype:
                        product = gradient.T @ masked
                        grad_weight.copy_(product) if block.start == 0 else grad_weight.add_(product)
                    elif block.start == 0:
                        torch.mm(gradient.T, masked, out=grad_weight)
                    else:
                        grad_weight.addmm_(gradient.T, masked)
            if grad_hidden is not None:
                ctx.save_for_backward(grad_hidden.mul_(counted[:, None]), grad_weight)
        each.masked_fill_(~counted, 0.0)
        if entropy and not by_logits:  # sum of p x logit = h W^T p, and the gradient is W^T p less the target's row
            entropies += (each - torch.linalg.vecdot(grad_hidden, hidden)).clamp(min=0).sum(dtype=torch.float64)
        hits &= counted
        entropies = entropies.float()
        ctx.mark_non_differentiable(each, hits, entropies)
        return each.sum(), each, hits, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if grad is None else grad.mul_(grads[0]) for grad in ctx.saved_tensors]
        return *scaled, None, None, None


def _block(positions: int, weight: Tensor, tables: int) -> int:
    """Positions of a block: all blocks alike, as few as the limit lets them be. `tables` of its size are held."""
    cpu = weight.device.type == "cpu"
    limit = BLOCK_LOGITS_A_THREAD * torch.get_num_threads() if cpu else BLOCK_LOGITS_OF_A_DEVICE
    most = max(1, limit // (tables * len(weight)))
    return -(-positions // max(1, -(-positions // most)))


def _blocks(positions: int, size: int) -> Iterator[slice]:
    for start in range(0, positions, max(1, size)):
        yield slice(start, min(start + size, positions))
