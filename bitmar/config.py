"""The run's configuration: frozen dataclasses, filled from YAML and dotted overrides, checked when built.

Every number of a run has one owner. This file (and the recipe that fills it) owns batch sizes, rates,
clip, precision and the model; `ds_configs/*.json` own the ZeRO stage, offload and communication.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from bitmar.config_checks import ConfigError, not_negative, positive, require
from bitmar.model_config import ModelConfig
from bitmar.watch_config import AttentionAnalysisConfig, WandbConfig

COMPONENTS = ("embedding", "encoder", "vision", "fusion", "memory", "decoder")
LOSSES = ("lm", "contrastive", "recall")


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"
    directory: str = "runs"
    seed: int = 1

    def __post_init__(self) -> None:
        require(
            bool(self.name) and "/" not in self.name and not self.name.startswith("."),
            f"run.name must be a plain folder name, got {self.name!r}",
        )
        require(0 <= self.seed < 2**31, f"run.seed must lie in [0, 2^31), got {self.seed}")


@dataclass(frozen=True)
class DataConfig:
    shards: str  # a folder, or the URL of one (http, https, s3, gs)
    row_tokens: int = 256  # positions of a row; longer records go on in the next row
    words_limit: int = 100_000_000  # BabyLM: words the training split may hold
    prefetch_steps: int = 2
    window_shards: int = 16  # samples are shuffled within windows of so many shards
    pack_captions: bool = False  # several captions a row, each with its image; False: one a row, in length buckets
    partitions: int = 1  # canonical parts of the shards, so that a node reads only its own
    damage_ceiling: float = 1.0e-4  # damaged samples (checksum fails) above this share end the run
    cache_directory: str | None = None  # where shards of a URL are kept; None: the user's cache folder
    cache_gib: float | None = None  # limit of that folder; None: none

    def __post_init__(self) -> None:
        positive("data", self, "row_tokens", "words_limit", "prefetch_steps", "window_shards", "partitions")
        require(
            self.cache_gib is None or self.cache_gib > 0,
            f"data.cache_gib must be > 0, got {self.cache_gib}",
        )
        require(0 <= self.damage_ceiling <= 1, f"data.damage_ceiling must lie in [0, 1], got {self.damage_ceiling}")


@dataclass(frozen=True)
class PhaseConfig:
    """One phase: what it reads, how long, what it optimises. Exactly one of epochs, words, steps."""

    name: str
    mix: dict[str, float]
    losses: dict[str, float]
    train: tuple[str, ...] = COMPONENTS
    write_memory: bool = False
    epochs: float | None = None
    words: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        where = f"phases[{self.name}]"
        given = [n for n in ("epochs", "words", "steps") if getattr(self, n) is not None]
        require(len(given) == 1, f"{where} needs exactly one of epochs, words, steps, got {given or 'none'}")
        length = getattr(self, given[0])
        require(length > 0, f"{where}.{given[0]} must be > 0, got {length}")
        require(
            bool(self.mix) and all(w > 0 for w in self.mix.values()),
            f"{where}.mix must give each source a weight > 0, got {self.mix}",
        )
        for name, weight in self.losses.items():
            require(name in LOSSES, f"{where}.losses: unknown loss {name!r}, one of {', '.join(LOSSES)}")
            require(weight >= 0, f"{where}.losses.{name} must be >= 0, got {weight}")
        require(
            self.losses.get("lm", 0) > 0,
            f"{where}.losses.lm must be > 0: every phase trains the language model",
        )
        for name in self.train:
            require(
                name in COMPONENTS,
                f"{where}.train: unknown component {name!r}, one of {', '.join(COMPONENTS)}",
            )
        require(bool(self.train), f"{where}.train is empty: nothing would be trained")
        require(
            self.losses.get("recall", 0) == 0 or "memory" in self.train,
            f"{where}.losses.recall trains the memory, which {where}.train leaves out: add it, or remove the loss",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """The two-stage schedule of the 1.58-bit recipe (see bitmar/engine/schedule.py)."""

    peak_rate: float = 1.5e-3
    second_rate: float = 1.0e-3  # the peak from half way on
    final_rate: float = 0.0
    warmup_steps: int = 375
    weight_decay: float = 0.1  # 0 from half way on
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1.0e-8

    def __post_init__(self) -> None:
        positive("optimizer", self, "peak_rate", "second_rate", "eps")
        not_negative("optimizer", self, "final_rate", "warmup_steps", "weight_decay")
        lowest = min(self.peak_rate, self.second_rate)
        require(self.final_rate <= lowest, f"optimizer.final_rate must be <= {lowest}, got {self.final_rate}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} must lie in [0, 1), got {value}")


@dataclass(frozen=True)
class TrainingConfig:
    global_batch: int = 64  # rows an optimizer step, over all ranks
    micro_batch: int = 32  # rows of a rank's forward pass, at most: many ranks may have fewer
    gradient_clip: float = 1.0
    max_epochs: int = 10  # BabyLM: how often a source may be read over the whole run
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    max_steps: int | None = None  # stop early after so many optimizer steps in all

    def __post_init__(self) -> None:
        positive("training", self, "global_batch", "micro_batch", "gradient_clip", "max_epochs")
        require(
            self.max_steps is None or self.max_steps > 0,
            f"training.max_steps must be > 0, got {self.max_steps}",
        )


@dataclass(frozen=True)
class EngineConfig:
    ds_config: str = "ds_configs/zero1.json"
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile; not under ZeRO-3
    threads_per_rank: int | None = None  # CPU threads; None: cores divided by the machine's ranks
    bind_to_cores: bool = True  # ranks that compute on a CPU, and what they start: each to its share of the cores
    timeout_s: int = 1800  # a collective that takes longer ends the run

    def __post_init__(self) -> None:
        positive("engine", self, "timeout_s")
        require(
            self.threads_per_rank is None or self.threads_per_rank > 0,
            f"engine.threads_per_rank must be > 0, got {self.threads_per_rank}",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 500
    keep_last: int = 2
    keep_best: int = 0  # by Validation/Loss, besides the last ones
    # words seen at which one is made and kept for ever; true: BabyLM's, 1M..10M, 20M..100M, 200M..1000M
    word_milestones: bool | tuple[int, ...] = False
    resume: str = "auto"  # auto | never | a checkpoint's folder

    def __post_init__(self) -> None:
        positive("checkpoint", self, "every_steps", "keep_last")
        not_negative("checkpoint", self, "keep_best")
        counts = () if isinstance(self.word_milestones, bool) else self.word_milestones
        require(
            all(count > 0 for count in counts),
            f"checkpoint.word_milestones must be > 0, got {list(counts)}",
        )
        require(bool(self.resume), "checkpoint.resume must be auto, never or a checkpoint's folder, got ''")


@dataclass(frozen=True)
class FaultsConfig:
    """What a run does about losses that are not finite or spike, and about hangs (see bitmar/engine/faults.py)."""

    max_skipped_in_a_row: int = 5  # updates left out for a loss or gradient that is not finite; so many end the run
    hang_timeout_s: float = 900.0  # a rank that gets nothing done for so long after the start ends the run; 0: never
    spike_factor: float = 0.0  # a loss above so many medians of the window is undone by going back; 0: never
    spike_window: int = 64  # steps
    spike_skip_steps: int = 2  # left out after going back: the step whose loss spiked, and those before it
    spike_max_rewinds: int = 3  # over the whole run

    def __post_init__(self) -> None:
        positive("faults", self, "max_skipped_in_a_row", "spike_window", "spike_skip_steps", "spike_max_rewinds")
        not_negative("faults", self, "hang_timeout_s")
        require(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"faults.spike_factor must be 0 (off) or > 1, got {self.spike_factor}",
        )


@dataclass(frozen=True)
class ValidationConfig:
    every_steps: int = 250
    max_samples: int = 1024
    micro_batch: int = 32

    def __post_init__(self) -> None:
        positive("validation", self, "every_steps", "max_samples", "micro_batch")


@dataclass(frozen=True)
class EvaluationConfig:
    """Beside a validation: captions without their images, retrieval over all held-out pairs, what rounding costs."""

    every_steps: int = 0  # 0: never; otherwise also at checkpoint.word_milestones

    def __post_init__(self) -> None:
        not_negative("evaluation", self, "every_steps")


@dataclass(frozen=True)
class Config:
    data: DataConfig
    phases: tuple[PhaseConfig, ...]
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    attention_analysis: AttentionAnalysisConfig = field(default_factory=AttentionAnalysisConfig)

    def __post_init__(self) -> None:
        t, m, micro = self.training, self.model, self.micro_batch(1)
        require(bool(self.phases), "phases is empty: give at least one phase")
        require(
            t.global_batch % micro == 0,
            f"training.global_batch {t.global_batch} must be a multiple of training.micro_batch {micro}",
        )
        fits = micro % m.contrastive_group == 0 or m.contrastive_group % micro == 0
        require(
            not self._asks_for("contrastive") or fits,
            f"model.contrastive_group {m.contrastive_group} must divide training.micro_batch {micro} "
            "or be a multiple of it",
        )
        require(
            t.global_batch % self.data.partitions == 0,
            f"training.global_batch {t.global_batch} must be a multiple of data.partitions {self.data.partitions}",
        )
        self._check_groups(micro)
        for name in ("probe_samples", "latent_samples"):
            given, most = getattr(self.wandb, name), max(2, t.global_batch // 4)
            require(
                given is None or given <= most,
                f"wandb.{name} must be <= {most}, a quarter of training.global_batch, got {given}",
            )
        every, validated = self.checkpoint.every_steps, self.validation.every_steps
        require(
            self.checkpoint.keep_best == 0 or every % validated == 0,
            f"checkpoint.keep_best needs a validation at every checkpoint: checkpoint.every_steps {every} must be a "
            f"multiple of validation.every_steps {validated}",
        )
        names = [p.name for p in self.phases]
        require(len(set(names)) == len(names), f"phases need names of their own, got {names}")

    @property
    def run_directory(self) -> Path:
        return Path(self.run.directory) / self.run.name

    def check_world(self, world_size: int) -> None:
        """Refuse a batch that `world_size` ranks do not divide. Raises ConfigError."""
        t, m, micro = self.training, self.model, max(1, self.micro_batch(world_size))
        together = micro * world_size
        require(
            t.global_batch % together == 0,
            f"training.global_batch {t.global_batch} is not divided by training.micro_batch {micro} x "
            f"{world_size} ranks; a multiple of {together} would do, or another micro-batch",
        )
        require(
            not self._asks_for("contrastive") or together % m.contrastive_group == 0,
            f"model.contrastive_group {m.contrastive_group} must divide training.micro_batch {micro} x "
            f"{world_size} ranks = {together}: its rows are compared within one forward pass",
        )
        self._check_groups(micro)

    def _asks_for(self, loss: str) -> bool:
        """Whether any phase trains on a loss."""
        return any(phase.losses.get(loss, 0) > 0 for phase in self.phases)

    def _check_groups(self, micro: int) -> None:
        """Refuse groups that do not lie within the `micro` rows of a rank's forward pass. Raises ConfigError."""
        m = self.model
        require(
            not self._asks_for("contrastive") or self.data.partitions == 1 or micro % m.contrastive_group == 0,
            f"with data.partitions {self.data.partitions} a rank's rows are neighbours, so model.contrastive_group "
            f"{m.contrastive_group} must divide training.micro_batch {micro} (or a rank's share of the batch)",
        )
        require(
            not self._asks_for("recall") or micro % m.recall_group == 0,
            f"training.micro_batch {micro} (or a rank's share of the batch) must be a multiple of "
            f"model.recall_group {m.recall_group}",
        )

    def micro_batch(self, world_size: int) -> int:
        """Rows of a rank's forward pass: training.micro_batch, or its share of the global batch where that is less."""
        return min(self.training.micro_batch, self.training.global_batch // world_size)

    def accumulation_steps(self, world_size: int) -> int:
        """Forward passes of a rank in an optimizer step."""
        return self.training.global_batch // (self.micro_batch(world_size) * world_size)


def load_config(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a recipe and apply `key.path=value` overrides (values are YAML). Raises ConfigError."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist; recipes lie in launch/recipes/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"recipe {path} must be a mapping of sections, got {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    return _build(Config, raw, "")


def model_from(raw: dict[str, Any]) -> ModelConfig:
    """A model from the plain values of a recipe's section `model`. Raises ConfigError."""
    return _build(ModelConfig, raw, "model.")


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal Config."""
    plain = dataclasses.asdict(config)
    return yaml.safe_dump(_plain(plain), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one `key.path=value`; a list element is named by its index (phases.0.steps=10)."""
    path, equals, text = override.partition("=")
    require(bool(equals and path), f"override {override!r} must have the form key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML") from None
    node: Any = raw
    keys = path.split(".")
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            require(
                key.isdigit() and int(key) < len(node),
                f"override {override!r}: {key!r} is no index into {'.'.join(keys[:depth])} (0 to {len(node) - 1})",
            )
            index: Any = int(key)
        else:
            require(
                isinstance(node, dict),
                f"override {override!r}: {'.'.join(keys[:depth])} holds a single value",
            )
            index = key
            if not last and node.get(key) is None:
                node[key] = {}
        if last:
            node[index] = value
        else:
            node = node[index]


def _build(cls: type, raw: dict[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in raw:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names)}"
            raise ConfigError(f"unknown key {path}{key}{hint}")
    values: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if f.name in raw:
            values[f.name] = _convert(hints[f.name], raw[f.name], f"{path}{f.name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing key {path}{f.name}")
    return cls(**values)


def _convert(kind: Any, value: Any, path: str) -> Any:
    """Check `value` against the annotation `kind`; ints serve as floats, "1e-3" too (YAML reads it as text)."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, dict), f"{path} must be a section of keys, got {value!r}")
        return _build(typing.cast(type, kind), value, path + ".")
    if origin is Literal:
        require(value in args, f"{path} must be one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None) and (a is not bool or isinstance(value, bool))] or [bool]
        return _convert(kinds[0], value, path)
    if origin is tuple:
        require(isinstance(value, list), f"{path} must be a list, got {value!r}")
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        require(isinstance(value, dict), f"{path} must be a mapping, got {value!r}")
        return {str(k): _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{path} must be a number, got {value!r}") from None
    if kind is float and isinstance(value, float):
        require(math.isfinite(value), f"{path} must be a finite number, got {value}")
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise ConfigError(f"{path} must be {words[kind]}, got {value!r}")
    return value
