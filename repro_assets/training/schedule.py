"""The learning rate as a pure function of the step; nothing to save, nothing to lose on resume."""

import math

from repro_assets.recipe import TrainingSection


def learning_rate(section: TrainingSection, step: int, steps: int) -> float:
    """Rate of step `step` (1..steps): linear warm-up over a share of the steps, then the section's shape. Never zero."""
    warm = math.ceil(section.warmup * steps)
    if step <= warm:
        return section.learning_rate * step / warm
    left = (steps - step + 1) / (steps - warm)
    if section.schedule == "linear":
        return section.learning_rate * left
    if section.schedule == "cosine":
        return section.learning_rate * 0.5 * (1 - math.cos(math.pi * left))
    return section.learning_rate
