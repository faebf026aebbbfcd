"""States that are kept of sequences: where prompts can be gone on with, of models with recurrent layers.

What such a model has of a text beside keys and values is one state, as of its last token. So a prompt is
resumed at a block boundary where the state was kept that was there in passing. Each is found by the digest of
the block before it, and forgotten with that; places are given up as blocks are, the longest unused first.

    one prompt      a a a a b b b      a letter a block
    kept                        |      where its last full block ends
    another         a a a a c c c c    its first four blocks are found, and a state behind none of them
    kept                  |     |      so its own is kept there, too
    a third         a a a a d d        goes on behind the fourth block

Kept are states where the last full block of a prompt ends, if something follows; where the blocks end that it
shares with others, if no state is there (the idea of Marconi, Pan et al., arXiv 2411.19379); and of an answer
that runs the one at the newest boundary. They can be found once their step has succeeded. Called by the block
tables and the scheduler; knows neither torch nor asyncio.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tgi_asgi.engine.blocks import BlockPool
from tgi_asgi.runner.plan import StateMoves, StepRow

if TYPE_CHECKING:
    from tgi_asgi.engine.sequence import Sequence


@dataclass(slots=True)
class HeldStates:
    """What a sequence that runs has to do with kept states; places that it holds nobody else is given."""

    resumes: int | None = None  # the place that its first row goes on from, until that has been computed
    keep_at: tuple[int, ...] = ()  # positions, ascending
    for_choices: int | None = None  # the place in front of the prompt's last token, for the other choices
    num_forks: int = 0  # of those that have gone on from there
    answer: int | None = None  # the place of what it keeps while it decodes


class Keep(NamedTuple):
    """A state that a step in flight keeps."""

    place: int
    digest: bytes | None  # None: it is the leader's, for its other choices
    leader: Sequence | None = None


class KeptStates:
    """Say which rows keep their state, and where; remember which is where.

    Args:
        num_places: of the runner.
        blocks: the pool of blocks; a state is no use without those before it.
        keeps_answers: also what was drawn is found again.

    Attributes:
        pool: the places, in the manner of blocks.
    """

    def __init__(self, num_places: int, blocks: BlockPool, block_size: int, *, keeps_answers: bool) -> None:
        self.pool = BlockPool(num_places)
        self.keeps_answers = keeps_answers
        self._blocks = blocks
        self._block_size = block_size
        self._pending: set[bytes] = set()  # what steps in flight keep
        self._num_answers = 0  # places that sequences hold which decode

    @property
    def num_known(self) -> int:
        """How many can be found."""
        return self.pool.num_known

    def find(self, digest: bytes) -> int | None:
        """Return the place with the state behind this block."""
        return self.pool.find(digest)

    def lost(self, digest: bytes) -> None:
        """Learn that a block can no longer be found."""
        place = self.pool.find(digest)
        if place is not None:
            self.pool.forget([place])

    def resume(self, sequence: Sequence, place: int) -> None:
        """Let a sequence begin with a state that `find` returned, or that its leader holds."""
        self.pool.take(place)
        sequence.states.resumes = place

    def fork(self, sequence: Sequence, leader: Sequence) -> None:
        """Let a further choice begin in front of the prompt's last token; the last one ends the keeping."""
        held = leader.states
        assert held.for_choices is not None
        self.resume(sequence, held.for_choices)
        held.num_forks += 1
        if held.num_forks >= leader.request.n - 1:
            self.pool.release([held.for_choices])
            held.for_choices = None

    def plan_row(self, keeps: list[Keep], row: StepRow, sequence: Sequence) -> None:
        """Say what becomes of the states of a row of known tokens; `keeps` are its step's."""
        held, end = sequence.states, row.start + row.num_tokens
        planned: list[tuple[int, int]] = []
        for position in held.keep_at:
            if row.start <= position < end and self._wants(digest := self._digest(sequence, position)):
                place = self.pool.allocate()
                planned.append((position, place))
                self._note(keeps, place, digest)
        last = sequence.prompt_len - 1
        if self._is_for_choices(sequence) and row.start <= last < end and self.pool.num_free:
            held.for_choices = place = self.pool.allocate()
            self.pool.share(place)
            planned.append((last, place))
            keeps.append(Keep(place, None, sequence))
        resumes = held.resumes if row.start == sequence.num_taken else None
        if planned or resumes is not None:
            row.states = StateMoves(resumes, planned)

    def plan_answer(self, keeps: list[Keep], row: StepRow, sequence: Sequence) -> None:
        """Keep the state in front of a row that decodes, at a block boundary, in the sequence's own place.

        At most half of all places are held by sequences that run: others' prompts want to be found, too.
        """
        held, digest = sequence.states, self._digest(sequence, row.start)
        if held.answer is not None and self.pool.num_holders(held.answer) > 1:  # somebody begins with it
            self._leave_answer(held)
        if not self._wants(digest, has_place=held.answer is not None):
            return
        if held.answer is None:
            if self._num_answers >= self.pool.num_blocks // 2:
                return
            held.answer = self.pool.allocate()
            self._num_answers += 1
        self.pool.forget([held.answer])
        self.pool.share(held.answer)
        row.states = StateMoves(None, ((row.start, held.answer),))
        self._note(keeps, held.answer, digest)

    def settle(self, keeps: Iterable[Keep]) -> None:
        """Make findable what a step has kept; a digest that is known already keeps its place."""
        for keep in keeps:
            if keep.digest is not None:
                self._pending.discard(keep.digest)
                if self._blocks.find(keep.digest) is not None:
                    self.pool.register(keep.place, keep.digest)
            self.pool.release([keep.place])

    def undo(self, keeps: Iterable[Keep]) -> set[int]:
        """Learn that a step has failed; return the places whose states are void."""
        void = set()
        for place, digest, leader in keeps:
            if digest is not None:
                self._pending.discard(digest)
            elif leader is not None and leader.states.for_choices == place:
                leader.states.for_choices = None
                self.pool.release([place])
            self.pool.release([place])
            void.add(place)
        return void

    def begin(self, sequence: Sequence) -> None:
        """Learn that the first row of a sequence has been computed."""
        if sequence.states.resumes is not None:
            self.pool.release([sequence.states.resumes])
            sequence.states.resumes = None

    def leave(self, sequence: Sequence) -> None:
        """Take back all that a sequence holds."""
        held = sequence.states
        self.begin(sequence)
        if held.for_choices is not None:
            self.pool.release([held.for_choices])
            held.for_choices = None
        if held.answer is not None:
            self._leave_answer(held)

    def _leave_answer(self, held: HeldStates) -> None:
        assert held.answer is not None
        self.pool.release([held.answer])
        held.answer = None
        self._num_answers -= 1

    def _is_for_choices(self, sequence: Sequence) -> bool:
        """Tell whether others wait to go on from a prompt: from its second token on."""
        is_leader = sequence.request.n > 1 and sequence.leader is None
        has_none = sequence.states.for_choices is None and sequence.num_output == 0
        return is_leader and has_none and sequence.prompt_len > 1

    def _digest(self, sequence: Sequence, position: int) -> bytes:
        return sequence.chain.digest(position // self._block_size - 1, sequence.token_ids)

    def _wants(self, digest: bytes, *, has_place: bool = False) -> bool:
        """Tell whether a state is to be kept, and can be."""
        is_new = digest not in self._pending and self.pool.find(digest) is None
        return is_new and (has_place or self.pool.num_free > 0)

    def _note(self, keeps: list[Keep], place: int, digest: bytes) -> None:
        self._pending.add(digest)
        keeps.append(Keep(place, digest))
