"""The closed list of what a run measures: one line a metric.

A name that is not in `SCHEMA` cannot be logged, and every rank fills the same slots, so the reduction
over ranks needs no agreement about keys. To add a metric, add its line here and fill it in the loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Reduction(Enum):
    """How the values of all ranks, and of all steps since the last log, become one number."""

    SUM = "sum"  # added up
    MEAN = "mean"  # sum of the sums / sum of the counts: divided once, globally
    EXP_MEAN = "exp_mean"  # exp of that mean, e.g. perplexity from nats
    MAX = "max"
    MIN = "min"
    SAME = "same"  # identical on all ranks by construction; rank 0's last value, not reduced


class Cadence(Enum):
    """When a metric is filled."""

    STEP = "step"  # every wandb.log_every_n_steps optimiser steps
    VALIDATION = "validation"  # at each validation


@dataclass(frozen=True)
class Metric:
    """One measured number.

    `name` is `Group/Name` as it stands in metrics.jsonl and wandb, `unit` the unit of the logged number.
    """

    name: str
    unit: str
    reduction: Reduction
    cadence: Cadence
    meaning: str


_SUM, _MEAN, _EXP_MEAN = Reduction.SUM, Reduction.MEAN, Reduction.EXP_MEAN
_MAX, _SAME = Reduction.MAX, Reduction.SAME
_STEP, _VALIDATION = Cadence.STEP, Cadence.VALIDATION

# The one metric every line carries: the axis of all others.
STEP_METRIC = "Training/Step"

SCHEMA: tuple[Metric, ...] = (
    Metric("Training/Loss", "nats/token", _MEAN, _STEP, "the weighted objective that is minimised"),
    Metric("Training/Loss_LM", "nats/token", _MEAN, _STEP, "next-token cross-entropy"),
    Metric("Training/Loss_Contrastive", "nats/row", _MEAN, _STEP, "InfoNCE between text and image"),
    Metric("Training/Loss_Recall", "loss/episode", _MEAN, _STEP, "recall of episodes from one modality"),
    Metric("Training/Learning_Rate", "1", _SAME, _STEP, "rate of the schedule at this step"),
    Metric("Training/Weight_Decay", "1", _SAME, _STEP, "decay of the schedule at this step"),
    Metric("Training/Epoch", "epochs", _SAME, _STEP, "epochs of the phase's sources, with a fraction"),
    Metric(STEP_METRIC, "steps", _SAME, _STEP, "optimiser steps since the run began"),
    Metric("Training/Words", "words", _SAME, _STEP, "words trained since the run began, each pass counted"),
    Metric("Training/Phase", "index", _SAME, _STEP, "place of the phase in the recipe's list, from 0"),
    Metric("Training/Skipped_Updates", "steps", _SAME, _STEP, "updates left out for a loss or gradient not finite"),
    Metric("Training/Batch_Size", "samples", _SAME, _STEP, "global batch: samples an optimiser step"),
    Metric("Validation/Loss", "nats/token", _MEAN, _VALIDATION, "held-out captions, right image"),
    Metric("Validation/Perplexity", "1", _EXP_MEAN, _VALIDATION, "exp of Validation/Loss"),
    Metric("Validation/Loss_Shuffled_Vision", "nats/token", _MEAN, _VALIDATION, "the same, another's image"),
    Metric("Validation/Vision_Gain", "nats/token", _MEAN, _VALIDATION, "shuffled vision minus right vision"),
    Metric("Validation/Loss_Memory_Off", "nats/token", _MEAN, _VALIDATION, "captions without memory reads"),
    Metric("Validation/Loss_Text", "nats/token", _MEAN, _VALIDATION, "held-out text records"),
    Metric("Validation/Token_Accuracy", "fraction", _MEAN, _VALIDATION, "most likely token is the right one"),
    Metric("Gradients/Total_Norm", "1", _MEAN, _STEP, "global gradient norm before the clip, mean of steps"),
    Metric("Gradients/Clipped_Fraction", "fraction", _MEAN, _STEP, "share of steps with a clipped gradient"),
    Metric("Memory/Active_Slots_Percentage", "%", _SAME, _STEP, "slots that hold an episode"),
    Metric("Memory/Writes", "episodes/step", _MEAN, _STEP, "episodes written in a step"),
    Metric("Memory/Age_Mean", "steps", _SAME, _STEP, "mean steps since a slot was read or written"),
    Metric("Memory/Gate_Mean", "1", _MEAN, _STEP, "mean gate of the memory read over positions"),
    Metric("Throughput/Samples_Per_Second", "samples/s", _SUM, _STEP, "sum of the ranks' own rates"),
    Metric("Throughput/Words_Per_Second", "words/s", _SUM, _STEP, "sum of the ranks' own rates"),
    Metric("Throughput/Tokens_Per_Second", "tokens/s", _SUM, _STEP, "sum of the ranks' own rates"),
    Metric("Throughput/Step_Seconds", "s", _MEAN, _STEP, "time of an optimiser step"),
    Metric("Data/Wait_Seconds", "s", _MEAN, _STEP, "time a step waits for its batch"),
    Metric("Data/Padding_Efficiency", "fraction", _MEAN, _STEP, "real tokens / token slots"),
    Metric("Data/Damaged_Samples", "samples", _SAME, _STEP, "damaged samples met by any rank so far"),
    Metric("System/Memory_RSS", "bytes", _MAX, _STEP, "resident memory of the largest rank"),
    Metric("System/GPU_Memory_Allocated", "bytes", _MAX, _STEP, "now allocated; absent without a GPU"),
    Metric("System/GPU_Memory_Peak", "bytes", _MAX, _STEP, "peak of the run; absent without a GPU"),
)


def select(cadence: Cadence, schema: Iterable[Metric] = SCHEMA) -> tuple[Metric, ...]:
    """The metrics of one cadence, in the schema's order."""
    return tuple(metric for metric in schema if metric.cadence is cadence)


_BY_NAME = {metric.name: metric for metric in SCHEMA}


def find(name: str) -> Metric | None:
    """The metric of this name; None where the schema has none."""
    return _BY_NAME.get(name)
