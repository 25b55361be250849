"""Losses: each a sum and a count; the division happens once, by counts summed over all ranks.

Shapes: B rows, T positions, V vocabulary, Z latent width, C episode width, G groups, M rows of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitmar.batch import IGNORE, Batch
from bitmar.config import ModelConfig
from bitmar.engine.world import World
from bitmar.model.bitmar import Outputs

RECALL_TEMPERATURE = 0.1


@dataclass(frozen=True)
class Losses:
    """Sums over this rank's rows; `counts` of the same names come from `loss_counts`."""

    sums: dict[str, Float[Tensor, ""]]
    surprise: Float[Tensor, "B"]  # mean token loss of a row with an image, -inf without


def loss_counts(batch: Batch) -> dict[str, Int[Tensor, ""]]:
    """What each loss is divided by: trained tokens, and rows with an image. Needs no forward pass."""
    pairs = batch.pair_mask.sum()
    return {"lm": (batch.targets != IGNORE).sum(), "contrastive": pairs, "recall": pairs}


def compute_losses(outputs: Outputs, batch: Batch, world: World, config: ModelConfig, wanted: set[str]) -> Losses:
    """The wanted losses of a micro-batch, as sums."""
    token_loss = token_losses(outputs.logits, batch.targets)
    sums = {"lm": token_loss.sum()}
    if "contrastive" in wanted:
        sums["contrastive"] = contrastive_loss(outputs, batch, world, config.contrastive_group)
    if "recall" in wanted:
        sums["recall"] = recall_loss(outputs, batch, config.recall_group)
    with torch.no_grad():
        trained = batch.targets != IGNORE
        mean = token_loss.sum(1) / trained.sum(1).clamp(min=1)
        surprise = mean.masked_fill(~batch.pair_mask, float("-inf"))
    return Losses(sums, surprise)


def token_losses(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Cross-entropy of each position in nats (fp32), 0 where the target is IGNORE."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view(targets.shape)


def contrastive_loss(outputs: Outputs, batch: Batch, world: World, group: int) -> Float[Tensor, ""]:
    """InfoNCE in both directions (Radford et al. 2021, section 2.3) inside groups of consecutive global rows.

    A group may span ranks: each rank then computes the whole group, its own rows with gradient, the others'
    as constants, so that the sum over ranks is the gradient of one process. The value is that of this rank's
    rows. Rows of one image are never each other's negatives; a row alone in its group has loss 0.
    """
    text = F.normalize(outputs.text_latent.float(), dim=-1)
    image = F.normalize(outputs.vision_latent.float(), dim=-1)
    counted, ids = batch.pair_mask, batch.image_ids
    mine = torch.ones_like(counted)
    log_temperature = outputs.log_temperature.float()
    if len(ids) % group:  # the group spans ranks: rank r holds rows r B to (r + 1) B of the joint micro-batch
        sharing = group // len(ids)
        text, image = _with_others(text, world), _with_others(image, world)
        counted, ids = world.gather(counted).flatten(), world.gather(ids).flatten()
        mine = torch.zeros_like(counted)
        mine[world.rank * len(batch.rows) : (world.rank + 1) * len(batch.rows)] = True
        # every rank computes the groups it takes part in: share the temperature's gradient among them
        log_temperature = log_temperature.detach() + (log_temperature - log_temperature.detach()) / sharing
    rows = _group_losses(text, image, ids, counted, log_temperature, group)
    own = (rows * mine).sum()
    takes_part = mine.view(-1, group).any(1).repeat_interleave(group)
    whole = (rows * takes_part).sum()
    return whole + (own - whole).detach()


def _with_others(local: Float[Tensor, "B Z"], world: World) -> Float[Tensor, "N Z"]:
    parts = list(world.gather(local.detach()))
    parts[world.rank] = local
    return torch.cat(parts)


def _group_losses(
    text: Float[Tensor, "N Z"],
    image: Float[Tensor, "N Z"],
    ids: Int[Tensor, "N"],
    counted: Bool[Tensor, "N"],
    log_temperature: Float[Tensor, "1"],
    group: int,
) -> Float[Tensor, "N"]:
    """Mean of the text-to-image and image-to-text losses of every row; 0 for rows that do not count."""
    text, image = text.unflatten(0, (-1, group)), image.unflatten(0, (-1, group))
    counted, ids = counted.view(-1, group), ids.view(-1, group)
    logits = log_temperature.exp() * text @ image.mT
    itself = torch.eye(group, dtype=torch.bool, device=ids.device)
    compared = counted[:, :, None] & counted[:, None, :] & (ids[:, :, None] != ids[:, None, :])
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
    counted, ids = batch.pair_mask.view(-1, group), batch.image_ids.view(-1, group)
    recalled = F.normalize(outputs.recalled, dim=-1).unflatten(0, (-1, group))  # G M 2 C
    episodes = F.normalize(outputs.episodes, dim=-1).unflatten(0, (-1, group))  # G M C
    logits = torch.einsum("gmqc,gnc->gmqn", recalled, episodes) / RECALL_TEMPERATURE
    itself = torch.eye(group, dtype=torch.bool, device=ids.device)
    compared = (counted[:, None, :] & (ids[:, :, None] != ids[:, None, :])) | itself
    logits = logits.masked_fill(~compared[:, :, None, :], float("-inf"))
    own = torch.diagonal(logits, dim1=1, dim2=3).movedim(-1, 1)  # G M 2
    return ((logits.logsumexp(-1) - own).mean(-1) * counted).sum()
