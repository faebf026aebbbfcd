"""One choice of one request as the scheduler sees it: tokens, blocks, and how far they are computed."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any

from tgi_asgi.engine.prefix import HashChain
from tgi_asgi.engine.states import HeldStates
from tgi_asgi.runner.plan import SlotStart
from tgi_asgi.types import GenerationRequest

if TYPE_CHECKING:
    from tgi_asgi.text.constrain.free import Watch

AGING_S = 30.0  # seconds of waiting that make up for one level of priority


class SequenceState(enum.Enum):
    """Where a sequence is; only a RUNNING one holds a slot and blocks."""

    HELD = "held"  # a further choice, until the first one computes the prompt
    WAITING = "waiting"  # in the queue, new or preempted
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """The scheduler's state of one choice.

    `urgency` is fixed at arrival and orders sequences everywhere, smallest first: the queue, the rows of a
    step, and backwards the choice of whom to preempt. `num_computed` counts the tokens whose KV entries are
    written or being written by a step in flight, `num_taken` those among them that are others' work: cached
    ones, or a leader's; `num_pending` the tokens that steps in flight will draw at the least, `num_ahead` how
    many more they may draw and compute; `num_settled` those of `num_computed` that no step in flight writes;
    `num_seen` the first images of the prompt, which are encoded.

    `tables` has a list of blocks, by position, for each group of layers; the first `num_given_back` of each
    are behind its window, and no longer the sequence's. `epoch` changes whenever the sequence leaves the
    running set: what older steps say of it is then void.
    """

    __slots__ = (
        "adapter", "arrival_s", "chain", "choice", "copy_sources", "epoch", "followers", "is_prefilling",
        "leader", "max_tokens", "min_tokens", "num_ahead", "num_cached", "num_computed", "num_given_back",
        "num_pending", "num_registered", "num_seen", "num_settled", "num_taken", "owner", "pooling",
        "prompt_len", "request", "slot", "starts_slot", "state", "states", "stop_ids", "tables", "tenant",
        "token_ids", "urgency", "wants_prompt_logprobs", "watch",
    )  # fmt: skip

    def __init__(
        self,
        request: GenerationRequest,
        choice: int,
        *,
        arrival_s: float,
        number: int,  # of the request: one more than that of the one that arrived before
        chain: HashChain,
        eos_ids: frozenset[int] = frozenset(),
        leader: Sequence | None = None,  # the request's first choice
        owner: Any = None,
        tenant: str | None = None,  # whom it is counted for
    ) -> None:
        stop = request.stop
        self.request = request
        self.adapter = None if request.adapter is None else request.adapter.weights
        self.choice = choice
        self.arrival_s = arrival_s
        self.urgency = (arrival_s + request.priority * AGING_S, number, choice)
        self.chain = chain  # of a further choice: its own from when it first runs
        self.leader = leader
        self.tenant = tenant
        self.owner = owner  # the caller's handle; the scheduler never looks at it
        self.stop_ids = stop.stop_token_ids if stop.ignore_eos else stop.stop_token_ids | eos_ids
        self.max_tokens = stop.max_tokens
        self.min_tokens = stop.min_tokens
        self.wants_prompt_logprobs = request.prompt_logprobs is not None and leader is None
        self.pooling = request.pooling
        # While it writes free text it needs no grammar; `min_tokens` needs its list of masked ids.
        self.watch = request.grammar.watch() if request.grammar and not stop.min_tokens else None
        self.token_ids = list(request.prompt_ids)
        self.prompt_len = len(self.token_ids)
        self.followers: list[Sequence] = []
        self.state = SequenceState.WAITING if leader is None else SequenceState.HELD
        self.epoch = 0
        self.slot = 0
        self.num_cached: int | None = None  # prompt tokens taken from the cache, as of its first result
        self._reset()

    def _reset(self) -> None:
        """Hold nothing: the tables are new lists, for steps in flight may still read the old ones."""
        self.tables: tuple[list[int], ...] = ()
        self.num_given_back: list[int] = []
        self.num_settled = 0
        self.num_taken = 0
        self.num_computed = 0
        self.num_pending = 0
        self.num_ahead = 0
        self.num_registered = 0
        self.num_seen = 0
        self.is_prefilling = True
        self.starts_slot = True
        self.copy_sources: list[int] = []
        self.states = HeldStates()

    def leave(self, state: SequenceState) -> None:
        """Leave the running set (or the queue); blocks and slot have been given back."""
        self.state = state
        self.epoch += 1
        self._reset()

    @property
    def needs_all(self) -> bool:
        """Whether the runner keeps something of each prompt token: none is cached, all come in order."""
        return self.wants_prompt_logprobs or (self.pooling is not None and self.pooling.needs_all)

    @property
    def is_behind_prompt(self) -> bool:
        """Whether the next token to compute is one that was drawn."""
        return self.num_computed >= self.prompt_len

    @property
    def num_output(self) -> int:
        """Tokens drawn and known."""
        return len(self.token_ids) - self.prompt_len

    @property
    def last_end(self) -> int:
        """Behind the last position that is ever computed: the last token is only drawn."""
        return self.prompt_len + self.max_tokens - 1

    @property
    def was_preempted(self) -> bool:
        """Whether it has run before and had to leave."""
        return self.epoch > 0

    @property
    def has_computed_prompt(self) -> bool:
        """Whether its table holds the prompt, as of a step before the one that is planned."""
        return self.state is SequenceState.RUNNING and not self.is_prefilling

    def follow(self, watch: Watch) -> bool:
        """Watch the token known last; tell whether the slot must start again, as others may follow it."""
        if not watch.push(self.token_ids[-1]):
            return False
        if watch.is_over:
            self.watch = None
        return True

    def slot_start(self) -> SlotStart:
        """Return what the runner needs to draw this sequence's next token."""
        sampling, choice = self.request.sampling, self.choice
        if self.request.seeds:
            sampling, choice = dataclasses.replace(sampling, seed=self.request.seeds[choice]), 0
        watch = self.watch
        masked_ids: tuple[int, ...] = watch.part.masked_ids if watch is not None else ()
        if self.min_tokens:
            masked_ids = tuple(sorted(self.stop_ids))
        return SlotStart(
            slot=self.slot,
            sampling=sampling,
            choice=choice,
            prompt_ids=self.request.prompt_ids,
            output_ids=self.token_ids[self.prompt_len :],
            min_tokens=self.min_tokens if watch is None else self.max_tokens,
            masked_ids=masked_ids,
            grammar=self.request.grammar if watch is None else None,
            images=self.request.images,
        )

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id}/{self.choice}, {self.state.value}, "
            f"{self.num_computed}/{len(self.token_ids)}+{self.num_pending})"
        )
