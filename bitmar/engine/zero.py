"""The one file that knows DeepSpeed: joins recipe and ds_config, and steps the model under ZeRO 0 to 3.

Parameters, gradients and optimiser states are fp32 in every precision; `bf16` runs the matrix products of the
forward and backward pass in bf16 (BitMar.compute_dtype), so the shadow weights are rounded from fp32 and every
stage takes the same path. The optimiser is torch's fused AdamW, so nothing is compiled at run time.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from bitmar.batch import Batch
from bitmar.config import COMPONENTS, Config, ConfigError
from bitmar.engine.extensions import prepare_extensions
from bitmar.engine.schedule import Rates
from bitmar.engine.world import World
from bitmar.model.bitmar import BitMar, Outputs, component_parameters
from bitmar.model.memory import MemoryState

RECIPE_OWNS = {
    "train_batch_size": "training.global_batch",
    "train_micro_batch_size_per_gpu": "training.micro_batch",
    "gradient_accumulation_steps": "training.global_batch and training.micro_batch",
    "gradient_clipping": "training.gradient_clip",
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.*",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "torch_autocast": "training.precision",
    "wandb": "logging.*",
    "tensorboard": "logging.*",
    "activation_checkpointing": "engine.activation_checkpointing",
}


@dataclass(frozen=True)
class ParameterState:
    """One whole parameter with its optimiser moments, all fp32 and of the parameter's shape."""

    name: str
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read a ds_config and refuse what the recipe owns. Raises ConfigError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"engine.ds_config {path} does not exist; see ds_configs/") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"engine.ds_config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"engine.ds_config {path} must hold an object, got {type(config).__name__}")
    for key, owner in RECIPE_OWNS.items():
        if key in config:
            raise ConfigError(f"{path}: {key} belongs to the recipe ({owner}); remove it from the ds_config")
    section = config.get("zero_optimization")
    stage = section.get("stage") if isinstance(section, dict) else None
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    return config


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the hardware multiplies bf16 (CUDA, AVX512-BF16, AMX), fp32 elsewhere."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


class ZeroEngine:
    """Forward, backward and step of one model under the configured ZeRO stage."""

    def __init__(self, model: BitMar, config: Config, world: World) -> None:
        ds_config = read_ds_config(Path(config.engine.ds_config))
        config.check_world(world.size)
        self.world = world
        self.stage: int = ds_config["zero_optimization"]["stage"]
        self.clip = config.training.gradient_clip
        self.gradient_norm: float | Tensor = 0.0  # before clipping, of the last step
        self.skipped = False  # the last step left its update out, on all ranks: its gradient was not finite
        self._scale = float(world.size)  # DeepSpeed averages over ranks; losses are already divided globally
        self._frozen: set[str] = set()
        self._names = [name for name, _ in model.named_parameters()]
        self._hook_gradients(model)
        groups = _optimizer_groups(model)
        optimizer = torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.eps,
            fused=True,
        )
        prepare_extensions()
        if world.device.type == "cpu":  # serves inference only, and would be compiled on the user's machine
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(
            logging.ERROR
        )  # its warnings are about our dataclasses and its own plans
        # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates, at every step
        warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
        ds_config = ds_config | {
            "train_batch_size": config.training.global_batch,
            "train_micro_batch_size_per_gpu": config.training.micro_batch,
            "gradient_accumulation_steps": config.accumulation_steps(world.size),
            "gradient_clipping": self.clip if self.stage > 0 else 0.0,  # `step` clips, by the norm that it has
            "steps_per_print": 10**12,
            "zero_allow_untested_optimizer": True,
        }
        # untyped: what DeepSpeed hands out differs by stage
        self._engine: Any
        self._optimizer: Any
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        self._make_optimizer_state()

    @property
    def module(self) -> BitMar:
        return self._engine.module

    def forward(self, batch: Batch, memory: MemoryState, recall: bool = False) -> Outputs:
        return self._engine(batch, memory, recall)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def set_rates(self, rates: Rates, trained: tuple[str, ...]) -> None:
        """Set rate and decay; components outside `trained` get rate, decay and gradient 0: bit-identical after."""
        self._frozen = {component for component in COMPONENTS if component not in trained}
        for group in self._optimizer.param_groups:
            on = group["component"] in trained
            group["lr"] = rates.learning_rate if on else 0.0
            group["weight_decay"] = rates.weight_decay if on and group["decays"] else 0.0

    def backward(self, loss: Tensor) -> None:
        """`loss`: this rank's part of the global objective; the parts of all ranks and micro-batches add up.

        A loss that is not finite makes its whole gradient NaN (1 + 0 x loss is 1 of any other), and so the norm that
        all ranks take from the summed gradient: they leave the update out together without a word between them.
        """
        self._engine.backward(loss * (self._scale * (1 + 0 * loss.detach())), scale_wrt_gas=False)

    def step(self) -> None:
        """Call after every micro-batch; the update happens at the accumulation boundary.

        An update whose gradient is not finite is left out and the gradient dropped: weights, moments and the
        optimiser's step stay as they are. ZeRO 1 to 3 do so themselves (`overflow`), from the norm of all ranks.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        if boundary and self.stage == 0:
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(grads)  # they are summed over ranks by now
            self.gradient_norm, self.skipped = norm, not math.isfinite(norm)
            if self.skipped:
                self._engine.zero_grad()  # torch's optimiser passes over parameters without a gradient
            else:
                nn.utils.clip_grads_with_norm_(self.module.parameters(), self.clip, norm)
        self._engine.step()
        if boundary and self.stage > 0:
            self.gradient_norm = self._engine.get_global_grad_norm()
            self.skipped = self._optimizer.overflow

    def states(self) -> Iterator[ParameterState]:
        """Every parameter whole, one at a time, the same on all ranks. A collective: all ranks iterate."""
        for name, p in zip(self._names, self.module.parameters(), strict=True):
            if self.stage == 0:
                state = self._optimizer.state[p]
                yield ParameterState(name, p.detach(), state["exp_avg"], state["exp_avg_sq"])
            else:
                parts: list[Any] = [safe_get_full_fp32_param(p)]
                parts += [safe_get_full_optimizer_state(p, key) for key in ("exp_avg", "exp_avg_sq")]
                yield ParameterState(name, *(part.view(whole_shape(p)) for part in parts))

    def load_states(self, states: Iterator[ParameterState], adam_step: int) -> None:
        """Set weights, moments and the optimiser's step from whole parameters, in `parameter_shapes` order."""
        for p, state in zip(self.module.parameters(), states, strict=True):
            if self.stage == 0:
                p.data.copy_(state.weight)
                self._optimizer.state[p]["exp_avg"].copy_(state.exp_avg)
                self._optimizer.state[p]["exp_avg_sq"].copy_(state.exp_avg_sq)
                continue
            if self.stage == 3:
                safe_set_local_fp32_param(p, self._own_part(p, state.weight))
                safe_set_local_optimizer_state(p, self._own_part(p, state.exp_avg), "exp_avg")
                safe_set_local_optimizer_state(p, self._own_part(p, state.exp_avg_sq), "exp_avg_sq")
                with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                    if self.world.is_first:
                        p.data.copy_(state.weight)
            else:
                safe_set_full_fp32_param(p, state.weight)
                safe_set_full_optimizer_state(p, state.exp_avg, "exp_avg")
                safe_set_full_optimizer_state(p, state.exp_avg_sq, "exp_avg_sq")
                p.data.copy_(state.weight)
        for state in self._torch_optimizer.state.values():
            state["step"].fill_(adam_step)

    def _own_part(self, p: Any, whole: Tensor) -> Tensor:
        """This rank's part of a ZeRO-3 parameter; the last parts are padded, which DeepSpeed's setter cannot do."""
        size = p.ds_tensor.numel()
        flat = nn.functional.pad(whole.flatten(), (0, size * self.world.size - whole.numel()))
        return flat.narrow(0, self.world.rank * size, size)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: whole_shape(p) for n, p in zip(self._names, self.module.parameters(), strict=True)}

    def adam_step(self) -> int:
        """Updates made so far, as the optimiser counts them."""
        states = list(self._torch_optimizer.state.values())
        return int(states[0]["step"].item()) if states else 0

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer if self.stage == 0 else self._optimizer.optimizer

    def _make_optimizer_state(self) -> None:
        """Give every parameter its Adam state, which torch otherwise makes in the first step.

        With several parameter groups DeepSpeed's ZeRO-1/2 links the state after the first group's step, when the
        other groups have none; made here, it is there for all.
        """
        optimizer = self._torch_optimizer
        partitions = [p for group in optimizer.param_groups for p in group["params"]]
        if self.stage == 3:
            partitions = list(self._optimizer.fp32_partitioned_groups_flat)
        for p in partitions:
            if not optimizer.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                optimizer.state[p] = {
                    "step": step,
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        if self.stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _hook_gradients(self, model: BitMar) -> None:
        """Zero the gradient of frozen components before the engine sees it (and its norm and moments)."""

        def hook_for(component: str) -> Any:
            return lambda grad: torch.zeros_like(grad) if component in self._frozen else None

        for component, parameters in component_parameters(model).items():
            for _, parameter in parameters:
                parameter.register_hook(hook_for(component))


def whole_shape(p: nn.Parameter) -> tuple[int, ...]:
    """The whole parameter's shape, also where ZeRO-3 has taken it apart."""
    return tuple(getattr(p, "ds_shape", p.shape))


def _optimizer_groups(model: BitMar) -> list[dict[str, Any]]:
    """Two groups a component: matrices, which weight decay pulls, and norms, gates and vectors, which it spares."""
    groups = []
    for component, parameters in component_parameters(model).items():
        for decays in (True, False):
            members = [p for _, p in parameters if (p.ndim > 1) == decays]
            if members:
                groups.append({"params": members, "component": component, "decays": decays, "weight_decay": 0.0})
    return groups
