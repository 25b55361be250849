"""What a run is watched with: its schema and statistics, the probe set, clocks, and where pictures are made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from bitmar.batch import Batch
from bitmar.config import Config
from bitmar.engine.census import HISTOGRAM_EDGES
from bitmar.engine.clock import StepClock
from bitmar.engine.schedule import Rates
from bitmar.engine.world import World
from bitmar.engine.zero import ZeroEngine
from bitmar.model.bitmar import Sizes
from bitmar.model.flops import Work
from bitmar.observability.board import Board
from bitmar.observability.derived import History
from bitmar.observability.probes import Caption
from bitmar.observability.schema import Cadence, Layout, schema_of, select
from bitmar.observability.stats import Statistics
from bitmar.observability.system import SystemProbe, peak_tflops
from shards.loader import LoaderState, ShardSet, ValidationSet
from shards.rows import Rows
from shards.tokenizer import token_texts


@dataclass
class Window:
    """What this rank did since the last log; `seconds` leaves out validation, checkpoints and logging."""

    steps: int = 0
    samples: int = 0
    words: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0
    work: Work = field(default_factory=Work)
    sources: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # samples of each
    written: tuple[int, ...] = ()  # slots of the last step that wrote any
    last: tuple[LoaderState, Rates] | None = None  # of the last step

    @classmethod
    def of(cls, sources: int) -> Window:
        """Of a run that reads so many sources."""
        return cls(sources=np.zeros(sources, np.int64))


@dataclass(frozen=True)
class Probes:
    """Held-out samples that are the same at every step, this rank's share of them."""

    heads: tuple[Batch, ...] = ()
    latents: tuple[Rows, ...] = ()


@dataclass
class Watch:
    """Assembled once; `statistics`, `history` and `caption` change as the run goes."""

    layout: Layout
    statistics: Statistics
    parameters: dict[str, int]  # by component
    sizes: Sizes
    probes: Probes
    clock: StepClock
    system: SystemProbe
    peak_tflops: float | None  # of one rank's device, where it is known
    history: History
    board: Board | None  # of rank 0
    caption: Caption | None = None  # of the pass that the next log tells of, where its top heads' patterns are kept


def open_watch(
    config: Config,
    shards: ShardSet,
    engine: ZeroEngine,
    model: tuple[dict[str, int], Sizes],
    world: World,
    step: int,
    files: bool,
) -> Watch:
    """`model`: its parameters by component, and its sizes; `step`: where the run goes on; `files`: whether rank 0 may
    write."""
    matrices = tuple(matrix.name for matrix in engine.matrices)
    begins = [local_rank == 0 for local_rank in world.gather_objects(world.local_rank)]  # nodes may have unequal ranks
    nodes, node = sum(begins), sum(begins[: world.rank + 1]) - 1
    bins = len(HISTOGRAM_EDGES) - 1 if config.wandb.makes_histograms else 0
    layout = Layout(config.model, world.size, nodes, shards.source_names, matrices, bins)
    cadences = (Cadence.START, Cadence.STEP, Cadence.ATTENTION, Cadence.LATENTS)
    directory, wandb = config.run_directory, config.wandb
    board = None
    if files and world.is_first:
        board = Board(directory, token_texts(shards.tokenizer), matrices, step, wandb.create_plots)
    return Watch(
        layout,
        Statistics(select(schema_of(layout), *cadences), world.device),
        *model,
        open_probes(config, shards, world),
        StepClock(world.device),
        SystemProbe(directory, world.device, node),
        wandb.device_tflops or peak_tflops(world.device, engine.module.compute_dtype),
        History.read(directory) if world.is_first else History(),
        board,
    )


def open_probes(config: Config, shards: ShardSet, world: World) -> Probes:
    """Pairs of the validation split; none where it holds no pairs."""
    wandb, batch = config.wandb, config.training.global_batch
    if "pairs" not in shards.validated:
        return Probes()

    def chosen(samples: int, even: Literal["rows", "positions"]) -> list[Rows]:
        share = -(-samples // world.size)
        micro_batch = min(share, config.micro_batch(world.size))
        return list(
            ValidationSet(
                shards,
                modality="pairs",
                micro_batch=micro_batch,
                row_tokens=config.data.row_tokens,
                max_samples=samples,
                rank=world.rank,
                world=world.size,
                even=even,
            ).batches()
        )

    few = max(2, min(4, batch // 4), batch // 32)
    # latents of all ranks are gathered, which takes equally many rows of each
    heads = chosen(wandb.probe_samples or few, "positions") if wandb.log_attention else []
    latents = chosen(wandb.latent_samples or max(2, batch // 4), "rows") if wandb.log_features else []
    return Probes(tuple(Batch.from_rows(rows, world.device) for rows in heads), tuple(latents))
