"""KV memory: one tensor of blocks for the whole server, and the free lists that hand its blocks out.

A resident prefix and a row's own text both live in blocks of this tensor, so one gather fetches what a row sees.
"""

from __future__ import annotations

import math
import mmap

import torch

from prefix_store.prefix import Layout, ModelShape
from server.engine.cpu_kernels import CpuKernels, fits
from server.engine.reach import Reach

BLOCK_SIZE = 16  # tokens
NULL_BLOCK = 0  # always zeros; pads block tables


class BlockIndex:
    """Gathers the blocks of `block_tables` `[rows, blocks]` out of a layer, for any number of heads."""

    def __init__(self, block_tables: torch.Tensor) -> None:
        self.block_tables = block_tables
        self._by_heads: dict[int, torch.Tensor] = {}

    def of(self, num_kv_heads: int, num_blocks: int, device: torch.device) -> torch.Tensor:
        """`[2 * rows * num_kv_heads * blocks]`: heads of keys, then heads of values, in a pool of `num_blocks`."""
        found = self._by_heads.get(num_kv_heads)
        if found is None:
            heads = torch.arange(num_kv_heads)[None, :, None]
            keys = (self.block_tables[:, None, :] * num_kv_heads + heads).reshape(-1)
            found = torch.cat((keys, keys + num_blocks * num_kv_heads)).to(device)
            self._by_heads[num_kv_heads] = found
        return found


class KVBlocks:
    """`layers[i]` is what decoder layer i reads, `[2, num_blocks, num_kv_heads, block_size * dim]`, keys before values;
    layers without keys and values of their own have another layer's tensor. `dim` is the wider one of the layer's keys
    and values: the narrower ones end in zeros.

    Heads come before tokens inside a block, so gathered blocks form `[rows * kv_heads, tokens, dim]`,
    the shape of the batched products, without a transpose. `kernels` stays None where they do not fit.
    """

    def __init__(
        self, shape: ModelShape, num_blocks: int, device: torch.device, kernels: CpuKernels | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.dtype = shape.dtype
        self.device = device
        shapes = [shape.layer(layer) for layer in range(_depth(shape))]
        self.sources = [layer.source for layer in shapes]
        self.reaches = [Reach(layer.window, layer.chunk) for layer in shapes]
        sizes = {i: (2, num_blocks, heads, BLOCK_SIZE * dim) for i, (heads, dim) in _own_layers(shape).items()}
        own = {i: _zeros(size, shape.dtype, device) for i, size in sizes.items()}
        self.layers = [own[source] for source in self.sources]
        self._own = list(own.values())
        is_fit = all(fits(device, shape.dtype, layer.shape[3] // BLOCK_SIZE) for layer in self._own)
        self.kernels = kernels if is_fit else None

    def write(self, layer: int, slot_mapping: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store `key` and `value`, each `[num_kv_heads, num_tokens, its width]`, at `slot_mapping` (from `slots`)."""
        dim = self.layers[layer].shape[3] // BLOCK_SIZE
        key, value = as_wide(key, dim), as_wide(value, dim)
        is_dense = key.stride(-1) == value.stride(-1) == 1
        if self.kernels is not None and is_dense and key.dtype is value.dtype is self.dtype:
            self.kernels.write_kv(self.layers[layer], slot_mapping, key, value)
            return
        _, num_blocks, num_kv_heads, _ = self.layers[layer].shape
        blocks = self.layers[layer].view(2, num_blocks, num_kv_heads, BLOCK_SIZE, -1)
        kv = torch.stack((key, value)).permute(2, 0, 1, 3)
        blocks[:, slot_mapping // BLOCK_SIZE, :, slot_mapping % BLOCK_SIZE] = kv

    def gather(self, layer: int, index: BlockIndex, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of rows' blocks, each `[num_rows * num_kv_heads, tokens, dim]`."""
        _, num_blocks, num_kv_heads, block_width = self.layers[layer].shape
        blocks = self.layers[layer].view(-1, block_width)
        gathered = blocks.index_select(0, index.of(num_kv_heads, num_blocks, self.device))
        gathered = gathered.view(2, num_rows * num_kv_heads, -1, block_width // BLOCK_SIZE)
        return gathered[0], gathered[1]

    def slots(self, block_ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """The `slot_mapping` of `offsets` in `block_ids`, each `[num_tokens]`."""
        return (block_ids * BLOCK_SIZE + offsets).to(self.device)

    def is_finite(self, block_ids: list[int]) -> bool:
        index = torch.tensor(block_ids, device=self.device)
        return all(bool(torch.isfinite(layer.index_select(1, index)).all()) for layer in self._own)

    def is_all_finite(self) -> bool:
        return all(bool(torch.isfinite(layer).all()) for layer in self._own)

    def clear(self, block_ids: list[int]) -> None:
        """Zero blocks that may hold values that are not finite: a masked key's weight is 0, and 0 * NaN is NaN."""
        index = torch.tensor(block_ids, device=self.device)
        for layer in self._own:
            layer.index_fill_(1, index, 0)


def as_wide(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """`[..., dim]`, zeros behind: they add nothing to a query's product with a key, and nothing to what it takes."""
    missing = dim - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


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
    num_values = sum(heads * dim for heads, dim in _own_layers(shape).values())
    return 2 * BLOCK_SIZE * num_values * shape.dtype.itemsize


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


def _own_layers(shape: ModelShape) -> dict[int, tuple[int, int]]:
    """Heads and width of every layer with keys and values of its own."""
    own = range(_depth(shape)) if shape.is_encoder_decoder else shape.kv_layers
    layers = {index: shape.layer(index) for index in own}
    return {index: (layer.num_kv_heads, max(layer.key_dim, layer.value_dim)) for index, layer in layers.items()}


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU the kernel gives zeroed memory when a block is first written, in huge pages where it has them: a server
    starts without touching the whole pool and holds as much of it as it has used."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(size) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(size)
