"""What the administrator chose about scheduling; the runner's own limits are its `RunnerTraits`."""

from __future__ import annotations

from dataclasses import dataclass

from tgi_asgi.runner.plan import RunnerTraits
from tgi_asgi.settings import Settings
from tgi_asgi.types import Bidirectional


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingPolicy:
    """Choices of the scheduler that no runner makes.

        policy = SchedulingPolicy.of(settings, runner.traits)

    Attributes:
        prefix_cache: Whether prompts look for their beginnings among those computed before.
        waiting_served_ratio: Minimum ratio of waiting to decoding sequences at which new prompts start; below
            it they wait for up to `max_waiting_steps` steps, because steps without prompts are shorter. 0:
            they start at once.
        max_adapters: Maximum number of different adapters in a step.
    """

    prefix_cache: bool = True
    waiting_served_ratio: float = 0.0
    max_waiting_steps: int = 20
    max_adapters: int = 8

    @classmethod
    def of(cls, settings: Settings, traits: RunnerTraits) -> SchedulingPolicy:
        """Return the policy that the settings ask for; the prefix cache only if the runner can use it."""
        can_resume = traits.num_kept_states != 0 and traits.vision is not Bidirectional.PROMPT
        return cls(
            prefix_cache=settings.prefix_cache and can_resume,
            waiting_served_ratio=settings.waiting_served_ratio,
            max_waiting_steps=settings.max_waiting_tokens,
            max_adapters=settings.max_loras,
        )
