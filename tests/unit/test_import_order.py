"""The house rules of the source, read with `ast`: who may import whom, how long a function may be.

`breaches` checks any tree, so that each rule is proved on a small tree that breaks it.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FUNCTION_LINES = 80

# Each line may import from the lines above it; modules of one line are neighbours and do not import each
# other. A package stands for those of its files that have no line of their own.
ORDER = """
shards.record
shards.npy
shards.regions
shards.captions
shards.memo
shards.tokenizer
shards.index
shards.foreign
shards.raw
shards.division
shards.writer
shards.spool
shards.blocks
shards.workplace
shards.crew
shards.convert
shards.corpus
shards.streams
shards.bins shards.buckets shards.packing
shards.order
shards.transfer
shards.cache
shards.store
shards.dataset
shards.rows
shards.loader
bitmar.startup bitmar.version bitmar.random_numbers
bitmar.config_checks bitmar.head_names
bitmar.model_config bitmar.watch_config
bitmar.config
bitmar.engine.cores
bitmar.engine.world
bitmar.engine.extensions bitmar.engine.launcher bitmar.engine.watchdog
bitmar.batch
bitmar.model.quantize bitmar.model.kernel
bitmar.model.attention
bitmar.model.blocks bitmar.model.head
bitmar.model.text bitmar.model.vision bitmar.model.fusion bitmar.model.memory
bitmar.model.bitmar bitmar.model.flops
bitmar.model.packed
bitmar.losses
bitmar.engine.schedule bitmar.engine.clock
bitmar.engine.ds_config
bitmar.engine.fragments
bitmar.engine.progress
bitmar.engine.retention
bitmar.loading
bitmar.engine.census
bitmar.engine.zero
bitmar.engine.step
bitmar.engine.memory_plan
bitmar.engine.checkpoint
bitmar.engine.faults
bitmar.observability.schema
bitmar.observability.stats
bitmar.observability.features bitmar.observability.probes
bitmar.observability.reduce
bitmar.observability.records
bitmar.observability.head_analysis
bitmar.observability.derived bitmar.observability.system bitmar.observability.drawer
bitmar.observability.board
bitmar.observability.drawing
bitmar.observability.run_folder
bitmar.observability.curve_plots bitmar.observability.memory_plots
bitmar.observability.attention_plots bitmar.observability.weight_plots
bitmar.observability.plots
bitmar.observability.console bitmar.observability.alerts
bitmar.observability.wandb_panels bitmar.observability.wandb_identity
bitmar.observability.wandb_sink
bitmar.observability.sinks
bitmar.generation.sampling
bitmar.generation.incremental bitmar.generation.episodes
bitmar.generation.generate
bitmar.evaluation
bitmar.export
bitmar.watch
bitmar.assembly
bitmar.probing
bitmar.observing bitmar.saving bitmar.evaluating
bitmar.recovery
bitmar.plan
bitmar.rehearsal
bitmar.train
bitmar.analysis.surgery bitmar.analysis.heads
bitmar.analysis.head_types bitmar.analysis.lofit
bitmar.analysis.patterns
bitmar.analysis
bitmar.analysis.history bitmar.analysis.head_statistics
bitmar.analysis.history_plots
bitmar.analysis.head_report
bitmar.analysis.head_page
"""
PLACE = {name: place for place, line in enumerate(ORDER.split("\n")) for name in line.split()}
# one file may import the package; scripts and tests are free, but for wandb only tests are
ONLY_IN = {
    "wandb": ("bitmar/observability/wandb_sink.py", ("bitmar", "shards", "launch", "tools")),
    "deepspeed": ("bitmar/engine/zero.py", ("bitmar", "shards", "launch")),
}
CODE_FOLDERS = ("bitmar", "shards", "launch", "tools")
# built from parts, so that this file does not trip over itself
MACHINE_PATH = re.compile(r"(?<![\w.~<:-])/(?:" + "|".join(("home", "Users", "root", "work", "mnt")) + r")/\w")


@dataclass(frozen=True)
class Module:
    path: str  # relative, with "/"
    name: str  # dotted
    tree: ast.Module


def load(root: Path, folders: tuple[str, ...]) -> list[Module]:
    modules = []
    for file in sorted(file for folder in folders for file in (root / folder).rglob("*.py")):
        relative = file.relative_to(root)
        parts = relative.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(Module(relative.as_posix(), name, ast.parse(file.read_text(encoding="utf-8"))))
    return modules


def imports(module: Module, known: set[str]) -> Iterator[str]:
    """Dotted names that a module imports anywhere, also inside functions and by import_module("x")."""
    package = module.name.split(".") if module.path.endswith("__init__.py") else module.name.split(".")[:-1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in known or inner in PLACE else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def places(name: str) -> tuple[int, int] | None:
    """(first, last) place of a module: its own line, or the stretch of its package when it has none."""
    if name in PLACE:
        return PLACE[name], PLACE[name]
    package = name.rpartition(".")[0]
    inside = [place for other, place in PLACE.items() if within(other, package)]
    return (min(inside), max(inside)) if inside and package not in ("", "bitmar") else None


def order_breach(importer: str, imported: str) -> bool:
    """True when `imported` stands below `importer`; a file without a line is held to its package's lines."""
    mine, other = places(importer), places(imported)
    if mine is None or other is None or importer == imported:
        return False
    same_package = importer.rpartition(".")[0] == imported.rpartition(".")[0]
    if same_package and not (importer in PLACE and imported in PLACE):
        return False  # only a cycle could be wrong
    return other[0] >= mine[1]


def import_breaches(modules: list[Module]) -> Iterator[str]:
    known = {module.name for module in modules}
    for module in modules:
        code = module.path.split("/")[0]
        for imported in imports(module, known):
            says = f"{module.path} imports {imported}: "
            if module.path.endswith("__init__.py"):
                yield says + "package __init__ files import nothing"
            for package, (owner, folders) in ONLY_IN.items():
                if within(imported, package) and module.path != owner and code in folders:
                    yield says + f"only {owner} may"
            if code == "shards" and (within(imported, "torch") or within(imported, "bitmar")):
                yield says + "shards knows no torch and no bitmar"
            if code not in ("bitmar", "shards"):
                continue
            if within(imported, "tools") or within(imported, "tests"):
                yield says + "nothing imports tools or tests"
            if within(imported, "bitmar.analysis") and not within(module.name, "bitmar.analysis"):
                yield says + "nothing imports bitmar.analysis"
            if within(imported, "bitmar.train") and not within(module.name, "bitmar.train"):
                yield says + "nothing imports bitmar.train"
            pair = ("bitmar.engine", "bitmar.observability")
            for one, other in (pair, pair[::-1]):
                if within(module.name, one) and within(imported, other):
                    yield says + "engine and observability do not know each other"
            if order_breach(module.name, imported):
                yield says + "it stands on a line below (architecture.md, section 2)"


def cycle_breaches(modules: list[Module]) -> Iterator[str]:
    known = {module.name for module in modules}
    edges = {module.name: {name for name in imports(module, known) if name in known} for module in modules}
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> Iterator[str]:
        if name in trail:
            yield "imports go round: " + " -> ".join([*trail[trail.index(name) :], name])
        elif name not in done:
            for imported in sorted(edges[name]):
                yield from visit(imported, [*trail, name])
            done.add(name)

    for module in modules:
        yield from visit(module.name, [])


def length_breaches(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES and module.path.startswith("bitmar/"):
                    yield f"{module.path}: {node.name} has {lines} lines, {MAX_FUNCTION_LINES} at most"


def breaches(root: Path) -> list[str]:
    """Every breach of the source's rules below `root`, one line each."""
    modules = load(root, CODE_FOLDERS)
    return [*import_breaches(modules), *cycle_breaches(modules), *length_breaches(modules)]


def path_breaches(root: Path, files: list[str]) -> list[str]:
    """Lines of text files that name a path of one machine."""
    found = []
    for name in files:
        content = (root / name).read_bytes() if (root / name).is_file() else b""
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{name}:{number}: names a path of one machine: {line.strip()[:80]}")
    return found


def repository_files(root: Path) -> list[str]:
    """Files under git, or every file where there is no git (an unpacked archive)."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=False)
    if listed.returncode == 0:
        return [name for name in listed.stdout.decode().split("\0") if name]
    hidden = (".venv", "runs", "data", "__pycache__")
    paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not set(hidden) & set(path.parts))


def test_source_keeps_the_rules() -> None:
    assert breaches(ROOT) == []


def test_files_name_no_machine() -> None:
    assert path_breaches(ROOT, repository_files(ROOT)) == []


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


LONG = "def long() -> int:\n" + "    x = 1\n" * 80 + "    return x\n"
CASES = {
    "shards upwards": ({"shards/record.py": "import shards.index"}, "shards/record.py imports shards.index"),
    "model upwards": ({"bitmar/model/quantize.py": "from bitmar.model import blocks"}, "line below"),
    "neighbours": ({"bitmar/model/text.py": "from bitmar.model.memory import read"}, "line below"),
    "relative": ({"bitmar/model/blocks.py": "from . import bitmar"}, "imports bitmar.model.bitmar"),
    "inside a function": ({"bitmar/config.py": "def f():\n    import bitmar.batch"}, "imports bitmar.batch"),
    "by name": ({"bitmar/config.py": "import importlib\nimportlib.import_module('bitmar.batch')"}, "batch"),
    "package without lines": ({"bitmar/export/hf.py": "import bitmar.train"}, "bitmar.train"),
    "file without a line": ({"bitmar/model/norm.py": "import bitmar.losses"}, "line below"),
    "analysis": ({"bitmar/export/hf.py": "import bitmar.analysis.heads"}, "nothing imports bitmar.analysis"),
    "train": ({"bitmar/analysis/heads.py": "import bitmar.train"}, "nothing imports bitmar.train"),
    "deepspeed": ({"bitmar/engine/world.py": "import deepspeed.comm"}, "only bitmar/engine/zero.py may"),
    "wandb": ({"bitmar/train.py": "import wandb"}, "only bitmar/observability/wandb_sink.py may"),
    "wandb in tools": ({"tools/report.py": "from wandb import sdk"}, "wandb_sink.py may"),
    "engine knows": ({"bitmar/engine/faults.py": "import bitmar.observability.schema"}, "do not know"),
    "observability knows": ({"bitmar/observability/stats.py": "import bitmar.engine.world"}, "do not know"),
    "init": ({"bitmar/__init__.py": "import json"}, "__init__ files import nothing"),
    "torch in shards": ({"shards/loader.py": "from torch import Tensor"}, "knows no torch"),
    "bitmar in shards": ({"shards/loader.py": "import bitmar.config"}, "knows no torch and no bitmar"),
    "tools in bitmar": ({"bitmar/train.py": "import tools.plan"}, "nothing imports tools"),
    "cycle": (
        {"bitmar/export/a.py": "import bitmar.export.b", "bitmar/export/b.py": "import bitmar.export.a"},
        "imports go round: bitmar.export.a -> bitmar.export.b -> bitmar.export.a",
    ),
    "length": ({"bitmar/losses.py": LONG}, "losses.py: long has 82 lines"),
}


@pytest.mark.parametrize(("files", "says"), CASES.values(), ids=CASES.keys())
def test_each_rule_is_enforced(tmp_path: Path, files: dict[str, str], says: str) -> None:
    write(tmp_path, files)
    found = breaches(tmp_path)
    assert any(says in line for line in found), found


def test_a_tree_that_keeps_the_rules_passes(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "bitmar/__init__.py": '"""BitMar."""\n',
            "bitmar/batch.py": "from shards.loader import Loader\nimport torch\n",
            "bitmar/engine/zero.py": "import deepspeed\nfrom bitmar.engine import world\n",
            "bitmar/observability/wandb_sink.py": "def f():\n    import wandb\n",
            "bitmar/export/hf.py": "from bitmar.export import pack\nfrom bitmar.model.bitmar import BitMar\n",
            "bitmar/export/pack.py": "import json\n",
            "bitmar/analysis/heads.py": "import bitmar.evaluation.perplexity\n",
            "bitmar/train.py": "import bitmar.engine.zero\nimport bitmar.observability.sinks\n",
            "bitmar/losses.py": LONG.replace("    x = 1\n", "", 2),
            "tools/report.py": "import bitmar.analysis.heads\nimport bitmar.train\nimport deepspeed\n",
        },
    )
    assert breaches(tmp_path) == []


@pytest.mark.parametrize("folder", ["home", "Users", "root", "work", "mnt"])
def test_machine_paths_are_found(tmp_path: Path, folder: str) -> None:
    write(tmp_path, {"a.yaml": f"data: /{folder}/someone/data\n", "b.md": "see data/work/x and https://x.org/home/y"})
    assert len(path_breaches(tmp_path, ["a.yaml", "b.md"])) == 1
