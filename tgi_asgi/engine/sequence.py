"""The scheduler's state of one choice of a request: tokens, blocks, and how far they are computed."""

from __future__ import annotations

import copy
import dataclasses
import enum
from typing import Any

from tgi_asgi.engine.prefix import HashChain
from tgi_asgi.engine.reasoning import ReasoningWatch, force
from tgi_asgi.engine.token_ids import TokenIds
from tgi_asgi.runner.plan import SlotStart
from tgi_asgi.types import GenerationRequest

AGING_S = 30.0  # seconds of waiting that make up for one level of priority


class Stage(enum.Enum):
    """How far a sequence is; only a RUNNING one has a slot and blocks. `Engine.describe` shows the values."""

    AWAITS_LEADER = "held"  # a further choice, until the first choice has computed the prompt
    WAITING = "waiting"  # in the queue, new or preempted
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(slots=True)
class RecurrentUse:
    """A running sequence's use of kept states; the places that it holds are not reused."""

    resumes: int | None = None  # the place that its first row resumes from, until that row is computed
    keep_at: tuple[int, ...] = ()  # positions at which to keep a state, ascending
    for_choices: int | None = None  # place before the prompt's last token, for other choices
    num_forks: int = 0  # number of choices that have resumed from there
    answer: int | None = None  # the place of the state that it keeps while it decodes


@dataclasses.dataclass(frozen=True, slots=True)
class Hit:
    """The cached part of a prompt.

    Attributes:
        num_blocks: Number of blocks of tokens, from the prompt's start.
        blocks: For each group, the last of these blocks: as many as the group still reads.
        num_found: Number of blocks that were found, even if no state was there to resume from.
        state: Place of the state to resume from, if any.
        version: That of the cache in which it was found.
    """

    num_blocks: int
    blocks: list[list[int]]
    num_found: int = 0
    state: int | None = None
    version: int = 0

    @classmethod
    def none(cls, num_groups: int) -> Hit:
        """Return the hit of a prompt without cached blocks."""
        return cls(0, [[] for _ in range(num_groups)])


class Sequence:
    """The scheduler's state of one choice.

    `urgency` is fixed at arrival, and smaller values come first. It orders the waiting queue and the rows of
    a step; preemption picks victims in the reverse order.

    Counters:
        `num_computed`: tokens whose KV entries are written or being written by a step in flight.
        `num_reused`: those of `num_computed` that the sequence did not compute itself: cached, or from its
            leader.
        `num_settled`: those of `num_computed` that no step in flight writes.
        `num_pending`: minimum number of tokens that the steps in flight will sample.
        `num_ahead`: how many more tokens the steps in flight may sample and compute.
        `num_encoded_images`: leading images of the prompt that are known to be encoded.
        `num_restarts`: how often a failed step voided all that was computed of a prompt that `needs_all`.

    `tables` has one block list per group of layers, indexed by position. The first `num_freed` entries
    of each list are before the group's window; the sequence no longer owns those blocks. `epoch` changes
    whenever the sequence leaves the running set or restarts its slot; what older steps computed for it is
    then void. `hit` is what a waiting sequence was last found to have in the prefix cache.
    """

    __slots__ = (
        "adapter", "arrival_s", "chain", "choice", "copy_sources", "epoch", "followers", "hit", "images",
        "is_prefilling", "leader", "max_tokens", "min_tokens", "num_ahead", "num_cached", "num_computed",
        "num_encoded_images", "num_freed", "num_pending", "num_registered", "num_restarts", "num_reused",
        "num_settled", "owner", "pooling", "prompt_len", "reasoning", "recurrent", "request", "slot", "stage",
        "starts_slot", "stop_ids", "tables", "tenant", "token_ids", "urgency", "wants_prompt_logprobs",
        "watch",
    )  # fmt: skip

    def __init__(
        self,
        request: GenerationRequest,
        choice: int,
        *,
        arrival_s: float,
        number: int,  # of the request: one more than that of the previous request
        chain: HashChain,
        eos_ids: frozenset[int] = frozenset(),
        leader: Sequence | None = None,  # the request's first choice
        owner: Any = None,
        tenant: str | None = None,  # the client that the request is counted against
    ) -> None:
        stop = request.stop
        self.request = request
        self.adapter = None if request.adapter is None else request.adapter.weights
        # Of its own: the runner keeps what it makes of an image for as long as the object exists, and the
        # request exists for as long as its client reads the answer.
        self.images = tuple(map(copy.copy, request.images))
        self.choice = choice
        self.arrival_s = arrival_s
        self.urgency = (arrival_s + request.priority * AGING_S, number, choice)
        self.chain = chain  # a further choice gets its own when it first runs
        self.leader = leader
        self.tenant = tenant
        self.owner = owner  # the caller's handle, opaque to the scheduler
        self.stop_ids = stop.stop_token_ids if stop.ignore_eos else stop.stop_token_ids | eos_ids
        self.max_tokens = stop.max_tokens
        self.min_tokens = stop.min_tokens
        self.wants_prompt_logprobs = request.prompt_logprobs is not None and leader is None
        self.pooling = request.pooling
        # Free text needs no grammar mask. With `min_tokens` there is no watch, as both use the slot's
        # `masked_ids`.
        self.watch = request.grammar.watch() if request.grammar and not stop.min_tokens else None
        budget = request.reasoning_budget
        self.reasoning = None if budget is None else ReasoningWatch(budget)
        self.token_ids = TokenIds(request.prompt_ids)
        self.prompt_len = len(self.token_ids)
        self.followers: list[Sequence] = []
        self.stage = Stage.WAITING if leader is None else Stage.AWAITS_LEADER
        self.epoch = 0
        self.slot = 0
        self.num_restarts = 0
        self.num_cached: int | None = None  # prompt tokens found in the cache, set with the first result
        self._reset()

    def _reset(self) -> None:
        """Hold nothing; the tables are new lists, as steps in flight may still read the old ones."""
        self.tables: tuple[list[int], ...] = ()
        self.num_freed: list[int] = []
        self.num_settled = 0
        self.num_reused = 0
        self.num_computed = 0
        self.num_pending = 0
        self.num_ahead = 0
        self.num_registered = 0
        self.num_encoded_images = 0
        self.is_prefilling = True
        self.starts_slot = True
        self.copy_sources: list[int] = []
        self.hit: Hit | None = None
        self.recurrent = RecurrentUse()

    def reset_to(self, stage: Stage) -> None:
        """Leave the running set or the queue; the caller has already released blocks and slot."""
        self.stage = stage
        self.epoch += 1
        self._reset()

    @property
    def needs_all(self) -> bool:
        """As `GenerationRequest.needs_all`, except that only the first choice has log-probabilities, once."""
        return self.wants_prompt_logprobs or (self.pooling is not None and self.pooling.needs_all)

    @property
    def num_left(self) -> int:
        """Number of known tokens that are not computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def may_decode(self) -> bool:
        """Whether its first token may be followed by others."""
        return self.pooling is None and self.max_tokens > 1

    @property
    def is_past_prompt(self) -> bool:
        """Whether the next token to compute is a sampled one."""
        return self.num_computed >= self.prompt_len

    @property
    def num_output(self) -> int:
        """Number of sampled tokens known so far."""
        return len(self.token_ids.output)

    @property
    def last_end(self) -> int:
        """End of the positions that are ever computed: the last token is sampled but never fed back."""
        return self.prompt_len + self.max_tokens - 1

    @property
    def was_preempted(self) -> bool:
        """Whether the sequence has run before and was preempted."""
        return self.epoch > 0

    @property
    def has_computed_prompt(self) -> bool:
        """Whether its table holds the prompt, as of a step before the one being planned."""
        return self.stage is Stage.RUNNING and not self.is_prefilling

    def append(self, token_id: int) -> bool:
        """Append a sampled token; return whether the slot must restart, with another mask or bias."""
        self.token_ids.output.append(token_id)
        restarts = self.reasoning is not None and self.reasoning.push(token_id)
        if self.watch is not None and self.watch.push(token_id):
            restarts = True
            if self.watch.is_over:
                self.watch = None
        return restarts

    def slot_start(self) -> SlotStart:
        """Return what the runner needs to sample this sequence's next token."""
        sampling, choice = self.request.sampling, self.choice
        if self.request.seeds:
            sampling, choice = dataclasses.replace(sampling, seed=self.request.seeds[choice]), 0
        if self.reasoning is not None and (forced_id := self.reasoning.forced_id) is not None:
            sampling = force(sampling, forced_id)
        watch = self.watch
        masked_ids: tuple[int, ...] = watch.part.masked_ids if watch is not None else ()
        if self.min_tokens:
            masked_ids = tuple(sorted(self.stop_ids))
        return SlotStart(
            slot=self.slot,
            sampling=sampling,
            choice=choice,
            prompt_ids=self.request.prompt_ids,
            output_ids=list(self.token_ids.output),
            min_tokens=self.min_tokens if watch is None else self.max_tokens,
            masked_ids=masked_ids,
            grammar=self.request.grammar if watch is None else None,
            images=self.images,
        )

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id}/{self.choice}, {self.stage.value}, "
            f"{self.num_computed}/{len(self.token_ids)}+{self.num_pending})"
        )
