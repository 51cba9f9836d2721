"""KV memory: one tensor of blocks for the whole server, and the free lists that hand its blocks out.

A resident prefix and a row's own text both live in blocks of this tensor, so one gather fetches what a row sees.
"""

from __future__ import annotations

import math
import mmap

import torch

from prefix_store.prefix import Layout, ModelShape
from server.engine.cpu_kernels import CpuKernels, fits

BLOCK_SIZE = 16  # tokens
NULL_BLOCK = 0  # always zeros; pads block tables


class KVBlocks:
    """`kv` is `[layers, 2, num_blocks, num_kv_heads, block_size * head_dim]`, keys before values.

    Heads come before tokens inside a block, so gathered blocks form `[rows * kv_heads, tokens, head_dim]`,
    the shape of the batched products, without a transpose. `kernels` stays None where they do not fit.
    """

    def __init__(
        self, shape: ModelShape, num_blocks: int, device: torch.device, kernels: CpuKernels | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.num_kv_heads = shape.num_kv_heads
        self.head_dim = shape.head_dim
        self.dtype = shape.dtype
        self.device = device
        size = (_depth(shape), 2, num_blocks, shape.num_kv_heads, BLOCK_SIZE * shape.head_dim)
        self.kv = _zeros(size, shape.dtype, device)
        self.kernels = kernels if fits(device, shape.dtype, shape.head_dim) else None
        self.layers = list(self.kv)
        self._blocks = [layer.view(-1, BLOCK_SIZE * shape.head_dim) for layer in self.kv]
        self._slots = [layer.view(-1, shape.head_dim) for layer in self.kv]

    def write(self, layer: int, slot_mapping: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store `key` and `value`, each `[num_kv_heads, num_tokens, head_dim]`, at `slot_mapping` (from `slots`)."""
        is_dense = key.stride(-1) == value.stride(-1) == 1
        if self.kernels is not None and is_dense and key.dtype is value.dtype is self.dtype:
            self.kernels.write_kv(self.layers[layer], slot_mapping, key, value)
            return
        if self.kernels is not None:
            slot_mapping = self._expanded(slot_mapping)
        self._slots[layer].index_copy_(0, slot_mapping, torch.cat((key, value)).reshape(-1, self.head_dim))

    def gather(self, layer: int, block_index: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of rows' blocks, each `[num_rows * num_kv_heads, tokens, head_dim]`; `block_index` from `blocks`."""
        size = (2, num_rows * self.num_kv_heads, -1, self.head_dim)
        gathered = self._blocks[layer].index_select(0, block_index).view(size)
        return gathered[0], gathered[1]

    def slots(self, block_ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """The `slot_mapping` of `offsets` in `block_ids`, each `[num_tokens]`: a slot a token for the kernels, a place
        of each head's key and value `[2 * num_kv_heads * num_tokens]` without them."""
        slots = block_ids * BLOCK_SIZE + offsets
        return slots if self.kernels is not None else self._expanded(slots)

    def _expanded(self, slots: torch.Tensor) -> torch.Tensor:
        heads = torch.arange(self.num_kv_heads)[:, None]
        keys = (slots // BLOCK_SIZE * self.num_kv_heads + heads) * BLOCK_SIZE + slots % BLOCK_SIZE
        values = keys + self.num_blocks * self.num_kv_heads * BLOCK_SIZE
        return torch.cat((keys, values)).reshape(-1).to(self.device)

    def blocks(self, block_tables: torch.Tensor) -> torch.Tensor:
        """The gather index `[2 * rows * num_kv_heads * blocks]` of `block_tables` `[rows, blocks]`."""
        heads = torch.arange(self.num_kv_heads)[None, :, None]
        keys = (block_tables[:, None, :] * self.num_kv_heads + heads).reshape(-1)
        return torch.cat((keys, keys + self.num_blocks * self.num_kv_heads)).to(self.device)

    def is_finite(self, block_ids: list[int]) -> bool:
        return bool(torch.isfinite(self.kv.index_select(2, torch.tensor(block_ids, device=self.device))).all())

    def clear(self, block_ids: list[int]) -> None:
        """Zero blocks that may hold values that are not finite: a masked key's weight is 0, and 0 * NaN is NaN."""
        self.kv.index_fill_(2, torch.tensor(block_ids, device=self.device), 0)


class BlockAllocator:
    """Hands out the block ids `first .. first + num_blocks - 1`. Resident + free = the pool at any time."""

    def __init__(self, first: int, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(first + num_blocks - 1, first - 1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        assert self.can_allocate(num_blocks)
        return [self._free.pop() for _ in range(num_blocks)]

    def release(self, block_ids: list[int]) -> None:
        self._free.extend(reversed(block_ids))
        assert len(self._free) <= self.num_blocks, "a block was released twice"

    def free_ids(self) -> frozenset[int]:
        """For integrity checks: the free ids, which must be distinct."""
        free = frozenset(self._free)
        assert len(free) == len(self._free), "a block stands twice in the free list"
        return free


def num_blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


def split_pool(kv_tokens: int, prefix_tokens: int) -> tuple[int, int]:
    """Blocks of the whole pool (with the null block) and of its prefix part."""
    num_prefix_blocks = num_blocks_for(prefix_tokens)
    return 1 + num_prefix_blocks + num_blocks_for(kv_tokens), num_prefix_blocks


def block_bytes(shape: ModelShape) -> int:
    """Bytes of one block over all layers, keys and values."""
    return _depth(shape) * 2 * shape.num_kv_heads * BLOCK_SIZE * shape.head_dim * shape.dtype.itemsize


def prefix_blocks(layout: Layout, shape: ModelShape) -> int:
    """Blocks that a resident prefix takes. One that stays embeddings stands beside the pool and takes its bytes' worth,
    so that the pool's size bounds all of them together."""
    if layout.stays_embeddings:
        num_bytes = layout.num_virtual_tokens * shape.hidden_size * shape.dtype.itemsize
        return -(-num_bytes // block_bytes(shape))
    return sum(
        num_blocks_for(n) for n in (layout.num_decoder_tokens, layout.num_encoder_tokens, layout.num_cross_tokens)
    )


def _depth(shape: ModelShape) -> int:
    """An encoder's K and V pass through the blocks that later hold its row's cross-attention."""
    return max(shape.num_layers, shape.num_encoder_layers)


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU the kernel gives zeroed memory when a block is first written, in huge pages where it has them: a server
    starts without touching the whole pool and holds as much of it as it has used."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(size) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(size)
