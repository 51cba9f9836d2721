"""Who may reuse whose blocks, and in which order they go: the pool of the rows' own text, without a model."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable

import pytest

from prefix_store.prefix import Layout
from server.engine.cached_blocks import CachedBlocks
from server.engine.kv_blocks import BLOCK_SIZE, BlockAllocator, num_blocks_for
from server.engine.sequence import PrefixRef, Row

KV = Layout(num_decoder_tokens=5)
SOFT = Layout("soft", num_decoder_tokens=5)
KV_INFIX = Layout(placement="infix", separator=7, num_decoder_tokens=5)
SOFT_INFIX = Layout("soft", placement="infix", num_decoder_tokens=5)
A, B = PrefixRef("a", KV), PrefixRef("b", KV)


def make_pool(num_blocks: int = 16) -> CachedBlocks:
    return CachedBlocks(BlockAllocator(1, num_blocks))


def text(num_tokens: int, first: int = 100) -> list[int]:
    return list(range(first, first + num_tokens))


def make_row(tokens: list[int], *prefixes: PrefixRef, tenant_id: str = "") -> Row:
    return Row(prefixes, tokens, (), 400, tenant_id)


def start(pool: CachedBlocks, row: Row) -> None:
    """As the scheduler does: begin with what is found, allocate the rest."""
    pool.hold(row, pool.find(row))
    row.block_table += pool.allocate(num_blocks_for(len(row.token_ids)) - len(row.block_table))


def sample(pool: CachedBlocks, row: Row, *tokens: int) -> None:
    """As the engine does, a step a token: all known ones are computed and the logits were finite."""
    for token in tokens:
        row.block_table += pool.allocate(num_blocks_for(len(row.token_ids)) - len(row.block_table))
        row.num_computed_tokens = len(row.token_ids)
        row.token_ids.append(token)
        pool.register(row)


def answer(pool: CachedBlocks, row: Row, *tokens: int) -> list[int]:
    """A whole request; returns the blocks that it had."""
    start(pool, row)
    sample(pool, row, *(tokens or (1,)))
    blocks = row.block_table
    pool.release(row)
    pool.check_integrity([])
    return blocks


def num_found(pool: CachedBlocks, row: Row) -> int:
    return len(pool.find(row))


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 0), (15, 0), (16, 0), (17, 1), (32, 1), (33, 2), (50, 3)])
def test_the_last_token_of_a_prompt_is_never_found(num_tokens: int, num_blocks: int) -> None:
    pool = make_pool()
    blocks = answer(pool, make_row(text(64)))
    assert pool.find(make_row(text(num_tokens))) == blocks[:num_blocks]


def test_an_answer_is_found_as_a_prompt_is() -> None:
    pool = make_pool()
    blocks = answer(pool, make_row(text(20)), *text(30, 500))
    assert pool.find(make_row([*text(20), *text(30, 500), 9])) == blocks[:3]  # 49 tokens were computed


def test_a_text_is_found_as_far_as_it_is_the_same() -> None:
    pool = make_pool()
    answer(pool, make_row(text(64)))
    for place, expected in ((0, 0), (15, 0), (16, 1), (40, 2), (63, 3)):
        other = text(65)
        other[place] = 1
        assert num_found(pool, make_row(other)) == expected, place
    moved = [*text(16, 116), *text(16)]  # the same two blocks in the other order
    assert num_found(pool, make_row([*moved, 1])) == 0


@pytest.mark.parametrize(
    "other",
    [
        make_row(text(40)),
        make_row(text(40), A),
        make_row(text(40), B, A),
        make_row(text(40), A, A, B),
        make_row(text(40), A, PrefixRef("c", KV)),
        make_row(text(40), A, PrefixRef("b", SOFT)),
        make_row(text(40), A, PrefixRef("b", Layout(num_decoder_tokens=6))),
        make_row(text(40), A, PrefixRef("b", KV_INFIX)),
        make_row(text(40), A, B, tenant_id="other"),
        make_row(text(40), A, B, tenant_id=""),
    ],
)
def test_nothing_is_shared_across_artefacts_compositions_and_tenants(other: Row) -> None:
    pool = make_pool()
    answer(pool, make_row(text(40), A, B, tenant_id="one"))
    assert num_found(pool, make_row(text(40), A, B, tenant_id="one")) == 2
    assert num_found(pool, other) == 0


def test_names_cannot_be_cut_otherwise_to_mean_another_row() -> None:
    pool = make_pool()
    answer(pool, make_row(text(40), PrefixRef("ab", KV), tenant_id="t"))
    assert num_found(pool, make_row(text(40), PrefixRef("b", KV), tenant_id="ta")) == 0
    assert num_found(pool, make_row(text(40), A, B, tenant_id="t")) == 0


@pytest.mark.parametrize("num_prompt_tokens", [16, 20, 31, 32])
def test_behind_a_kv_infix_a_text_is_another_where_its_prompt_ends_elsewhere(num_prompt_tokens: int) -> None:
    """The same token ids, the separator among them; the gap in their positions is where the prompt ends."""
    pool = make_pool()
    infix = PrefixRef("i", KV_INFIX)
    tail = text(60, 500)
    answer(pool, make_row(text(num_prompt_tokens), infix), *tail)
    longer = make_row([*text(num_prompt_tokens), 7, *tail[:30]], infix)
    assert longer.token_ids[:-1] == [*text(num_prompt_tokens), 7, *tail[:30]]
    assert num_found(pool, longer) == num_prompt_tokens // BLOCK_SIZE  # what does not see the infix
    same = make_row(text(num_prompt_tokens), infix)
    same.token_ids += tail
    assert num_found(pool, same) == (num_prompt_tokens + 60) // BLOCK_SIZE


def test_embeddings_in_the_text_are_found_behind_their_own_artefact_only() -> None:
    pool = make_pool()
    one, other = PrefixRef("one", SOFT_INFIX), PrefixRef("other", SOFT_INFIX)
    answer(pool, make_row(text(14), one), *text(20))
    again = make_row(text(14), one)
    again.token_ids += text(20)
    assert again.token_ids[14] == -1
    assert num_found(pool, again) == 2
    assert num_found(pool, make_row(text(14), other)) == 0


def test_a_text_that_depends_on_an_encoders_is_not_kept() -> None:
    pool = make_pool()
    row = Row((), text(40), (0, *text(40)), 10)
    start(pool, row)
    row.cross_table = pool.allocate(num_blocks_for(40))
    sample(pool, row, *text(8))
    pool.check_integrity([row])
    pool.release(row)
    pool.check_integrity([])
    assert (pool.num_cached, pool.num_used) == (0, 0)
    assert num_found(pool, Row((), text(40), (0, *text(40)), 10)) == 0


def test_a_block_is_free_when_its_last_holder_is_gone() -> None:
    pool = make_pool(8)
    first, second = make_row(text(40)), make_row([*text(32), 1, 2])
    start(pool, first)
    sample(pool, first, 1)
    assert (pool.num_used, pool.num_cached) == (3, 0)
    start(pool, second)
    assert second.block_table[:2] == first.block_table[:2]
    assert second.num_computed_tokens == 32
    assert pool.num_used == 4
    pool.check_integrity([first, second])
    pool.release(first)
    pool.check_integrity([second])
    assert (pool.num_used, pool.num_free, pool.num_cached) == (3, 5, 0)
    pool.release(second)
    pool.check_integrity([])
    assert (pool.num_used, pool.num_free, pool.num_cached) == (0, 8, 2)


def test_only_what_was_sampled_from_is_kept() -> None:
    """A row that ends in the middle of its prompt, or before its logits were seen."""
    pool = make_pool()
    row = make_row(text(40))
    start(pool, row)
    row.num_computed_tokens = 32
    pool.release(row)
    assert (pool.num_cached, num_found(pool, make_row(text(40)))) == (0, 0)


def test_what_two_rows_compute_at_once_is_kept_once() -> None:
    pool = make_pool()
    first, second = make_row(text(40)), make_row(text(40))
    for row in (first, second):
        start(pool, row)
    assert pool.num_used == 6
    for row, token in ((first, 1), (second, 2)):
        sample(pool, row, token)
        pool.check_integrity([first, second])
    assert first.block_table[:2] == second.block_table[:2]
    assert pool.num_used == 4
    for row in (first, second):
        pool.release(row)
    assert pool.num_cached == 2


def test_the_least_recently_used_text_goes_first_its_end_before_its_beginning() -> None:
    pool = make_pool(6)
    old, new = (answer(pool, make_row(text(48, first)))[:3] for first in (100, 500))
    assert pool.num_cached == 6
    evicted = [pool.allocate(1)[0] for _ in range(6)]
    assert evicted == [*reversed(old), *reversed(new)]


def test_what_was_used_again_stays_longer() -> None:
    pool = make_pool(7)
    old, new = (answer(pool, make_row(text(48, first)))[:3] for first in (100, 500))
    answer(pool, make_row(text(33, 100)))  # its first two blocks
    pool.allocate(1)  # the free one
    assert [pool.allocate(1)[0] for _ in range(6)] == [old[2], *reversed(new), old[1], old[0]]


def test_a_shared_beginning_outlives_each_of_its_ends() -> None:
    pool = make_pool(8)
    rows = [make_row([*text(32), *text(20, first)]) for first in (500, 600)]
    for row in rows:
        start(pool, row)
        sample(pool, row, 1)
    beginning, ends = rows[0].block_table[:2], [row.block_table[2] for row in rows]
    for row in reversed(rows):
        pool.release(row)
    pool.allocate(pool.num_free - pool.num_cached)
    assert [pool.allocate(1)[0] for _ in range(4)] == [*reversed(ends), *reversed(beginning)]


def test_cached_blocks_stay_while_there_are_free_ones_and_held_ones_always() -> None:
    pool = make_pool(8)
    cached = answer(pool, make_row(text(33, 500)))[:2]
    held = make_row(text(33))
    start(pool, held)
    sample(pool, held, 1)
    assert (pool.num_free, pool.num_cached) == (5, 2)
    taken = pool.allocate(3)
    assert pool.num_cached == 2
    assert not set(taken) & {*cached, *held.block_table}
    assert pool.can_allocate(2)
    assert not pool.can_allocate(3)
    assert set(pool.allocate(2)) == set(cached)
    assert num_found(pool, make_row(text(33))) == 2
    assert num_found(pool, make_row(text(33, 500))) == 0


def test_blocks_that_are_to_be_reused_do_not_count_as_room() -> None:
    pool = make_pool(5)
    answer(pool, make_row(text(48)))
    found = pool.find(make_row(text(60)))
    assert len(found) == 3
    assert pool.can_allocate(5)
    assert pool.can_allocate(2, found)
    assert not pool.can_allocate(3, found)
    assert pool.can_allocate(2, found + found)  # by two rows
    start(pool, make_row(text(48)))  # holds two of them
    assert pool.can_allocate(2, found[:2])  # which cost nothing now
    assert pool.can_allocate(1, found)
    assert not pool.can_allocate(2, found)


@pytest.mark.parametrize("seed", range(8))
def test_at_any_moment_a_block_holds_the_text_that_it_is_found_for(seed: int) -> None:
    """Random rows start, grow, end well, end badly; `written` is what a model would have stored in each slot."""
    choose = random.Random(seed)
    pool = make_pool(24)
    written: dict[int, list[object]] = defaultdict(lambda: [None] * BLOCK_SIZE)
    behind = [((), ""), ((), "other"), ((A,), ""), ((A, B), ""), ((B, A), ""), ((PrefixRef("i", KV_INFIX),), "")]
    rows: dict[int, tuple[Row, tuple[object, ...]]] = {}
    num_reused = num_shared = num_full = 0

    def facts(row: Row, whose: tuple[object, ...], slots: Iterable[int]) -> list[object]:
        """What K and V of a slot depend on: all text up to it."""
        seen = list(zip(row.token_ids, row.context.own_positions.tolist(), strict=False))
        return [(whose, tuple(seen[: slot + 1])) for slot in slots]

    for step in range(600):
        if choose.random() < 0.4:
            whose = choose.choice(behind)
            blocks = choose.choices((0, 1), k=choose.randrange(4))
            tokens = [token for token in blocks for _ in range(BLOCK_SIZE)] + [1] * choose.randrange(1, 9)
            row = Row(whose[0], tokens, (), 400, whose[1])
            found = pool.find(row)
            for index, block in enumerate(found):
                slots = range(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
                assert written[block] == facts(row, whose, slots), step
            num_new = num_blocks_for(len(row.token_ids)) - len(found)
            if pool.can_allocate(num_new, found):
                num_shared += bool(set(found) & {b for other, _ in rows.values() for b in other.block_table})
                start(pool, row)
                num_reused += bool(found)
                rows[step] = (row, whose)
            else:
                num_full += 1
        elif rows:
            key = choose.choice(list(rows))
            row, whose = rows[key]
            if choose.random() < 0.6:
                missing = num_blocks_for(len(row.token_ids)) - len(row.block_table)
                if pool.can_allocate(missing):
                    begin = row.num_computed_tokens
                    row.block_table += pool.allocate(missing)
                    for slot, fact in enumerate(facts(row, whose, range(begin, len(row.token_ids))), begin):
                        written[row.block_table[slot // BLOCK_SIZE]][slot % BLOCK_SIZE] = fact
                    sample(pool, row, choose.randrange(2))
            else:
                del rows[key]
                pool.release(row)
        pool.check_integrity(row for row, _ in rows.values())
    assert min(num_reused, num_shared, num_full) >= 5
