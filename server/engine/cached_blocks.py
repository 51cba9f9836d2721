"""The blocks of the rows' own text: who holds them, and which hold text that may come again (cached tokens)."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from server.engine.kv_blocks import BLOCK_SIZE, BlockAllocator
from server.engine.sequence import Row


class CachedBlocks:
    """Rows whose text begins alike, behind the same prefixes, share the full blocks of that beginning.

    A block is registered under its `Row.block_hash` once a step has shown that it is finite, and is not written again.
    A registered block that nobody holds is cached: it counts as free and is evicted, least recently used first, when
    an allocation needs it. A row that holds one holds all before it and releases the last first, so the end of a text
    is evicted before its beginning. Used from the step's thread only.
    """

    def __init__(self, allocator: BlockAllocator, *, shares_soft_text: bool = True) -> None:
        """`shares_soft_text` is false for a model that computes something else from embeddings than from ids: what a
        soft prompt's row computed by id, a longer prompt behind it would have as embeddings."""
        self._allocator = allocator
        self._shares_soft_text = shares_soft_text
        self._registered: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}  # of the registered blocks
        self._num_holders: dict[int, int] = {}  # of the registered blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_blocks(self) -> int:
        return self._allocator.num_blocks

    @property
    def num_free(self) -> int:
        return self._allocator.num_free + len(self._cached)

    @property
    def num_used(self) -> int:
        """Held by rows."""
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def find(self, row: Row) -> list[int]:
        """The registered blocks with which its text begins. The last token is in none: its logits are still wanted."""
        found: list[int] = []
        if not self._may_share(row):
            return found
        for index in range(row.num_reusable_blocks):
            block = self._registered.get(row.block_hash(index))
            if block is None:
                break
            found.append(block)
        return found

    def can_allocate(self, num_blocks: int, reused: Iterable[int] = ()) -> bool:
        """Whether so many can be allocated once the `reused` ones are held."""
        return num_blocks + len(self._cached.keys() & set(reused)) <= self.num_free

    def hold(self, row: Row, found: list[int]) -> None:
        """Begin the text of `row` with what `find` gave."""
        assert not row.block_table
        for block in found:
            self._hold(block)
        row.block_table = list(found)
        row.num_registered_blocks = len(found)
        row.num_computed_tokens = len(found) * BLOCK_SIZE

    def allocate(self, num_blocks: int) -> list[int]:
        assert self.can_allocate(num_blocks)
        for _ in range(num_blocks - self._allocator.num_free):
            block, _ = self._cached.popitem(last=False)
            del self._registered[self._hashes.pop(block)], self._num_holders[block]
            self._allocator.release([block])
        return self._allocator.allocate(num_blocks)

    def register(self, row: Row) -> None:
        """Share what `row` has filled since the last time. All that it computed must be known to be finite."""
        if row.encoder_ids or not self._may_share(row):
            return
        for index in range(row.num_registered_blocks, row.num_computed_tokens // BLOCK_SIZE):
            block_hash, block = row.block_hash(index), row.block_table[index]
            known = self._registered.get(block_hash)
            if known is None:
                self._registered[block_hash] = block
                self._hashes[block] = block_hash
                self._num_holders[block] = 1
            else:  # another row computed the same meanwhile
                self._hold(known)
                row.block_table[index] = known
                self._allocator.release([block])
            row.num_registered_blocks = index + 1

    def release(self, row: Row) -> None:
        """Take all blocks from `row`. Those not registered must be finite, or cleared."""
        for block in reversed(row.block_table[: row.num_registered_blocks]):
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                self._cached[block] = None
        self._allocator.release(row.unregistered_blocks)
        row.drop_computed()

    def check_integrity(self, rows: Iterable[Row]) -> None:
        """Every block of the pool is free, cached or held; a row holds its own and registered ones. For tests."""
        rows = list(rows)
        shared = Counter(block for row in rows for block in row.block_table[: row.num_registered_blocks])
        own = [block for row in rows for block in row.unregistered_blocks]
        assert len(own) == len(set(own)), "two rows write to one block"
        assert not self._hashes.keys() & set(own), "a registered block is written to"
        assert {block: block_hash for block_hash, block in self._registered.items()} == self._hashes
        assert self._num_holders == {block: shared[block] for block in self._hashes}, "a holder is not counted"
        assert self._cached.keys() == self._hashes.keys() - shared.keys(), "a cached block is held, or one is lost"
        used = {*own, *self._hashes}
        assert not self._allocator.free_ids() & used, "a used block is in the free list"
        assert len(used) == self._allocator.num_used, "a block leaked"
        for row in rows:
            for index, block in enumerate(row.block_table[: row.num_registered_blocks]):
                assert self._hashes[block] == row.block_hash(index), "a row holds another text's block"
            assert row.num_registered_blocks * BLOCK_SIZE <= row.num_computed_tokens < len(row.token_ids)

    def _may_share(self, row: Row) -> bool:
        return self._shares_soft_text or not row.is_soft

    def _hold(self, block: int) -> None:
        self._cached.pop(block, None)
        self._num_holders[block] += 1
