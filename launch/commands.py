"""Commands that start a training, read as far as a supervisor needs it: hostfile, recipe, run folder, resuming."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitmar.config import Config, load_config
from launch.hosts import ROOT, HostError

OVERRIDE = re.compile(r"[a-z_]+(\.\w+)+=.*", re.DOTALL)
HOSTFILE_FLAGS = ("--hostfile", "-H")


@dataclass(frozen=True)
class Command:
    """`given`: as the user wrote it. The other fields are None where the command does not say."""

    given: tuple[str, ...]
    hostfile: Path | None
    config: Config | None
    run_folder: Path | None

    @property
    def is_deepspeed(self) -> bool:
        return Path(self.given[0]).name == "deepspeed"

    def words(self, first: bool, hostfile: Path | None) -> list[str]:
        """The command to start: with another hostfile, and going on from the newest checkpoint.

        The first start keeps the user's --resume. Later ones say auto: --resume FOLDER would go back each time.
        """
        words = list(self.given)
        if hostfile is not None:
            words = _with_value(words, HOSTFILE_FLAGS, str(hostfile))
            if self.is_deepspeed:  # one host that is left may be another than this; its ranks must end with us
                added = ["--force_multi"] if "--force_multi" not in words else []
                if _value(words, ("--venv_script",)) is None:
                    added += ["--venv_script", f"{ROOT}/launch/remote.sh"]
                words[1:1] = added
        if self.config is None:
            return words
        says = _value(words, ("--resume",)) or any(w.startswith("checkpoint.resume=") for w in words)
        if first and says:
            return words
        words = [word for word in words if not word.startswith("checkpoint.resume=")]
        if _value(words, ("--resume",)) is not None:
            return _with_value(words, ("--resume",), "auto")
        return [*words, "--resume", "auto"]


def read_command(words: Sequence[str]) -> Command:
    """Raises ConfigError for a recipe that cannot be run, HostError for a launcher that cannot be supervised."""
    hostfile = _value(words, HOSTFILE_FLAGS)
    if hostfile is not None and "--no_ssh" in words:
        raise HostError("--no_ssh starts one host of several by hand; supervise the run from one host over ssh")
    recipe = _value(words, ("--config",)) or _local_recipe(words)
    config = None
    if recipe is not None:
        path = Path(recipe)
        named = ROOT / "launch" / "recipes" / f"{recipe}.yaml"
        overrides = [word for word in words if OVERRIDE.fullmatch(word)]
        ds = _value(words, ("--ds",))
        config = load_config(
            named if not path.exists() and named.exists() else path,
            overrides + ([f"engine.ds_config={ds}"] if ds else []),
        )
    folder = None if config is None else config.run_directory.resolve()
    return Command(tuple(words), None if hostfile is None else Path(hostfile), config, folder)


def _local_recipe(words: Sequence[str]) -> str | None:
    """The recipe of launch/local.sh, which takes it as its first argument."""
    for word, following in itertools.pairwise(words):
        if Path(word).name == "local.sh":
            return following
    return None


def _value(words: Sequence[str], flags: Sequence[str]) -> str | None:
    """Value of `--flag value` or `--flag=value`."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in flags:
            return value if equals else (words[place + 1] if place + 1 < len(words) else None)
    return None


def _with_value(words: Sequence[str], flags: Sequence[str], value: str) -> list[str]:
    """The words with another value of a flag that they have."""
    out = list(words)
    for place, word in enumerate(out):
        name, equals, _ = word.partition("=")
        if name in flags:
            if equals:
                out[place] = f"{name}={value}"
            else:
                out[place + 1] = value
            return out
    return out
