"""The one file that knows DeepSpeed: joins recipe and ds_config, and steps the model under ZeRO 0 to 3.

Parameters, gradients and optimiser states are fp32 in every precision; `bf16` runs the matrix products of the
forward and backward pass in bf16 (BitMar.compute_dtype), so the shadow weights are rounded from fp32 and every
stage takes the same path. The optimiser is torch's fused AdamW, so nothing is compiled at run time.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

from bitmar.batch import Batch
from bitmar.config import COMPONENTS, Config, ConfigError
from bitmar.engine.census import (
    Census,
    Watched,
    component_of,
    gradient_sums,
    histograms,
    matrices_of,
    scales_of,
    ternary_sums,
    update_sums,
)
from bitmar.engine.ds_config import fit_ds_config, read_ds_config, uses_nvme
from bitmar.engine.extensions import prepare_extensions
from bitmar.engine.fragments import KINDS, Fragment
from bitmar.engine.schedule import Rates
from bitmar.engine.world import World
from bitmar.model.attention import SelfAttention, attend
from bitmar.model.bitmar import BitMar, Outputs, component_parameters, rounded_layers
from bitmar.model.blocks import Block
from bitmar.model.memory import MemoryState

# (kind, parameter, first number, end) -> those numbers, fp32 on the CPU
ReadPiece = Callable[[str, str, int, int], Tensor]


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
        path = Path(config.engine.ds_config)
        ds_config = fit_ds_config(read_ds_config(path), path, world)
        if uses_nvme(ds_config) and not AsyncIOBuilder().is_compatible():
            raise ConfigError(
                f"{path}: offload to NVMe needs libaio and a C++ compiler on every node (apt install libaio-dev g++)"
            )
        if config.engine.compile:
            _compile_blocks(model, ds_config, world.device.type == "cpu")
        config.check_world(world.size)
        self.world = world
        self.stage: int = ds_config["zero_optimization"]["stage"]
        self.clip = config.training.gradient_clip
        self.gradient_norm: float | Tensor = 0.0  # before clipping, of the last step
        self.skipped = False  # the last step left its update out, on all ranks: its gradient was not finite
        self._scale = float(world.size)  # DeepSpeed averages over ranks; losses are already divided globally
        self._frozen: set[str] = set()
        self.census: Census | None = None  # of the last step that took one
        self.matrices = matrices_of(model)
        self.watched = Watched()
        self._histograms = config.wandb.makes_histograms
        self._adamw = config.optimizer
        self._parameters: list[tuple[str, Any]] = list(model.named_parameters())
        self._by_name = dict(self._parameters)
        self.rounded = rounded_layers(model)
        # a compiled block would be compiled again for what it finds
        self._keeping = [] if config.engine.compile else [layer for _, layer in self.rounded]
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
            "train_micro_batch_size_per_gpu": config.micro_batch(world.size),
            "gradient_accumulation_steps": config.accumulation_steps(world.size),
            "gradient_clipping": self.clip if self.stage > 0 else 0.0,  # `step` clips, by the norm that it has
            "steps_per_print": 10**12,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps offloaded tensors without a build
        }
        # untyped: what DeepSpeed hands out differs by stage
        self._engine: Any
        self._optimizer: Any
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        self._modules = list(self._engine.modules())
        self._make_optimizer_state()

    @property
    def module(self) -> BitMar:
        return self._engine.module

    def forward(
        self,
        batch: Batch,
        memory: MemoryState,
        recall: bool = False,
        entropy: bool = False,
        heads: bool = False,
    ) -> Outputs:
        return self._engine(batch, memory, recall, entropy=entropy, heads=heads)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Forward passes in here are of the model as it is in evaluation, and no gradient is worked out for a weight;
        compiled blocks run as they are written."""
        asked = [p.requires_grad for _, p in self._parameters]
        self.train(False)
        for _, p in self._parameters:
            p.requires_grad_(False)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for (_, p), required in zip(self._parameters, asked, strict=True):
                p.requires_grad_(required)
            self.train(True)

    def keep_scales(self, on: bool) -> None:
        """Have forward passes keep their gammas for a census at the end of the step."""
        for layer in self._keeping:
            layer.keeps_scales = on

    def train(self, mode: bool = True) -> None:
        """As torch's own, which takes a millisecond for the attributes of all modules."""
        for module in self._modules:
            vars(module)["training"] = mode

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

    def step(self, census: bool = False) -> None:
        """Call after every micro-batch; the update happens at the accumulation boundary, with a census of it if asked.

        An update whose gradient is not finite is left out and the gradient dropped: weights, moments and the
        optimiser's step stay as they are. ZeRO 1 to 3 do so themselves (`overflow`), from the norm of all ranks.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        counted = weights = scales = None
        told: tuple[Tensor | None, Tensor | None] = (None, None)
        if boundary and census:
            device = self.world.device
            counted = gradient_sums(self._gradients(), device)
            scales = scales_of([layer for _, layer in self.rounded], device)
            weights = ternary_sums(self.fragments(), self.matrices, scales, self.watched)
            if self._histograms:
                told = histograms(self._gradients(), "gradient", device), histograms(self.fragments(), "model", device)
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
        if counted is not None and weights is not None and scales is not None:
            self.census = Census(*counted, self._update_sums(), weights[0], scales.double(), weights[1], *told)

    def _update_sums(self) -> Tensor:
        """Census.updates of this rank; zeros where the update was left out."""
        device, a = self.world.device, self._adamw
        if self.skipped:
            return torch.zeros(len(COMPONENTS), 2, dtype=torch.float64, device=device)
        groups = self._optimizer.param_groups
        rates = {(g["component"], g["decays"]): (g["lr"], g["weight_decay"]) for g in groups}
        of = {name: rates[component_of(name), len(shape) > 1] for name, shape in self.parameter_shapes().items()}
        return update_sums(self.fragments(), of, (a.beta1, a.beta2), a.eps, self.adam_step(), device)

    def _gradients(self) -> Iterator[Fragment]:
        """This rank's part of the gradient that all ranks have reduced, before the clip: where `fragments` lie.

        Between the last backward pass of a step and its update.
        """
        for piece in self.fragments():
            p: Any = self._by_name[piece.name]
            length = len(piece.tensors["model"])
            if self.stage == 3 and self._optimizer.offload_optimizer:  # it lies beside the weights
                group, offset, _ = self._optimizer.grad_position[self._optimizer.get_param_id(p)]
                gradient = self._optimizer.fp32_partitioned_groups_flat[group].grad.narrow(0, offset, length)
            elif self.stage == 3:
                gradient = safe_get_local_grad(p).view(-1)[:length]
            elif self.stage > 0:
                gradient = p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group).view(-1)
                if gradient.numel() != length:  # of the whole parameter
                    gradient = gradient[piece.start : piece.start + length]
            else:
                gradient = p.grad.view(-1)[piece.start : piece.start + length]
            yield Fragment(piece.name, piece.start, {"gradient": gradient})

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns of weights and moments; together the ranks own every number once. No collective.

        Views of the engine's own state, or of buffers that are used again when the next fragment is asked for.
        Under ZeRO-0, where every rank holds everything, an even share of all numbers.
        """
        total = sum(math.prod(shape) for shape in self.parameter_shapes().values())
        share = (self.world.rank * total // self.world.size, (self.world.rank + 1) * total // self.world.size)
        return self._pieces(share, changed=False)

    def load(self, read: ReadPiece, adam_step: int) -> None:
        """Set weights, moments and the optimiser's step, each rank reading its own part. A collective."""
        self.watched = Watched()  # of weights that are no more
        if self.stage == 3:
            self._optimizer._partition_all_parameters()
        for fragment in self._pieces((0, sys.maxsize), changed=True):
            for kind, tensor in fragment.tensors.items():
                tensor.copy_(read(kind, fragment.name, fragment.start, fragment.start + len(tensor)))
        for state in self._torch_optimizer.state.values():
            state["step"].fill_(adam_step)
        if self.stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self.stage == 3:  # as after a step (stage3.py, _post_step)
            persistent = self._optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
            self._optimizer.invalidate_secondary_tensor()

    def _pieces(self, share: tuple[int, int], changed: bool) -> Iterator[Fragment]:
        """The pieces of this rank; `share`: its numbers, counted over all parameters, where a rank holds all."""
        if self.stage == 3:
            yield from self._partitioned_pieces(changed)
            return
        offset = 0
        for name, p in self._parameters:
            if self.stage == 0:
                begin, end = max(share[0] - offset, 0), min(share[1] - offset, p.numel())
                state = self._optimizer.state[p]
                held = {"model": p.detach(), **{key: state[key] for key in KINDS[1:]}}
                if begin < end:
                    yield Fragment(name, begin, {kind: t.view(-1)[begin:end] for kind, t in held.items()})
                offset += p.numel()
                continue
            mapping = p._hp_mapping
            if mapping is not None:
                held = {"model": mapping.hp_fragment.detach(), **mapping.optim_fragment}
                yield Fragment(name, mapping.lp_fragment_address.start, {kind: held[kind] for kind in KINDS})

    def _partitioned_pieces(self, changed: bool) -> Iterator[Fragment]:
        """ZeRO-3: this rank's partition of each parameter, without the padding of the last one."""
        zero = self._optimizer
        members: dict[int, list[tuple[str, Any, int]]] = {}
        for name, p in self._parameters:
            group, offset, _ = zero.grad_position[zero.get_param_id(p)]
            members.setdefault(group, []).append((name, p, offset))
        for group, parameters in sorted(members.items()):
            with self._subgroup(group, changed) as held:
                for name, p, offset in parameters:
                    size = p.ds_tensor.ds_numel
                    begin = self.world.rank * size
                    length = min(size, p.ds_numel - begin)
                    if length > 0:
                        yield Fragment(name, begin, {k: t.narrow(0, offset, length) for k, t in held.items()})

    @contextmanager
    def _subgroup(self, group: int, changed: bool) -> Iterator[dict[str, Tensor]]:
        """ZeRO-3's flat weights and moments of a group; those that lie on NVMe are read in, and written if changed."""
        zero = self._optimizer
        swapped = zero._swappable_optimizer_subgroup(group)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(group)
        flat = zero.fp32_partitioned_groups_flat[group]
        state = zero.optimizer.state[flat]
        yield {"model": flat.detach(), **{key: state[key] for key in KINDS[1:] if key in state}}
        if changed:
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if swapped and changed:
            zero._optimizer_states_and_gradient_swap_out(group)
        elif swapped:
            zero._release_swap_buffers(group)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: whole_shape(p) for n, p in self._parameters}

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
        if self.stage == 3:
            for group in range(len(self._optimizer.fp32_partitioned_groups_flat)):
                with self._subgroup(group, changed=True):
                    self._add_state(self._optimizer.fp32_partitioned_groups_flat[group])
            return
        for group in self._torch_optimizer.param_groups:
            for p in group["params"]:
                self._add_state(p)
        if self.stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _add_state(self, p: Tensor) -> None:
        state = self._torch_optimizer.state
        if not state[p]:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def _hook_gradients(self, model: BitMar) -> None:
        """Zero the gradient of frozen components before the engine sees it (and its norm and moments)."""

        def hook_for(component: str) -> Any:
            return lambda grad: torch.zeros_like(grad) if component in self._frozen else None

        for component, parameters in component_parameters(model).items():
            for _, parameter in parameters:
                parameter.register_hook(hook_for(component))


def _compile_blocks(model: BitMar, ds_config: dict[str, Any], on_cpu: bool) -> None:
    """torch.compile of the transformer blocks, whose code is compiled once for all layers. Raises ConfigError.

    The memory and the packing of rows depend on values and would break every graph of the whole model.
    """
    if ds_config["zero_optimization"]["stage"] == 3:
        raise ConfigError(
            "engine.compile: under ZeRO-3 every module's hooks make torch.compile start anew until it gives up; take "
            "ZeRO-2 or less, or engine.compile=false"
        )
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(f"engine.compile needs a C++ compiler, and {compiler} is not there (apt install g++)")
    # torch 2.13's compiler takes the first length's strides for those of all in the CPU kernel's backward pass
    uncompiled: Any = torch.compiler.disable(attend)
    for module in model.modules():
        if isinstance(module, SelfAttention) and on_cpu:
            module.attend = uncompiled
        if isinstance(module, Block):
            module.compile()


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
