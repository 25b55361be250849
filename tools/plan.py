"""What a run will take on a cluster that is not there yet: memory of a GPU, steps, words, wall time.

    python tools/plan.py --config launch/recipes/bitmar-700m.yaml --ds ds_configs/zero2.json --gpus 64 --gpu-memory 80GB

The shards' own counts are used where the recipe's shards are there, else --words. Where the run does not fit, the
smallest changes that would do are named. Exit code 0: it fits; 1: it does not; 2: a mistake in what was asked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bitmar.assembly import open_shards
from bitmar.config import Config, ConfigError, load_config
from bitmar.engine.ds_config import read_ds_config
from bitmar.engine.memory_plan import ZeroSettings
from bitmar.plan import (
    GIB,
    PhaseLength,
    Plan,
    as_dict,
    assumed_phases,
    assumed_sources,
    counted_phases,
    make_plan,
    table,
)
from shards.corpus import PAIRS, TEXT
from shards.loader import PhaseSpec, Shape
from shards.order import Order
from shards.record import DataError

ROOT = Path(__file__).resolve().parents[1]
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# Of changes that make a run smaller, what each costs: a sorting key that prefers what slows training least
DS_COST = {"zero1": 1, "zero2": 2, "zero3": 6, "zero2-offload": 12, "zero3-offload": 18}
CHECKPOINTING_COST = 4
HALVING_COST = 1
ALTERNATIVES = 3


@dataclass(frozen=True)
class Change:
    """A smaller run: what is changed, as a person would type it, and its plan."""

    ds_config: str | None
    checkpointing: bool
    halvings: int
    plan: Plan

    @property
    def cost(self) -> int:
        ds = DS_COST[Path(self.ds_config).stem] if self.ds_config else 0
        return ds + CHECKPOINTING_COST * self.checkpointing + HALVING_COST * self.halvings

    def told(self) -> str:
        parts = [f"--ds {self.ds_config}"] if self.ds_config else []
        parts += ["engine.activation_checkpointing=true"] if self.checkpointing else []
        parts += [f"training.micro_batch={self.plan.config.training.micro_batch}"] if self.halvings else []
        return " ".join(parts)

    def holds(self, other: Change) -> bool:
        """Whether `other` changes no more than this does."""
        same = other.ds_config in (None, self.ds_config)
        return same and other.checkpointing <= self.checkpointing and other.halvings <= self.halvings


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="plan", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="recipe, see launch/recipes/")
    parser.add_argument("--ds", metavar="CONFIG", help="ds_config; default: the recipe's engine.ds_config")
    parser.add_argument("--gpus", type=int, default=1, help="ranks (default 1)")
    parser.add_argument("--gpu-memory", default="80GB", help="of each GPU, such as 80GB or 24GiB (default 80GB)")
    parser.add_argument("--gpu-tflops", type=float, default=312.0, help="peak of a GPU (default 312: A100, bf16)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached (default 0.4)")
    parser.add_argument("--words", help="of the training split, such as 100M; default: the shards' or data.words_limit")
    parser.add_argument("--caption-share", type=float, default=0.5, help="of those words (default 0.5)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan, and what to change where it does not fit."""
    known = parse(arguments)
    try:
        return report(known)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def report(known: argparse.Namespace) -> int:
    """The plan of checked arguments. Raises ConfigError, DataError."""
    memory = memory_bytes(known.gpu_memory)
    for name, value in (("gpus", known.gpus), ("gpu-tflops", known.gpu_tflops), ("mfu", known.mfu)):
        if not value > 0:
            raise ConfigError(f"--{name} must be > 0, got {value}")
    for name, value in (("mfu", known.mfu), ("caption-share", known.caption_share)):
        if not 0 <= value <= 1:
            raise ConfigError(f"--{name} must lie in [0, 1], got {value}")
    overrides = [*known.overrides, *([f"engine.ds_config={known.ds}"] if known.ds else [])]
    config = load_config(known.config, overrides)
    phases, counted = lengths(config, known.words, known.caption_share)
    plan = planned(config, settings_of(config.engine.ds_config), known.gpus, phases, counted)
    fits = plan.device_bytes <= memory
    days = plan.seconds(known.gpu_tflops * 1e12, known.mfu) / 86400
    changes = [] if fits else smallest(changed(plan, memory))
    if known.json:
        told = [{"change": c.told(), "total": c.plan.device_bytes} for c in changes]
        verdict = {"gpu_memory": memory, "fits": fits, "days": days, "mfu": known.mfu, "changes": told}
        print(json.dumps(as_dict(plan) | verdict))
        return 0 if fits else 1
    print(table(plan))
    print(f"wall time         {days * 24:,.2f} hours at {known.mfu:g} of {known.gpu_tflops:g} TFLOP/s a GPU")
    share = f"{plan.device_bytes / GIB:,.2f} of {memory / GIB:,.2f} GiB"
    if fits:
        print(f"fits              {share}")
        return 0
    print(
        f"does not fit      {share}; what would do, the least change first:"
        if changes
        else f"does not fit      {share}"
    )
    for change in changes:
        print(f"  {change.plan.device_bytes / GIB:>8,.2f} GiB  {change.told()}")
    if not changes:
        print("  no ZeRO stage, offload or smaller micro-batch is enough: more memory, or a smaller model.width")
    return 1


def memory_bytes(text: str) -> int:
    """ "80GB" or "24GiB" in bytes. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise ConfigError(f"--gpu-memory must be a size such as 80GB or 24GiB, got {text!r}")
    number, unit, binary = found.groups()
    power = "KMGT".index(unit.upper()) + 1
    size = int(float(number) * (1024 if binary else 1000) ** power)
    if size == 0:
        raise ConfigError(f"--gpu-memory must be > 0, got {text!r}")
    return size


def words_of(text: str) -> float:
    """ "100M" or "1e8" as a number. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMGT]?)", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]) > 0:
        raise ConfigError(f"--words must be a number such as 100M, got {text!r}")
    return float(found[1]) * UNITS[found[2].upper()]


def lengths(config: Config, words: str | None, caption_share: float) -> tuple[list[PhaseLength], bool]:
    """The phases' lengths, and whether shards were counted for them. Raises ConfigError, DataError."""
    place = config.data.shards
    if words is None and ("://" in place or Path(place).exists()):
        shards = open_shards(config)
        corpus = shards.corpus("train")
        specs = [PhaseSpec(p.name, p.mix, p.epochs, p.words, p.steps) for p in config.phases]
        data = config.data
        shape = Shape(config.training.global_batch, data.row_tokens, data.partitions, data.window_shards)
        try:
            order = Order(corpus, specs, seed=config.run.seed, shape=shape, pack_captions=data.pack_captions)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return counted_phases(config, order, corpus), True
    total = config.data.words_limit if words is None else words_of(words)
    for phase in config.phases:
        for name in phase.mix:
            if name not in (TEXT, PAIRS):
                raise ConfigError(
                    f"phases[{phase.name}].mix names {name!r}, whose size only shards tell: none at {place}"
                )
    sources = assumed_sources(total * (1 - caption_share), total * caption_share, config.data.row_tokens)
    return assumed_phases(config, sources), False


def settings_of(ds_config: str) -> ZeroSettings:
    return ZeroSettings.of(read_ds_config(Path(ds_config)))


def planned(config: Config, settings: ZeroSettings, gpus: int, phases: Sequence[PhaseLength], counted: bool) -> Plan:
    """The plan on GPUs, which multiply bf16 unless the recipe says otherwise."""
    dtype = torch.float32 if config.training.precision == "fp32" else torch.bfloat16
    return make_plan(config, settings, gpus, phases, device="cuda", dtype=dtype, counted=counted)


def changed(plan: Plan, memory: int) -> Iterator[Change]:
    """Smaller runs that fit: heavier ds_configs, activation checkpointing, smaller micro-batches."""
    here = plan.config.engine.ds_config
    files = [ROOT / "ds_configs" / f"{name}.json" for name in DS_COST]
    configs = [f.relative_to(ROOT).as_posix() for f in files if f.is_file() and f.stem != Path(here).stem]
    for ds_config in (None, *configs):
        settings = plan.settings if ds_config is None else settings_of(str(ROOT / ds_config))
        for checkpointing in {False, not plan.config.engine.activation_checkpointing}:
            for halvings, config in enumerate(halved(plan.config, plan.world)):
                if checkpointing:
                    config = dataclasses.replace(
                        config, engine=dataclasses.replace(config.engine, activation_checkpointing=True)
                    )
                smaller = planned(config, settings, plan.world, plan.phases, plan.counted)
                if smaller.device_bytes <= memory:
                    yield Change(ds_config, checkpointing, halvings, smaller)
                    break  # a still smaller micro-batch changes more


def halved(config: Config, world: int) -> Iterator[Config]:
    """The configuration with its micro-batch, half of it, and so on as far as the recipe's groups allow."""
    while True:
        yield config
        training = config.training
        if config.micro_batch(world) % 2:
            return
        try:
            smaller = dataclasses.replace(training, micro_batch=config.micro_batch(world) // 2)
            config = dataclasses.replace(config, training=smaller)
            config.check_world(world)
        except ConfigError:
            return


def smallest(changes: Iterator[Change]) -> list[Change]:
    """Those that cost least, none of which changes all that another does and more."""
    chosen: list[Change] = []
    for change in sorted(changes, key=lambda c: c.cost):
        if len(chosen) < ALTERNATIVES and not any(change.holds(other) for other in chosen):
            chosen.append(change)
    return chosen


if __name__ == "__main__":
    sys.exit(main())
