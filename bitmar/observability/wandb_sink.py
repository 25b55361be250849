"""The mirror of a run in wandb. This is the only file that imports wandb.

Nothing here holds up training or ends it. Every call to wandb, its import and its init too, is made on one background
thread, fed by a queue of bounded length whose oldest entries go when it is full. metrics.jsonl stays the truth.

x axis: wandb's own step starts again at 0 in each offline part of a run, so every metric has Training/Step as its axis.
It only rises: what a resumed run trains again, or a run that went back before a loss spike, is in wandb the first time
only (the highest step that was handed to wandb lies in wandb/mirrored.json).
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bitmar.config import WandbConfig
from bitmar.observability.schema import STEP_METRIC, Cadence, find
from bitmar.observability.wandb_identity import Identity, WandbMode
from bitmar.observability.wandb_panels import save_report

QUEUE_LENGTH = 2000
MARK_FILE = "mirrored.json"  # in the run's wandb folder: {"id", "step"}
_INIT_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 45.0  # for uploads at the end
_FINISH_ARTIFACTS_S = 600.0  # the same where checkpoints are uploaded
_CLOSE_MARGIN_S = 45.0  # an init that hangs, and going offline after it
_CLOSE_FAILED_S = 10.0  # a run that failed or was asked to stop ends soon; `wandb sync` uploads the rest
_FLUSH_S = 2.0  # between writes to the .wandb file, which `wandb leet` shows
_WHY_LENGTH = 500  # of an error's text
_SERVICE = "WANDB_SERVICE"  # the environment variable that names wandb's process
_SERVICE_IDLE = "5s"  # after which that process ends by itself, when a kill has taken the run from it
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")


class Tells(Protocol):
    """Where the mirror tells of itself; called from its thread too."""

    def event(self, kind: str, **fields: Any) -> None:
        """Take something that happened."""
        ...


class WandbSink:
    """A wandb run that mirrors the metrics: online where wandb finds a key, else offline in run_dir/wandb.

    An online run that cannot start becomes an offline one (`wandb sync` uploads it later); a wandb that is not
    installed, or dies in mid-run, is given up. Each sends one "warning" event; where the run is to be found is told by
    a "wandb" event.
    """

    def __init__(
        self,
        run_dir: Path,
        identity: Identity,
        config: Mapping[str, Any],
        options: WandbConfig,
        tells: Tells,
        queue_length: int = QUEUE_LENGTH,
    ) -> None:
        """Start (or resume, by the id) the run on the background. `config` must hold no secret."""
        self._run_dir, self._identity, self._config, self._options = run_dir, identity, dict(config), options
        self._tells = tells
        self._telling = threading.Lock()
        self._closed = False
        self._jobs: deque[Callable[[], None]] = deque(maxlen=queue_length)
        self._changed = threading.Condition()
        self._exit_code: int | None = None  # given by close
        self._lost = False
        self._dropped = 0
        # of the thread alone
        self._wandb: Any = None
        self._service: Any = None  # wandb's process, where it was started here
        self._run: Any = None
        self._mode: WandbMode = "disabled"
        self._sent = self._floor = -1  # highest step that was sent; logs up to the floor have been sent before
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    # What the training thread calls. None of it waits for wandb but `close`, which waits a bounded time.

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Mirror the metrics, with the step as a metric of its own; of those that every log has, only at the steps that
        wandb.log_interval asks for."""
        if self._holds_back(step):
            values = {name: value for name, value in values.items() if not _is_of_steps(name)}
        if values:
            self._put(functools.partial(self._send_values, step, dict(values)))

    def event(self, kind: str, **fields: Any) -> None:
        """Mirror an "alert"; other events belong to the run's files."""
        if kind == "alert":
            self._put(functools.partial(self._send_alert, fields["title"], fields["text"], fields["level"]))

    def image(self, step: int, name: str, path: Path) -> None:
        """Mirror an image file. Raises FileNotFoundError when there is none."""
        if not path.is_file():
            raise FileNotFoundError(f"no image at {path}")
        self._put(functools.partial(self._send_image, step, name, path))

    def histogram(self, step: int, name: str, counts: Sequence[float], edges: Sequence[float]) -> None:
        """Mirror a histogram: n counts between n + 1 edges. Raises ValueError where they do not fit."""
        if len(edges) != len(counts) + 1:
            raise ValueError(f"histogram {name}: {len(counts)} counts need {len(counts) + 1} edges, got {len(edges)}")
        if not self._holds_back(step):
            self._put(functools.partial(self._send_histogram, step, name, list(counts), list(edges)))

    def artifact(self, kind: str, name: str, paths: Sequence[Path]) -> None:
        """Upload files and folders as a version of the artifact `name`; a folder's name becomes an alias of it."""
        self._put(functools.partial(self._send_artifact, kind, name, list(paths)))

    def truncate_after(self, step: int) -> int:
        """Take nothing more of the steps that were sent: wandb takes none back."""
        self._put(self._raise_floor)
        return 0

    def close(self, exit_code: int = 0) -> None:
        """Finish the run with the process's exit code, waiting a bounded time for what is held and for uploads."""
        with self._changed:
            self._exit_code = exit_code
            self._changed.notify()
        self._thread.join(self._finish_timeout_s + _CLOSE_MARGIN_S if exit_code == 0 else _CLOSE_FAILED_S)
        if self._thread.is_alive():
            self._warn("wandb did not finish in time and is left behind; `wandb sync` uploads what it has on disk")
        with self._telling:
            self._closed = True

    def _holds_back(self, step: int) -> bool:
        every = self._options.log_interval
        return every is not None and step % every > 0

    def _put(self, job: Callable[[], None]) -> None:
        with self._changed:
            if self._lost or self._exit_code is not None:
                return
            first = len(self._jobs) == self._jobs.maxlen and not self._dropped
            self._dropped += len(self._jobs) == self._jobs.maxlen
            self._jobs.append(job)  # the oldest goes where it is full
            self._changed.notify()
        if first:
            self._warn("wandb does not keep up, and is sent no more than the newest logs; metrics.jsonl has them all")

    # What the background thread does.

    def _work(self) -> None:
        try:
            if not self._start():
                return
            while (job := self._next()) is not None:
                job()
            self._finish()
        # wandb raises its own errors, OSErrors of its pipes, those of mailboxes and of pydantic: there is no full list,
        # and none of them may end the run
        except Exception as error:
            self._give_up("wandb is given up for this run", error)

    def _next(self) -> Callable[[], None] | None:
        """The oldest job; None where the sink is closed and none is left."""
        with self._changed:
            while not self._jobs and self._exit_code is None:
                self._changed.wait()
            return self._jobs.popleft() if self._jobs else None

    def _start(self) -> bool:
        """Online, else offline; False where it is not at all."""
        try:
            import wandb  # here, because it costs start-up time
        except ImportError as error:
            self._give_up("wandb is left out: it is not installed (pip install wandb)", error)
            return False
        self._wandb = wandb
        wished = self._identity.mode
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._connect()
        try:
            self._mode = wished or ("online" if wandb.login(prompt=False, verify=False) else "offline")
            self._run = self._init(self._mode)
        except Exception as error:  # see _work
            if wished == "offline":
                raise
            self._warn("wandb is offline: it could not start online", error)
            self._disconnect()  # its process still holds the run's id
            self._mode = "offline"
            self._connect()
            self._run = self._init("offline")
        self._sent = self._floor = self._read_mark()
        if self._options.create_plots:  # the first picture imports pandas, 0.3 s: now, not between two steps
            self._wandb.util.is_pandas_data_frame(None)
        if self._mode == "online":
            self._tell("wandb", mode="online", url=self._run.url)
        else:
            self._tell(
                "wandb", mode="offline", upload_with=f"wandb sync {self._mark.parent}/offline-run-*-{self._run.id}"
            )
        return True

    def _connect(self) -> None:
        """Start wandb's process, where the environment names none, and connect to it. It is detached from this one: it
        does not ask ten times a second whether this one lives (0.3 % of a core), and where this one is killed it still
        writes what it was sent."""
        settings = self._wandb.Settings(silent=True, quiet=True)
        if not os.environ.get(_SERVICE):
            from wandb.sdk.lib.service import service_process

            self._service = service_process.start_detached(settings, idle_timeout=_SERVICE_IDLE)
            self._service.token.save_to_env()
        self._wandb.setup(settings)

    def _disconnect(self) -> None:
        """Have wandb's process, where it was started here, write what it holds and end."""
        service, self._service = self._service, None
        if service is not None:
            requests, asyncer = self._wandb.proto.wandb_server_pb2, self._wandb.setup().asyncer
            client = service.token.connect(asyncer=asyncer)
            end = requests.ServerRequest(inform_teardown=requests.ServerInformTeardownRequest())
            asyncer.run(lambda: client.publish(end))
            service.join()
            os.environ.pop(_SERVICE, None)
        self._wandb.teardown()

    def _init(self, mode: WandbMode) -> Any:
        about = self._identity
        settings = self._wandb.Settings(
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=self._finish_timeout_s,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=_FLUSH_S,
            stop_fn=functools.partial(os.kill, os.getpid(), signal.SIGTERM),  # the web page's Stop: save, then end
            quiet=True,
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
        )
        run = self._wandb.init(
            dir=self._run_dir,
            project=about.project,
            entity=about.entity,
            name=about.name,
            id=about.id,
            group=about.group,
            tags=about.tags,
            notes=about.notes,
            config=self._config,
            mode=mode,
            resume="allow",
            settings=settings,
        )
        run.define_metric(STEP_METRIC)
        run.define_metric("*", step_metric=STEP_METRIC)
        return run

    def _send_values(self, step: int, values: dict[str, float]) -> None:
        if step > self._floor:
            self._send(step, values)

    def _send_image(self, step: int, name: str, path: Path) -> None:
        if path.is_file():
            # a picture is ready when later steps have been sent; its title tells of which it is
            self._send(max(step, self._sent), {name: _picture_class(self._wandb)(str(path))})
        else:
            self._warn(f"wandb is not sent {name}: {path} is gone")

    def _send_histogram(self, step: int, name: str, counts: list[float], edges: list[float]) -> None:
        self._send(step, {name: self._wandb.Histogram(np_histogram=(counts, edges))})

    def _send(self, step: int, fields: dict[str, Any]) -> None:
        if step < self._sent:
            return
        if step > self._sent:
            self._sent = step
            self._write_mark()  # first: a kill in between must not make the next start send a step twice
        self._run.log({**fields, STEP_METRIC: step})

    def _send_alert(self, title: str, text: str, level: str) -> None:
        self._run.alert(title=title, text=text, level=level)

    def _send_artifact(self, kind: str, name: str, paths: list[Path]) -> None:
        artifact = self._wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type=kind)
        try:
            for path in paths:
                artifact.add_dir(str(path)) if path.is_dir() else artifact.add_file(str(path))
        except (OSError, ValueError) as error:  # a checkpoint may have made room for a later one
            self._warn(f"wandb is not sent the {kind} {name}", error)
            return
        self._run.log_artifact(artifact, aliases=["latest", *(path.name for path in paths if path.is_dir())])

    def _raise_floor(self) -> None:
        self._floor = self._sent

    def _finish(self) -> None:
        about = self._run.entity, self._run.project, self._identity.name, self._run.id, self._run.url
        self._run.finish(exit_code=self._exit_code)
        self._run = None
        if self._dropped:
            self._tell("wandb", logs_left_out=self._dropped)
        if self._options.report and self._mode == "online":
            try:
                address = save_report(*about)
            except Exception as error:  # a network's, or a server's: see _work
                self._warn("there is no wandb report", error)
            else:
                self._tell("wandb", report=address)
        self._disconnect()

    @property
    def _finish_timeout_s(self) -> float:
        return _FINISH_ARTIFACTS_S if self._options.log_model_checkpoints else _FINISH_TIMEOUT_S

    @property
    def _mark(self) -> Path:
        return self._run_dir / "wandb" / MARK_FILE

    def _read_mark(self) -> int:
        """The highest step that was sent under this id, -1 where none was."""
        try:
            mark = json.loads(self._mark.read_text(encoding="utf-8"))
            return int(mark["step"]) if mark["id"] == self._run.id else -1
        except (OSError, ValueError, KeyError, TypeError):
            return -1

    def _write_mark(self) -> None:
        self._mark.parent.mkdir(exist_ok=True)
        temporary = self._mark.with_suffix(".tmp")
        temporary.write_text(json.dumps({"id": self._run.id, "step": self._sent}), encoding="utf-8")
        temporary.replace(self._mark)

    def _give_up(self, what: str, error: Exception) -> None:
        with self._changed:
            self._lost = True
            self._jobs.clear()
        self._warn(what, error)

    def _warn(self, what: str, error: Exception | None = None) -> None:
        why = "" if error is None else f": {type(error).__name__}: {' '.join(str(error).split())[:_WHY_LENGTH]}"
        self._tell("warning", message=what + why)

    def _tell(self, kind: str, **fields: Any) -> None:
        with self._telling:
            if not self._closed:
                self._tells.event(kind, **{name: _without_secrets(value) for name, value in fields.items()})


@functools.cache
def _is_of_steps(name: str) -> bool:
    metric = find(name)
    return metric is not None and metric.cadence is Cadence.STEP


def _without_secrets(value: Any) -> Any:
    """A text without the values of environment variables that hold keys, tokens and passwords."""
    if isinstance(value, str):
        for name, secret in os.environ.items():
            if _SECRET.search(name.upper()) and len(secret) >= 8:
                value = value.replace(secret, "***")
    return value


@functools.cache
def _picture_class(wandb: Any) -> Any:
    """wandb.Image of a file, whose size it reads from the header: wandb 0.31 unpacks all of it, which takes the
    training's core for 12 ms a picture. (A wandb whose method is called otherwise would do so again.)"""
    from PIL import Image

    class Picture(wandb.Image):
        def _initialize_from_path(self, path: str) -> None:
            self._set_file(path, is_tmp=False)
            self.format = Path(path).suffix.removeprefix(".")
            with Image.open(path) as opened:
                self._image = opened  # its size is known when it is closed too

    return Picture
