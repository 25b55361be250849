"""Which wandb run a run is mirrored in: its recipe's word, else that of wandb's own environment variables."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from bitmar.config import WandbConfig
from bitmar.watch_config import WANDB_MODES

WandbMode = Literal["online", "offline", "disabled"]


@dataclass(frozen=True)
class Identity:
    """Where a wandb run goes and what it is called. `mode` None: online where wandb finds a key, else offline."""

    project: str
    entity: str | None
    name: str
    id: str
    group: str | None
    tags: tuple[str, ...]
    notes: str | None
    mode: WandbMode | None


def identify(config: WandbConfig, run_name: str, run_id: str, environment: Mapping[str, str] | None = None) -> Identity:
    """The recipe's value, else that of wandb's environment variable, else the run's own.

    A recipe that leaves the project at its default leaves it to WANDB_PROJECT. WANDB_RUN_ID names the id, as the agent
    of a sweep does; with wandb.resume false each start has an id of its own.
    """
    given = os.environ if environment is None else environment
    default = WandbConfig().project
    asked = {"dryrun": "offline"}.get(given.get("WANDB_MODE", ""), given.get("WANDB_MODE"))
    wished = config.mode or ("offline" if config.offline else asked)
    mode = cast(WandbMode, wished) if wished in WANDB_MODES else None
    own_id = run_id if config.resume else f"{run_id}-{secrets.token_hex(3)}"
    return Identity(
        project=config.project if config.project != default else given.get("WANDB_PROJECT") or default,
        entity=config.entity or given.get("WANDB_ENTITY") or None,
        name=config.name or given.get("WANDB_NAME") or run_name,
        id=given.get("WANDB_RUN_ID") or own_id,
        group=config.group or given.get("WANDB_RUN_GROUP") or None,
        tags=config.tags or tuple(tag.strip() for tag in given.get("WANDB_TAGS", "").split(",") if tag.strip()),
        notes=config.notes or given.get("WANDB_NOTES") or None,
        mode=mode if config.enabled else "disabled",
    )
