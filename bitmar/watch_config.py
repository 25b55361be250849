"""What is measured of a run, and where it is shown: the recipe's sections `wandb` and `attention_analysis`."""

from __future__ import annotations

from dataclasses import dataclass

from bitmar.config_checks import positive, require
from bitmar.head_names import KINDS

WANDB_MODES = ("online", "offline", "disabled")


@dataclass(frozen=True)
class WandbConfig:
    """What is measured, how often, and where it is shown. metrics.jsonl and, by create_plots, plots/ are made without
    wandb too."""

    enabled: bool = True  # False leaves wandb out
    offline: bool = False  # kept in the run's folder, for `wandb sync`; False: online where wandb finds a key
    mode: str | None = None  # online, offline or disabled; None: by the two above, or WANDB_MODE
    project: str = "bitmar"
    # None leaves these to wandb's own environment variables (WANDB_ENTITY, WANDB_NAME, ...); a name: run.name
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    notes: str | None = None
    resume: bool = True  # one wandb run for all starts of this run; False: each start has its own
    alerts: bool = True  # skipped updates, gradient norms out of [0.001, 10], stalls, dead heads, a full disk
    report: bool = False  # a wandb report of the run, built at its end (online)
    log_model_checkpoints: bool = False  # as wandb artifacts
    log_histograms: bool = False  # of weights and of gradients, by component
    log_interval: int | None = None  # steps between two logs that are sent to wandb; None: all that are logged
    log_every_n_steps: int = 50  # optimizer steps between two logs
    attention_log_interval: int = 100  # steps between two passes of the probe set
    pca_log_interval: int = 500  # steps between two gatherings of the probe set's latents
    probe_samples: int | None = None  # of the probe set, held out; None: a 32nd of the global batch, at least 4
    latent_samples: int | None = None  # of the set whose latents are gathered; None: a quarter of the global batch
    device_tflops: float | None = None  # peak of one device, for Throughput/MFU; None: known GPUs' own
    log_attention: bool = True
    log_memory: bool = True
    log_gradients: bool = True
    log_quantization: bool = True
    log_features: bool = True
    log_attention_maps: bool = True  # the probe captions' cross-modal attention, a picture
    log_feature_pca: bool = True  # their latents in two dimensions, a picture
    create_plots: bool = True
    plot_every_n_epochs: int = 1  # of a phase's sources; the last step is drawn in any case
    plot_losses: bool = True
    plot_memory_usage: bool = True
    plot_attention_heatmaps: bool = True
    plot_quantization_dist: bool = True
    plot_gradients: bool = True

    @property
    def makes_histograms(self) -> bool:
        """Whether anything takes them."""
        return self.log_histograms and self.enabled and self.mode != "disabled"

    def __post_init__(self) -> None:
        positive("wandb", self, "log_every_n_steps", "attention_log_interval", "pca_log_interval")
        positive("wandb", self, "plot_every_n_epochs")
        require(bool(self.project), "wandb.project must not be empty")
        require(self.mode in (None, *WANDB_MODES), f"wandb.mode must be one of {WANDB_MODES}, got {self.mode!r}")
        require(
            self.mode != "online" or (self.enabled and not self.offline),
            "wandb.mode online contradicts wandb.enabled: false and wandb.offline: true",
        )
        for name in ("log_interval", "probe_samples", "latent_samples", "device_tflops"):
            value = getattr(self, name)
            require(value is None or value > 0, f"wandb.{name} must be > 0, got {value}")
        require(
            self.log_interval is None or self.log_interval % self.log_every_n_steps == 0,
            f"wandb.log_interval {self.log_interval} must be a multiple of wandb.log_every_n_steps "
            f"{self.log_every_n_steps}",
        )


@dataclass(frozen=True)
class AttentionAnalysisConfig:
    """What RUN/attention_analysis/ gets while a run goes on, from what the heads do on the probe set
    (bitmar/observability/head_analysis.py)."""

    track_top_k: int = 10  # heads of each kind of attention in top_heads_*, and whose patterns are drawn
    log_every_n_steps: int = 100  # steps between two analyses; wandb.log_attention: false makes none at all
    viz_every_n_epochs: int = 1  # epochs of a phase's sources between two drawings of the last analysis
    save_head_patterns: bool = False  # what the top heads attend to in the first probe caption
    analyze_memory_attention: bool = True  # False: not in these files; metrics of it stay
    analyze_cross_modal: bool = True  # the same

    def __post_init__(self) -> None:
        positive("attention_analysis", self, "track_top_k", "log_every_n_steps", "viz_every_n_epochs")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attention that are analysed."""
        asked = {"memory": self.analyze_memory_attention, "cross_modal": self.analyze_cross_modal}
        return tuple(kind for kind in KINDS if asked.get(kind, True))
