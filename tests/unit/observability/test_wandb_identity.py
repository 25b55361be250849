"""What a wandb run is called; what it holds is in tests/integration/test_wandb.py."""

from __future__ import annotations

import pytest

from bitmar.config import WandbConfig
from bitmar.observability.wandb_identity import identify

ENVIRONMENT = {
    "WANDB_PROJECT": "their-project",
    "WANDB_ENTITY": "their-team",
    "WANDB_NAME": "their name",
    "WANDB_RUN_GROUP": "their-group",
    "WANDB_TAGS": "a, b,",
    "WANDB_NOTES": "their notes",
    "WANDB_MODE": "offline",
}


def test_the_recipe_goes_before_the_environment() -> None:
    own = WandbConfig(project="p", entity="e", name="n", group="g", tags=("t",), notes="o")
    found = identify(own, "run", "id1", ENVIRONMENT)
    assert (found.project, found.entity, found.name, found.group) == ("p", "e", "n", "g")
    assert (found.tags, found.notes, found.id) == (("t",), "o", "id1")


def test_the_environment_goes_before_the_run() -> None:
    found = identify(WandbConfig(), "run", "id1", ENVIRONMENT)
    assert (found.project, found.entity, found.name) == ("their-project", "their-team", "their name")
    assert (found.group, found.tags, found.notes) == ("their-group", ("a", "b"), "their notes")
    assert identify(WandbConfig(), "run", "id1", {"WANDB_RUN_ID": "sweep7"}).id == "sweep7"


def test_without_either_it_is_the_run() -> None:
    found = identify(WandbConfig(), "run", "id1", {})
    assert (found.project, found.name, found.id, found.mode) == ("bitmar", "run", "id1", None)
    assert (found.entity, found.group, found.tags, found.notes) == (None, None, (), None)


@pytest.mark.parametrize(
    ("config", "environment", "mode"),
    [
        (WandbConfig(enabled=False), {"WANDB_MODE": "online"}, "disabled"),
        (WandbConfig(offline=True), {"WANDB_MODE": "online"}, "offline"),
        (WandbConfig(), {"WANDB_MODE": "online"}, "online"),
        (WandbConfig(), {"WANDB_MODE": "disabled"}, "disabled"),
        (WandbConfig(), {"WANDB_MODE": "dryrun"}, "offline"),
        (WandbConfig(mode="online"), {"WANDB_MODE": "offline"}, "online"),
        (WandbConfig(mode="offline"), {"WANDB_MODE": "online"}, "offline"),
        (WandbConfig(mode="disabled", offline=True), {}, "disabled"),
        (WandbConfig(), {"WANDB_MODE": "nonsense"}, None),
    ],
)
def test_modes(config: WandbConfig, environment: dict[str, str], mode: str | None) -> None:
    assert identify(config, "run", "id1", environment).mode == mode


def test_without_resume_each_start_has_an_id_of_its_own() -> None:
    ids = {identify(WandbConfig(resume=False), "run", "id1", {}).id for _ in range(3)}
    assert len(ids) == 3
    assert all(one.startswith("id1-") for one in ids)
