"""A dry run: everything is assembled, nothing is trained or written."""

from __future__ import annotations

from pathlib import Path

from bitmar.assembly import assemble
from bitmar.batch import Batch
from bitmar.config import Config
from bitmar.engine.ds_config import read_ds_config
from bitmar.engine.faults import Guard
from bitmar.engine.memory_plan import ZeroSettings
from bitmar.engine.world import World
from bitmar.plan import counted_phases, make_plan, table


def rehearse(config: Config, world: World, guard: Guard) -> None:
    """Assemble a run with its first batch and print what it will take; nothing is trained, nothing is written.

    Raises what `assemble` does."""
    run = assemble(config, world, guard, dry_run=True)
    steps = iter(run.loader)
    item = next(steps, None)
    batches = [Batch.from_rows(part, world.device) for part in item[1]] if item else []
    if world.is_first:
        plan = make_plan(
            config,
            ZeroSettings.of(read_ds_config(Path(config.engine.ds_config))),
            world.size,
            counted_phases(config, run.loader.order, run.shards.corpus("train")),
            device=world.device.type,
            dtype=run.engine.module.compute_dtype,
            counted=True,
        )
        print(table(plan), flush=True)
        if item:
            shape = "x".join(map(str, batches[0].tokens.shape))
            name = config.phases[item[0].phase].name
            print(f"first batch       phase {name}, {len(batches)} micro-batch(es) of {shape} positions", flush=True)
        print(f"dry run: nothing was trained or written; it would go on from step {run.progress.step}", flush=True)
    world.barrier()
