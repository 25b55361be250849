"""Losses: each a sum and a count; the division happens once, by counts summed over all ranks.

Shapes: B rows, T positions, N captions (rows, where not packed), V vocabulary, Z latent width, C episode width,
G groups, M captions of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitmar.batch import IGNORE, Batch, by_group
from bitmar.config import ModelConfig
from bitmar.engine.world import World
from bitmar.model.bitmar import Outputs

RECALL_TEMPERATURE = 0.1


@dataclass(frozen=True)
class Losses:
    """Sums over this rank's rows; `counts` of the same names come from `loss_counts`."""

    sums: dict[str, Float[Tensor, ""]]
    surprise: Float[Tensor, "N"]  # mean token loss of a caption, -inf of rows without an image


def loss_counts(batch: Batch) -> dict[str, Int[Tensor, ""]]:
    """What each loss is divided by: trained tokens, and captions with an image. Needs no forward pass."""
    pairs = batch.pair_mask.sum()
    return {"lm": (batch.targets != IGNORE).sum(), "contrastive": pairs, "recall": pairs}


def compute_losses(outputs: Outputs, batch: Batch, world: World, config: ModelConfig, wanted: set[str]) -> Losses:
    """The wanted losses of a micro-batch, as sums."""
    sums, token_loss = {"lm": outputs.loss}, outputs.token_losses
    if "contrastive" in wanted:
        sums["contrastive"] = contrastive_loss(outputs, batch, world, config.contrastive_group)
    if "recall" in wanted:
        sums["recall"] = recall_loss(outputs, batch, config.recall_group)
    with torch.no_grad():
        if batch.packing is None:
            mean = token_loss.sum(1) / (batch.targets != IGNORE).sum(1).clamp(min=1)
        else:
            mean = batch.packing.total(token_loss) / batch.packing.lengths.clamp(min=1)
        surprise = mean.masked_fill(~batch.pair_mask, float("-inf"))
    return Losses(sums, surprise)


def contrastive_loss(outputs: Outputs, batch: Batch, world: World, group: int) -> Float[Tensor, ""]:
    """InfoNCE in both directions (Radford et al. 2021, section 2.3) inside groups of consecutive captions.

    `group` consecutive global rows are a block; its captions, in order, are cut into groups of `group` (of unpacked
    rows a block is one group). A block may span ranks: each rank then computes the whole block, its own captions with
    gradient, the others' as constants, so that the sum over ranks is the gradient of one process. The value is that
    of this rank's captions. Captions of one image are never each other's negatives; one alone in its group has loss 0.
    """
    text = F.normalize(outputs.text_latent.float(), dim=-1)
    image = F.normalize(outputs.vision_latent.float(), dim=-1)
    counted, ids, block = batch.pair_mask, batch.image_ids, group
    if batch.packing is not None:
        text, image, counted, ids = (batch.packing.by_slot(x) for x in (text, image, counted, ids))
        block = group * batch.packing.slots
    mine, local = torch.ones_like(counted), len(ids)
    log_temperature = outputs.log_temperature.float()
    if local % block:  # the block spans ranks: rank r holds slots r * local to (r + 1) * local of the joint micro-batch
        sharing = block // local
        text, image = _with_others(text, world), _with_others(image, world)
        counted, ids = world.gather(counted).flatten(), world.gather(ids).flatten()
        mine = torch.zeros_like(counted)
        mine[world.rank * local : (world.rank + 1) * local] = True
        # every rank computes the blocks it takes part in: share the temperature's gradient among them
        log_temperature = log_temperature.detach() + (log_temperature - log_temperature.detach()) / sharing
    losses = _block_losses(text, image, ids, counted, log_temperature, (block, group))
    own = (losses * mine).sum()
    takes_part = mine.view(-1, block).any(1).repeat_interleave(block)
    whole = (losses * takes_part).sum()
    return whole + (own - whole).detach()


def _with_others(local: Float[Tensor, "X Z"], world: World) -> Float[Tensor, "Y Z"]:
    parts = list(world.gather(local.detach()))
    parts[world.rank] = local
    return torch.cat(parts)


def _block_losses(
    text: Float[Tensor, "X Z"],
    image: Float[Tensor, "X Z"],
    ids: Int[Tensor, "X"],
    counted: Bool[Tensor, "X"],
    log_temperature: Float[Tensor, "1"],
    sizes: tuple[int, int],
) -> Float[Tensor, "X"]:
    """Mean of the text-to-image and image-to-text losses of every caption; 0 for what does not count.

    sizes: slots of a block, captions of a group.
    """
    block, group = sizes
    text, image = text.unflatten(0, (-1, block)), image.unflatten(0, (-1, block))
    counted, ids = counted.view(-1, block), ids.view(-1, block)
    logits = log_temperature.exp() * text @ image.mT
    itself = torch.eye(block, dtype=torch.bool, device=ids.device)
    compared = counted[:, :, None] & counted[:, None, :] & (ids[:, :, None] != ids[:, None, :])
    if block > group:  # several captions a row
        turn = (counted.cumsum(1) - 1) // group
        compared &= turn[:, :, None] == turn[:, None, :]
    logits = logits.masked_fill(~(compared | itself), float("-inf"))
    own = torch.diagonal(logits, dim1=-2, dim2=-1)
    both = 0.5 * (logits.logsumexp(-1) + logits.logsumexp(-2)) - own
    return (both * counted).flatten()


def recall_loss(outputs: Outputs, batch: Batch, group: int) -> Float[Tensor, ""]:
    """How well one modality recalls its episode: cross-entropy over the group's episodes, mean of both cues.

    Logits are cosines of the recalled value with each episode of the recall group over a temperature; another
    caption of the same image is no wrong answer.
    """
    assert outputs.recalled is not None, "the forward pass ran without recall"
    groups = batch.groups(group)
    counted, ids = by_group(batch.pair_mask, groups) & (groups >= 0), by_group(batch.image_ids, groups)
    recalled = by_group(F.normalize(outputs.recalled, dim=-1), groups)  # G M 2 C
    episodes = by_group(F.normalize(outputs.episodes, dim=-1), groups)  # G M C
    logits = torch.einsum("gmqc,gnc->gmqn", recalled, episodes) / RECALL_TEMPERATURE
    itself = torch.eye(groups.shape[1], dtype=torch.bool, device=ids.device)
    compared = (counted[:, None, :] & (ids[:, :, None] != ids[:, None, :])) | itself
    logits = logits.masked_fill(~compared[:, :, None, :], float("-inf"))
    own = torch.diagonal(logits, dim1=1, dim2=3).movedim(-1, 1)  # G M 2
    return ((logits.logsumexp(-1) - own).mean(-1) * counted).sum()
