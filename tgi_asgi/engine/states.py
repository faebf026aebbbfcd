"""States of recurrent layers that are kept so that later prompts can resume from them.

Besides keys and values, a model with recurrent layers has one state per sequence, as of its last token. A
prompt can therefore resume only at a block boundary where an earlier sequence kept its state in passing. A
state is found by the digest of the block before it and is forgotten together with that block. Places for
states are evicted like blocks, least recently used first.

    one prompt      a a a a b b b      one letter per block
    kept                        |      after its last full block
    another         a a a a c c c c    its first four blocks are found, but no state after any of them
    kept                  |     |      so its own state is kept there, too
    a third         a a a a d d        resumes after the fourth block

States are kept after the last full block of a prompt, if something follows it; after the blocks that a prompt
shares with others, if no state is there yet (the idea of Marconi, Pan et al., arXiv 2411.19379); and, for a
running answer, at its newest block boundary. They can be found once their step has succeeded. Called by the
block tables and the scheduler; knows neither torch nor asyncio.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tgi_asgi.engine.blocks import BlockPool
from tgi_asgi.engine.sequence import RecurrentUse, Sequence
from tgi_asgi.runner.plan import StateMoves, StepRow


class Keep(NamedTuple):
    """A state that a step in flight keeps."""

    place: int
    digest: bytes | None  # None: the state is the leader's, for its other choices
    leader: Sequence | None = None


class KeptStates:
    """The kept states: which rows keep theirs, in which place, and which state each place holds.

    Args:
        num_places: Number of places that the runner has.
        blocks: Pool of blocks; a state is useless without the blocks before it.
        keeps_answers: Whether sampled tokens can be found again, too.

    Attributes:
        pool: The places, managed like blocks.
    """

    def __init__(self, num_places: int, blocks: BlockPool, block_size: int, *, keeps_answers: bool) -> None:
        self.pool = BlockPool(num_places)
        self.keeps_answers = keeps_answers
        self._blocks = blocks
        self._block_size = block_size
        self._pending: set[bytes] = set()  # digests of the states that steps in flight keep
        self._num_answers = 0  # places that decoding sequences hold

    @property
    def num_known(self) -> int:
        """Number of states that can be found."""
        return self.pool.num_known

    def find_each(self, digests: list[bytes]) -> list[int | None]:
        """Return the places that hold the states after these blocks; None where none is kept."""
        return self.pool.find_each(digests)

    def lost(self, digest: bytes) -> None:
        """Forget the state after a block that can no longer be found."""
        place = self.pool.find(digest)
        if place is not None:
            self.pool.forget([place])

    def resume(self, sequence: Sequence, place: int) -> None:
        """Let a sequence start from a state that `find_each` returned, or that its leader holds."""
        self.pool.take(place)
        sequence.recurrent.resumes = place

    def fork(self, sequence: Sequence, leader: Sequence) -> None:
        """Start a further choice before the prompt's last token; the last choice releases the state there."""
        use = leader.recurrent
        assert use.for_choices is not None
        self.resume(sequence, use.for_choices)
        use.num_forks += 1
        if use.num_forks >= leader.request.n - 1:
            self.pool.release([use.for_choices])
            use.for_choices = None

    def plan_row(self, keeps: list[Keep], row: StepRow, sequence: Sequence) -> None:
        """Plan the states that a row of known tokens resumes from and keeps.

        The latter are added to `keeps`, the list of the row's step.
        """
        use, end = sequence.recurrent, row.start + row.num_tokens
        planned: list[tuple[int, int]] = []
        for position in use.keep_at:
            if row.start <= position < end and self._wants(digest := self._digest(sequence, position)):
                place = self.pool.allocate()
                planned.append((position, place))
                self._note(keeps, place, digest)
        last = sequence.prompt_len - 1
        if self._is_for_choices(sequence) and row.start <= last < end and self.pool.num_free:
            use.for_choices = place = self.pool.allocate()
            self.pool.share(place)
            planned.append((last, place))
            keeps.append(Keep(place, None, sequence))
        resumes = use.resumes if row.start == sequence.num_reused else None
        if planned or resumes is not None:
            row.states = StateMoves(resumes, planned)

    def plan_answer(self, keeps: list[Keep], row: StepRow, sequence: Sequence) -> None:
        """Keep the state before a decode row, at a block boundary, in the sequence's own place.

        Running sequences hold at most half of all places, so that other prompts can be found, too.
        """
        use, digest = sequence.recurrent, self._digest(sequence, row.start)
        if use.answer is not None and self.pool.num_holders(use.answer) > 1:  # a sequence resumes here
            self._release_answer(use)
        if not self._wants(digest, has_place=use.answer is not None):
            return
        if use.answer is None:
            if self._num_answers >= self.pool.num_blocks // 2:
                return
            use.answer = self.pool.allocate()
            self._num_answers += 1
        self.pool.forget([use.answer])
        self.pool.share(use.answer)
        row.states = StateMoves(None, ((row.start, use.answer),))
        self._note(keeps, use.answer, digest)

    def settle(self, keeps: Iterable[Keep]) -> None:
        """Make the states that a step kept findable; a digest that is already known keeps its place."""
        for keep in keeps:
            if keep.digest is not None:
                self._pending.discard(keep.digest)
                if self._blocks.find(keep.digest) is not None:
                    self.pool.register(keep.place, keep.digest)
            self.pool.release([keep.place])

    def undo(self, keeps: Iterable[Keep]) -> set[int]:
        """Undo the keeps of a failed step; return the places whose states are void."""
        void = set()
        for place, digest, leader in keeps:
            if digest is not None:
                self._pending.discard(digest)
            elif leader is not None and leader.recurrent.for_choices == place:
                leader.recurrent.for_choices = None
                self.pool.release([place])
            self.pool.release([place])
            void.add(place)
        return void

    def begin(self, sequence: Sequence) -> None:
        """Release the state that a sequence resumed from, as its first row has been computed."""
        if sequence.recurrent.resumes is not None:
            self.pool.release([sequence.recurrent.resumes])
            sequence.recurrent.resumes = None

    def release(self, sequence: Sequence) -> None:
        """Release all places that a sequence holds."""
        use = sequence.recurrent
        self.begin(sequence)
        if use.for_choices is not None:
            self.pool.release([use.for_choices])
            use.for_choices = None
        if use.answer is not None:
            self._release_answer(use)

    def _release_answer(self, use: RecurrentUse) -> None:
        assert use.answer is not None
        self.pool.release([use.answer])
        use.answer = None
        self._num_answers -= 1

    def _is_for_choices(self, sequence: Sequence) -> bool:
        """Return whether other choices wait to resume from a prompt of two or more tokens."""
        is_leader = sequence.request.n > 1 and sequence.leader is None
        has_none = sequence.recurrent.for_choices is None and sequence.num_output == 0
        return is_leader and has_none and sequence.prompt_len > 1

    def _digest(self, sequence: Sequence, position: int) -> bytes:
        return sequence.chain.digest(position // self._block_size - 1, sequence.token_ids)

    def _wants(self, digest: bytes, *, has_place: bool = False) -> bool:
        """Return whether a state should be kept and can be."""
        is_new = digest not in self._pending and self.pool.find(digest) is None
        return is_new and (has_place or self.pool.num_free > 0)

    def _note(self, keeps: list[Keep], place: int, digest: bytes) -> None:
        self._pending.add(digest)
        keeps.append(Keep(place, digest))
