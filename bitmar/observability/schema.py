"""The closed list of what a run measures: one line a metric.

A name that is not in the schema cannot be logged, and every rank fills the same slots, so the reduction over ranks
needs no agreement about keys. Names with a part in braces stand for one metric for each layer, component, source or
node of the run (`schema_of`). To add a metric, add its line here and fill it in the loop (launch/wandb.md).

`python tools/metrics.py` prints the list.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from bitmar.config import COMPONENTS, ModelConfig

DEAD_SHARE = 0.01  # of the mean importance of its kind, below which a head is dead


class Reduction(Enum):
    """How the values of all ranks, and of all steps since the last log, become one number (or one array)."""

    SUM = "sum"  # added up
    MEAN = "mean"  # sum of the sums / sum of the counts: divided once, globally
    EXP_MEAN = "exp_mean"  # exp of that mean, e.g. perplexity from nats
    STD = "std"  # standard deviation over the counted numbers, from their sum and the sum of their squares
    ROOT_SUM = "root_sum"  # root of the sum, of squares: a norm
    ROOT_MEAN = "root_mean"  # root of that mean, of squares over squares: a ratio of norms
    MAX = "max"
    MIN = "min"
    SAME = "same"  # identical on all ranks by construction; rank 0's last value, not reduced
    DERIVED = "derived"  # computed on rank 0 from the others, once they are reduced


class Cadence(Enum):
    """When a metric is filled."""

    START = "start"  # once, when a run begins
    STEP = "step"  # every wandb.log_every_n_steps optimizer steps
    ATTENTION = "attention"  # at each pass of the probe set, see bitmar/probing.py
    LATENTS = "latents"  # every wandb.pca_log_interval steps, from the latents of the probe set
    VALIDATION = "validation"  # at each validation
    EVALUATION = "evaluation"  # at the validations that evaluation.every_steps or a word milestone asks more of


@dataclass(frozen=True)
class Metric:
    """One measured number.

    `name` is `Group/Name` as it stands in metrics.jsonl and wandb, `unit` the unit of the logged number. `of` names the
    axes of an array, which is not logged: plots and DERIVED metrics are made from it.
    """

    name: str
    unit: str
    reduction: Reduction
    cadence: Cadence
    meaning: str
    of: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()  # of the array, where the run is known


@dataclass(frozen=True)
class Layout:
    """What the schema's names and arrays depend on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    ranks: int = 1
    nodes: int = 1
    sources: tuple[str, ...] = ()
    matrices: tuple[str, ...] = ()  # names of the ternary matrices, see bitmar/engine/census.py
    bins: int = 0  # of histograms; 0: none are made

    @property
    def heads(self) -> dict[str, tuple[int, int]]:
        """(layers, heads) of each kind of attention."""
        m = self.model
        return {
            "Encoder": (m.encoder_layers, m.heads),
            "Decoder": (m.decoder_layers, m.heads),
            "CrossModal": (m.fusion_layers, m.heads),
            "Memory": (1, 1),
        }

    def values(self) -> dict[str, list[str]]:
        """What each placeholder stands for."""
        return {
            "encoder": [str(i) for i in range(self.model.encoder_layers)],
            "decoder": [str(i) for i in range(self.model.decoder_layers)],
            "fusion": [str(i) for i in range(self.model.fusion_layers)],
            "component": [title(name) for name in COMPONENTS],
            "ternary": [title(name) for name in TERNARY],
            "kind": list(self.heads),
            "text": ["Encoder", "Decoder"],
            "source": list(self.sources),
            "node": [str(i) for i in range(self.nodes)] if self.nodes > 1 else [],
        }

    def sizes(self) -> dict[str, int]:
        """The length of each axis of an array; of the axes of heads by kind."""
        sizes = {"ranks": self.ranks, "matrices": len(self.matrices), "bins": self.bins}
        for kind, (layers, heads) in self.heads.items():
            sizes |= {f"{kind} layers": layers, f"{kind} heads": heads}
        return sizes


TERNARY = ("encoder", "vision", "fusion", "memory", "decoder")  # components that have ternary weights
LATENTS = ("Text", "Vision", "Episode")
LOSS_NAMES = {"lm": "LM", "contrastive": "Contrastive", "recall": "Recall"}
PARTS = ("Data", "Forward", "Backward", "Update", "Logging", "Checkpoint")  # of a step's time

_SUM, _MEAN, _EXP_MEAN, _STD = Reduction.SUM, Reduction.MEAN, Reduction.EXP_MEAN, Reduction.STD
_ROOT_SUM, _ROOT_MEAN, _DERIVED = Reduction.ROOT_SUM, Reduction.ROOT_MEAN, Reduction.DERIVED
_MAX, _MIN, _SAME = Reduction.MAX, Reduction.MIN, Reduction.SAME
_STEP, _VALIDATION, _START = Cadence.STEP, Cadence.VALIDATION, Cadence.START
_ATTENTION, _LATENTS, _EVALUATION = Cadence.ATTENTION, Cadence.LATENTS, Cadence.EVALUATION

# The one metric every line carries: the axis of all others.
STEP_METRIC = "Training/Step"
OF_SEVERAL_LOGS = {  # (unit) what has an epoch's mean and a trend
    "Training/Loss": "nats/token",
    "Training/Loss_LM": "nats/token",
    "Training/Loss_Contrastive": "nats/row",
    "Training/Loss_Recall": "loss/episode",
    "Training/Token_Accuracy": "fraction",
}


def title(component: str) -> str:
    """A component as it stands in names."""
    return component.capitalize()


_TRAINING = (
    Metric("Training/Loss", "nats/token", _MEAN, _STEP, "the weighted objective that is minimised"),
    Metric("Training/Loss_LM", "nats/token", _MEAN, _STEP, "next-token cross-entropy"),
    Metric("Training/Loss_Contrastive", "nats/row", _MEAN, _STEP, "InfoNCE between text and image"),
    Metric("Training/Loss_Recall", "loss/episode", _MEAN, _STEP, "recall of episodes from one modality"),
    Metric("Training/Loss_Share_LM", "fraction", _MEAN, _STEP, "part of the objective, its weight counted"),
    Metric("Training/Loss_Share_Contrastive", "fraction", _MEAN, _STEP, "part of the objective, its weight counted"),
    Metric("Training/Loss_Share_Recall", "fraction", _MEAN, _STEP, "part of the objective, its weight counted"),
    Metric("Training/Learning_Rate", "1", _SAME, _STEP, "rate of the schedule at this step"),
    Metric("Training/Weight_Decay", "1", _SAME, _STEP, "decay of the schedule at this step"),
    Metric("Training/Epoch", "epochs", _SAME, _STEP, "of the source that the phase reads most often"),
    Metric(STEP_METRIC, "steps", _SAME, _STEP, "optimizer steps since the run began"),
    Metric("Training/Phase", "index", _SAME, _STEP, "place of the phase in the recipe's list, from 0"),
    Metric("Training/Words", "words", _SAME, _STEP, "words trained since the run began, each pass counted"),
    Metric("Training/Batch_Size", "samples", _SAME, _STEP, "global batch: samples an optimizer step"),
    Metric("Training/Token_Accuracy", "fraction", _MEAN, _STEP, "no token likelier than the right one"),
    Metric("Training/Perplexity", "1", _EXP_MEAN, _STEP, "exp of Training/Loss_LM"),
    Metric("Training/Prediction_Entropy", "nats/token", _MEAN, _STEP, "of the predictions, at the log's last step"),
    Metric("Training/Skipped_Updates", "steps", _SAME, _STEP, "updates left out for a loss or gradient not finite"),
    *(
        metric
        for name, unit in OF_SEVERAL_LOGS.items()
        for metric in (
            Metric(f"{name}_Epoch_Mean", unit, _DERIVED, _STEP, f"mean of {name} over the epoch's steps so far"),
            Metric(
                f"{name}_Trend",
                f"{unit}/1000 steps",
                _DERIVED,
                _STEP,
                f"slope of {name} over the last 20 logs of the phase, by least squares",
            ),
        )
    ),
    Metric("Training/Validation_Ratio", "1", _DERIVED, _VALIDATION, "Validation/Loss over the last Training/Loss_LM"),
)
_VALIDATIONS = (
    Metric("Validation/Loss", "nats/token", _MEAN, _VALIDATION, "held-out captions, right image"),
    Metric("Validation/Perplexity", "1", _EXP_MEAN, _VALIDATION, "exp of Validation/Loss"),
    Metric("Validation/Token_Accuracy", "fraction", _MEAN, _VALIDATION, "no token likelier than the right one"),
    Metric("Validation/Loss_Shuffled_Vision", "nats/token", _MEAN, _VALIDATION, "the same, another's image"),
    Metric("Validation/Vision_Gain", "nats/token", _MEAN, _VALIDATION, "shuffled vision minus right vision"),
    Metric("Validation/Loss_Memory_Off", "nats/token", _MEAN, _VALIDATION, "captions, with an empty memory"),
    Metric("Validation/Memory_Gain", "nats/token", _MEAN, _VALIDATION, "memory off minus memory on"),
    Metric("Validation/Loss_Shuffled_Memory", "nats/token", _MEAN, _VALIDATION, "each key with another's value"),
    Metric("Validation/Memory_Gain_Shuffled", "nats/token", _MEAN, _VALIDATION, "shuffled memory minus memory on"),
    Metric("Validation/Loss_Text", "nats/token", _MEAN, _VALIDATION, "held-out text records"),
    Metric(
        "Validation/Retrieval_R1",
        "fraction",
        _SAME,
        _VALIDATION,
        "captions whose own image is the nearest of a fixed pool of 256 pairs, or of all where fewer are held out",
    ),
    Metric("Validation/Loss_No_Vision", "nats/token", _MEAN, _EVALUATION, "the same captions, without an image"),
    Metric("Validation/Loss_Unrounded", "nats/token", _MEAN, _EVALUATION, "weights and activations as they are"),
    Metric("Validation/Rounding_Cost", "nats/token", _MEAN, _EVALUATION, "Validation/Loss minus the loss unrounded"),
    *(
        Metric(f"Validation/{way}_{figure}", unit, _SAME, _EVALUATION, f"{meaning}, over all held-out pairs")
        for way, what in (("Image_To_Text", "images whose caption"), ("Text_To_Image", "captions whose image"))
        for figure, unit, meaning in (
            *((f"R{depth}", "fraction", f"{what} is among the {depth} nearest") for depth in (1, 5, 10)),
            ("Median_Rank", "rank", f"the place of the right one for half of the {what.split()[0]}"),
        )
    ),
)
_MEMORY = (
    Metric("Memory/Usage_Mean", "read mass", _SAME, _STEP, "read mass of a slot since it began, mean over slots"),
    Metric("Memory/Usage_Entropy", "nats", _SAME, _STEP, "of the read mass over the slots; ln K where all are alike"),
    Metric("Memory/Active_Slots_Percentage", "%", _SAME, _STEP, "slots that hold an episode"),
    Metric("Memory/Age_Mean", "steps", _SAME, _STEP, "steps since a written slot was read or written, mean"),
    Metric("Memory/Age_Max", "steps", _SAME, _STEP, "steps since a written slot was read or written, most"),
    Metric("Memory/Writes", "episodes/step", _MEAN, _STEP, "episodes written in a step"),
    Metric("Memory/Blends", "episodes/step", _MEAN, _STEP, "of those, blended into a slot of the same image"),
    Metric("Memory/Evictions", "episodes/step", _MEAN, _STEP, "of those, put in place of another episode"),
    Metric("Memory/Write_Norm", "1", _SAME, _STEP, "norm of the slots last written, mean"),
    Metric("Memory/Read_Norm", "1", _MEAN, _ATTENTION, "norm of the value that a position reads, mean"),
    Metric("Memory/Read_Entropy", "nats", _MEAN, _ATTENTION, "of a position's read weights over the slots, mean"),
    Metric("Memory/Analysis_Avg_Similarity", "cosine", _SAME, _STEP, "between the values of two written slots, mean"),
    Metric("Memory/Top_5_Slot_Access", "fraction", _SAME, _STEP, "read mass of the five slots that were read most"),
    Metric("Memory/Gate_Mean", "1", _MEAN, _STEP, "gate of the memory read, mean"),
    Metric("Memory/Recall_Cosine_Image", "cosine", _MEAN, _STEP, "episode against what its image alone recalls"),
    Metric("Memory/Recall_Cosine_Text", "cosine", _MEAN, _STEP, "episode against what its text alone recalls"),
)
_ATTENTIONS = (
    Metric("Attention/Encoder_layer_{encoder}_Entropy", "nats", _DERIVED, _ATTENTION, "over the keys, mean over heads"),
    Metric("Attention/Decoder_layer_{decoder}_Entropy", "nats", _DERIVED, _ATTENTION, "over the keys, mean over heads"),
    Metric("Attention/CrossModal_layer_{fusion}_Entropy", "nats", _DERIVED, _ATTENTION, "over vision tokens, mean"),
    Metric("Attention/Memory_Mean", "1", _MEAN, _ATTENTION, "weight of a written slot, mean"),
    Metric("Attention/Memory_Entropy", "nats", _DERIVED, _ATTENTION, "over the slots and the null slot, mean"),
    Metric("Attention/{kind}_Concentration", "fraction", _DERIVED, _ATTENTION, "mass on the top tenth of the keys"),
    Metric("Attention/{text}_First_Token_Mass", "fraction", _DERIVED, _ATTENTION, "mass on the first key"),
    Metric(
        "Attention/Dead_Heads",
        "heads",
        _DERIVED,
        _ATTENTION,
        f"importance below {100 * DEAD_SHARE:g} % of the mean of its kind",
    ),
    Metric("Attention/Head_Importance_{kind}_Mean", "nats", _DERIVED, _ATTENTION, "|gradient| of a head's gate, mean"),
    Metric("Attention/Head_Importance_{kind}_Max", "nats", _DERIVED, _ATTENTION, "|gradient| of a head's gate, most"),
    *(
        Metric(
            f"Attention/Heads_{{{of}}}_{figure}",
            unit,
            _MEAN,
            _ATTENTION,
            meaning,
            (f"{{{of}}} layers", f"{{{of}}} heads"),
        )
        for of, figure, unit, meaning in (
            ("kind", "Importance", "nats", "|gradient of a sample's loss by a gate of 1 on the head's output|"),
            ("kind", "Entropy", "nats", "over the keys"),
            ("kind", "Concentration", "fraction", "mass on the top tenth of the keys"),
            ("text", "Distance", "positions", "from query to key"),
            ("text", "First_Token", "fraction", "mass on the first key"),
        )
    ),
)
_FEATURES = (
    *(
        metric
        for latent in LATENTS
        for metric in (
            Metric(f"Features/{latent}_Mean", "1", _MEAN, _STEP, "of the latents' numbers"),
            Metric(f"Features/{latent}_Std", "1", _STD, _STEP, "of the latents' numbers"),
            Metric(f"Features/{latent}_Min", "1", _MIN, _STEP, "of the latents' numbers"),
            Metric(f"Features/{latent}_Max", "1", _MAX, _STEP, "of the latents' numbers"),
            Metric(f"Features/{latent}_Norm", "1", _MEAN, _STEP, "of a caption's latent, mean"),
            Metric(f"Features/{latent}_Effective_Rank", "1", _SAME, _LATENTS, "exp of the singular values' entropy"),
        )
    ),
    Metric("Features/CrossModal_Similarity", "cosine", _SAME, _LATENTS, "a caption and its own image, mean"),
    Metric("Features/CrossModal_Similarity_Unmatched", "cosine", _SAME, _LATENTS, "a caption, another's image, mean"),
    Metric("Features/CrossModal_Similarity_Margin", "cosine", _SAME, _LATENTS, "the one minus the other"),
    Metric("Features/Source_Consistency", "cosine", _SAME, _LATENTS, "text latents of different sources, mean"),
    Metric("Features/Vision_Reconstruction_MSE", "1", _SAME, _LATENTS, "image vector from the other probes' episodes"),
    Metric("Features/Vision_Reconstruction_L1", "1", _SAME, _LATENTS, "the same, mean absolute error"),
)
_QUANTIZATION = (
    Metric("Quantization/WeightScale_{ternary}", "1", _DERIVED, _STEP, "gamma, mean over the weights"),
    Metric("Quantization/Sparsity_{ternary}", "fraction", _DERIVED, _STEP, "weights that round to 0"),
    Metric("Quantization/Plus_{ternary}", "fraction", _DERIVED, _STEP, "weights that round to 1"),
    Metric("Quantization/Minus_{ternary}", "fraction", _DERIVED, _STEP, "weights that round to -1"),
    Metric(
        "Quantization/Flips_{ternary}", "fraction", _MEAN, _STEP, "of a fixed 1 in 16, changed since the last census"
    ),
    Metric("Quantization/Activation_Zero_{ternary}", "fraction", _MEAN, _ATTENTION, "activations that round to 0"),
    Metric("Quantization/Activation_Error_{ternary}", "1", _ROOT_MEAN, _ATTENTION, "RMS of the rounding over RMS"),
    Metric("Quantization/Bits_Per_Weight", "bits", _DERIVED, _STEP, "entropy of the ternary values"),
    Metric("Quantization/Compression_Ratio", "1", _SAME, _START, "fp32 over 2 bits a weight and a scale a matrix"),
    Metric("Quantization/Matrix_Scale", "1", _SAME, _STEP, "gamma of each matrix", ("matrices",)),
    Metric("Quantization/Matrix_Zeros", "weights", _SUM, _STEP, "weights of a matrix that round to 0", ("matrices",)),
    Metric("Quantization/Matrix_Plus", "weights", _SUM, _STEP, "weights of a matrix that round to 1", ("matrices",)),
    Metric("Quantization/Matrix_Size", "weights", _SUM, _STEP, "weights of a matrix", ("matrices",)),
)
_GRADIENTS = (
    Metric("Gradients/Total_Norm", "1", _MEAN, _STEP, "global gradient norm before the clip, mean of steps"),
    Metric("Gradients/Total_Norm_Max", "1", _MAX, _STEP, "the same, of the step where it was largest"),
    Metric("Gradients/Total_Mean", "1", _MEAN, _STEP, "of all gradient numbers, at the log's last step"),
    Metric("Gradients/Total_Std", "1", _STD, _STEP, "of all gradient numbers, at the log's last step"),
    Metric("Gradients/Total_Max", "1", _MAX, _STEP, "largest |gradient|, at the log's last step"),
    Metric("Gradients/{component}_Norm", "1", _ROOT_SUM, _STEP, "before the clip, at the log's last step"),
    Metric("Gradients/{component}_Mean", "1", _MEAN, _STEP, "before the clip, at the log's last step"),
    Metric("Gradients/{component}_Std", "1", _STD, _STEP, "before the clip, at the log's last step"),
    Metric("Gradients/{component}_Max", "1", _MAX, _STEP, "largest |gradient|, at the log's last step"),
    Metric("Gradients/Update_To_Weight", "1", _ROOT_MEAN, _STEP, "norm of the step's update over that of the weights"),
    Metric("Gradients/{component}_Update_To_Weight", "1", _ROOT_MEAN, _STEP, "the same of a component"),
    Metric("Gradients/Clipped_Fraction", "fraction", _MEAN, _STEP, "share of steps with a clipped gradient"),
    Metric("Gradients/Histogram_{component}", "numbers", _SUM, _STEP, "of the gradient, before the clip", ("bins",)),
    Metric("Gradients/NonFinite_Count", "numbers", _SUM, _STEP, "gradient numbers not finite, at the log's last step"),
)
_MODEL = (
    Metric("Model/Histogram_{component}", "numbers", _SUM, _STEP, "of the weights (wandb.log_histograms)", ("bins",)),
    Metric("Model/Parameters_{component}", "parameters", _SAME, _START, "of the component"),
    Metric("Model/Parameters_Total", "parameters", _SAME, _START, "of all components"),
    Metric("Model/Size_MB_Full", "MB", _SAME, _START, "all parameters in fp32"),
    Metric("Model/Size_MB_Packed", "MB", _SAME, _START, "ternary weights in 2 bits, the rest in bf16"),
    Metric("Model/Compression_Ratio", "1", _SAME, _START, "full size over packed size"),
)
_THROUGHPUT = (
    Metric("Throughput/Samples_Per_Second", "samples/s", _SUM, _STEP, "sum of the ranks' own rates"),
    Metric("Throughput/Words_Per_Second", "words/s", _SUM, _STEP, "sum of the ranks' own rates"),
    Metric("Throughput/Tokens_Per_Second", "tokens/s", _SUM, _STEP, "real tokens, sum of the ranks' own rates"),
    Metric("Throughput/Padded_Tokens_Per_Second", "tokens/s", _SUM, _STEP, "with padding, sum of the ranks' own rates"),
    Metric("Throughput/Samples_Per_Second_Per_GPU", "samples/s", _DERIVED, _STEP, "of one rank, mean"),
    Metric("Throughput/Words_Per_Second_Per_GPU", "words/s", _DERIVED, _STEP, "of one rank, mean"),
    Metric("Throughput/Tokens_Per_Second_Per_GPU", "tokens/s", _DERIVED, _STEP, "of one rank, mean"),
    Metric("Throughput/Padded_Tokens_Per_Second_Per_GPU", "tokens/s", _DERIVED, _STEP, "of one rank, mean"),
    Metric("Throughput/Step_Seconds", "s", _MEAN, _STEP, "time of an optimizer step"),
    *(
        Metric(f"Throughput/{part}_Seconds", "s", _MEAN, _STEP, meaning)
        for part, meaning in zip(
            PARTS,
            (
                "of it, waiting for the batch",
                "of it, forward passes and losses",
                "of it, backward passes and the reduction of gradients",
                "of it, the update, its census and the memory",
                "a step's statistics, and beside it the log before, with its probes",
                "beside it, held by checkpoints since the log before",
            ),
            strict=True,
        )
    ),
    Metric("Throughput/TFLOPs", "TFLOP/s", _SUM, _STEP, "model FLOPs of real tokens, bitmar/model/flops.py"),
    Metric("Throughput/MFU", "fraction", _DERIVED, _STEP, "the same over the devices' peak (wandb.device_tflops)"),
    Metric("Throughput/Slowest_Rank", "rank", _DERIVED, _STEP, "with most time in data and forward pass"),
    Metric("Throughput/Rank_Imbalance", "1", _DERIVED, _STEP, "most of that time over the median rank's"),
    Metric("Throughput/Rank_Seconds", "s", _SUM, _STEP, "time in data and forward pass, by rank", ("ranks",)),
)
_SYSTEM = (
    Metric("System/GPU_Memory_Allocated", "bytes", _MAX, _STEP, "now allocated; absent without a GPU"),
    Metric("System/GPU_Memory_Reserved", "bytes", _MAX, _STEP, "held by torch's allocator; absent without a GPU"),
    Metric("System/GPU_Memory_Peak", "bytes", _MAX, _STEP, "peak of the run; absent without a GPU"),
    Metric("System/GPU_Memory_Percent", "%", _MAX, _STEP, "of the device that is in use; absent without a GPU"),
    Metric("System/GPU_Utilization_Max", "%", _MAX, _STEP, "of the busiest device; absent without a GPU"),
    Metric("System/GPU_Utilization_Mean", "%", _MEAN, _STEP, "mean of the devices; absent without a GPU"),
    Metric("System/CPU_Percent", "%", _MAX, _STEP, "of one core, of the busiest rank's process"),
    Metric("System/Memory_RSS", "bytes", _MAX, _STEP, "resident memory of the largest rank"),
    Metric("System/Open_Files", "files", _MAX, _STEP, "file descriptors of the rank with most"),
    Metric("System/Disk_Free", "bytes", _MIN, _STEP, "of the file system that holds the run"),
    Metric("System/Node_{node}_Memory_RSS", "bytes", _SUM, _STEP, "resident memory of the node's ranks together"),
    Metric("System/Node_{node}_CPU_Percent", "%", _SUM, _STEP, "of one core, of the node's ranks together"),
    Metric("System/Node_{node}_Open_Files", "files", _MAX, _STEP, "file descriptors of the node's rank with most"),
    Metric("System/Node_{node}_Disk_Free", "bytes", _MIN, _STEP, "of the file system that holds the run, seen there"),
    Metric("System/Node_{node}_GPU_Memory_Peak", "bytes", _MAX, _STEP, "of its ranks; absent without a GPU"),
    Metric("System/Node_{node}_GPU_Utilization_Max", "%", _MAX, _STEP, "of its devices; absent without a GPU"),
    Metric("System/Node_{node}_GPU_Memory_Percent", "%", _MAX, _STEP, "of its fullest device; absent without a GPU"),
)
_DATA = (
    Metric("Data/Wait_Seconds", "s", _MEAN, _STEP, "time a step waits for its batch"),
    Metric("Data/Padding_Efficiency", "fraction", _MEAN, _STEP, "real tokens / token slots"),
    Metric("Data/Damaged_Samples", "samples", _SAME, _STEP, "damaged samples met by any rank so far"),
    Metric("Data/Epoch_Progress", "fraction", _SAME, _STEP, "of the present epoch"),
    Metric("Data/Source_Share_{source}", "fraction", _MEAN, _STEP, "of the samples since the last log"),
)
TEMPLATES: tuple[Metric, ...] = (
    *(*_TRAINING, *_VALIDATIONS, *_MEMORY, *_ATTENTIONS, *_FEATURES, *_QUANTIZATION),
    *(*_GRADIENTS, *_MODEL, *_THROUGHPUT, *_SYSTEM, *_DATA),
)
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_OF_A_RUN = frozenset(("encoder", "decoder", "fusion", "source", "node"))  # placeholders with other values in each run


def schema_of(layout: Layout) -> tuple[Metric, ...]:
    """Every metric of a run. An array without elements is left out."""
    values, sizes = layout.values(), layout.sizes()
    metrics = [metric for template in TEMPLATES for metric in _filled(template, values)]
    shaped = [replace(metric, shape=tuple(sizes[axis] for axis in metric.of)) for metric in metrics]
    return tuple(metric for metric in shaped if 0 not in metric.shape)


def _filled(template: Metric, values: Mapping[str, list[str]]) -> Iterator[Metric]:
    """A template with each value of its placeholders."""
    keys = _PLACEHOLDER.findall(template.name)
    for chosen in itertools.product(*(values[key] for key in keys)):
        given = dict(zip(keys, chosen, strict=True))
        of = tuple(_fill(axis, given) for axis in template.of)
        yield replace(template, name=_fill(template.name, given), of=of)


def charts() -> tuple[tuple[Metric, str | None], ...]:
    """(metric, None) of each metric that has a name whatever the run, and (template, pattern of its names) of those
    with one for each layer, source or node, which go into one chart. Arrays are left out."""
    fixed, found = Layout().values(), list[tuple[Metric, str | None]]()
    for template in TEMPLATES:
        keys = _PLACEHOLDER.findall(template.name)
        if template.of:
            continue
        if _OF_A_RUN.isdisjoint(keys):
            found += [(metric, None) for metric in _filled(template, fixed)]
        else:
            found.append((template, f"^{_PLACEHOLDER.sub('.+', template.name)}$"))
    return tuple(found)


def _fill(text: str, given: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: given.get(match.group(1), match.group(0)), text)


def find(name: str) -> Metric | None:
    """The line of the list that a logged name stands for, with that name; None where there is none."""
    plain = [template for template in TEMPLATES if template.name == name]
    for template in plain or TEMPLATES:
        pattern = _PLACEHOLDER.sub("@", template.name)
        if re.fullmatch(re.escape(pattern).replace("@", ".+"), name):
            return replace(template, name=name)
    return None


def select(schema: Iterable[Metric], *cadences: Cadence) -> tuple[Metric, ...]:
    """The metrics of some cadences, in the schema's order."""
    return tuple(metric for metric in schema if metric.cadence in cadences)


# What is logged of a model of the default sizes on one rank
SCHEMA = tuple(metric for metric in schema_of(Layout()) if not metric.of)
