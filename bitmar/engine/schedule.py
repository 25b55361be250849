"""Rate and weight decay over a run, and which components a phase trains.

The two-stage schedule of 1.58-bit training (Ma et al. 2024, "The Era of 1-bit LLMs: Training Tips, Code and
FAQ", section 2): linear warm-up, a high peak rate that decays linearly, a drop to the line of a lower peak at
half way; weight decay until half way, none after, because it would hold the shadow weights near 0, where
their ternary values flip most often.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitmar.config import OptimizerConfig


@dataclass(frozen=True)
class Rates:
    learning_rate: float
    weight_decay: float


def rates_at(step: int, total_steps: int, config: OptimizerConfig) -> Rates:
    """Rate and decay of optimizer step `step` (0-based) of a run of `total_steps`.

    rate = base x (1 - step / total), at least final_rate; base is peak_rate before half way, second_rate from
    there; during warm-up the rate rises linearly to that line and reaches it at step warmup_steps.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} lies outside a run of {total_steps} steps")
    first_half = 2 * step < total_steps
    base = config.peak_rate if first_half else config.second_rate
    rate = max(base * (1 - step / total_steps), config.final_rate)
    if step < config.warmup_steps:
        rate *= (step + 1) / (config.warmup_steps + 1)
    return Rates(rate, config.weight_decay if first_half else 0.0)
