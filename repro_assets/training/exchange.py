"""Ranks: who takes part, and sums whose bits do not depend on how many ranks there are.

A gradient is summed in the order of the micro-batches, whoever computed them. What is summed, and when, is `loop.py`.
"""

import os
import time
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from repro_assets.training.job import TrainingError


class World(msgspec.Struct, frozen=True):
    """One rank's place: `rank` of `size`, `local` index on its node, and the device that it computes on."""

    rank: int
    size: int
    local: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def node_leader(self) -> int:
        """Rank of the first process on this node (torchrun and srun number the ranks of a node one after the other)."""
        return self.rank - self.local


def join() -> World:
    """Join the process group that torchrun's environment describes; alone when there is none. Asserts size and backend."""
    size, rank, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise TrainingError(
                f"rank {rank}: local rank {local} but {torch.cuda.device_count()} GPUs on this node; start fewer ranks a node"
            )
        torch.cuda.set_device(device)
    if size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30), device_id=device if device.type == "cuda" else None)
        if dist.get_world_size() != size or dist.get_rank() != rank or dist.get_backend() != backend:
            raise TrainingError(
                f"process group: {dist.get_backend()} rank {dist.get_rank()} of {dist.get_world_size()}, "
                f"the environment says {backend} rank {rank} of {size}; start the ranks with torchrun"
            )
    return World(rank, size, local, device)


def leave(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def any_rank(world: World, flag: bool) -> bool:
    """Whether `flag` holds on any rank; every rank must ask."""
    if world.size == 1:
        return flag
    shared = torch.tensor([int(flag)], dtype=torch.int32, device=world.device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())


def gather_bytes(world: World, data: bytes) -> list[bytes]:
    """`data` of every rank, in rank order, on every rank."""
    if world.size == 1:
        return [data]
    length = torch.tensor([len(data)], dtype=torch.int64, device=world.device)
    lengths = [torch.zeros_like(length) for _ in range(world.size)]
    dist.all_gather(lengths, length)
    longest = max(int(item.item()) for item in lengths)
    padded = torch.zeros(max(longest, 1), dtype=torch.uint8, device=world.device)
    if data:
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(world.device)
    parts = [torch.zeros_like(padded) for _ in range(world.size)]
    dist.all_gather(parts, padded)
    return [bytes(part[: int(size.item())].cpu().numpy().tobytes()) for part, size in zip(parts, lengths, strict=True)]


def agree(world: World, what: str, value: str) -> None:
    """Raise TrainingError unless every rank holds the same `value`."""
    values = [item.decode() for item in gather_bytes(world, value.encode())]
    for rank, other in enumerate(values):
        if other != values[0]:
            raise TrainingError(f"{what}: rank {rank} has {other}, rank 0 has {values[0]}; the nodes differ in software, data or hardware")


def shared_values(world: World, values: torch.Tensor) -> torch.Tensor:
    """Sum of float64 `values` of which each element is non-zero on one rank only, which makes the sum exact in any order."""
    if world.size > 1:
        on_device = values.to(world.device)
        dist.all_reduce(on_device)
        return on_device.cpu()
    return values


class OrderedSum:
    """Sum of vectors that come in rounds, one a rank and round, in the order (round, rank): the order of the micro-batches.

    In each round the ranks exchange slices (all_to_all) and every rank adds its slice of all of them in rank order; at the end the
    slices are gathered. The additions are those that one rank alone would do, so that the bits do not depend on the world size.
    `numel`: length of the vectors (float32). `seconds`: time spent in exchanges.
    """

    def __init__(self, world: World, numel: int) -> None:
        self.world, self.numel, self.seconds = world, numel, 0.0
        self.slice = -(-numel // world.size)
        self.mine = torch.zeros(self.slice, device=world.device)
        if world.size > 1:
            self.received = torch.empty(self.slice * world.size, device=world.device)

    def vector(self) -> torch.Tensor:
        """A zeroed vector for `add`, padded so that it divides by the world size."""
        return torch.zeros(self.slice * self.world.size, device=self.world.device)

    def start(self) -> None:
        self.mine.zero_()

    def add(self, vector: torch.Tensor) -> None:
        """Add one round. Every rank must call it in every round; a rank without a micro-batch adds zeros."""
        if self.world.size == 1:
            self.mine.add_(vector)
            return
        began = time.perf_counter()
        dist.all_to_all_single(self.received, vector)
        for part in self.received.view(self.world.size, self.slice):
            self.mine.add_(part)
        self.seconds += time.perf_counter() - began

    def total(self) -> torch.Tensor:
        """The whole sum, on every rank, of `numel` elements. Valid until the next `start`."""
        if self.world.size == 1:
            return self.mine
        began = time.perf_counter()
        whole = torch.empty(self.slice * self.world.size, device=self.world.device)
        dist.all_gather_into_tensor(whole, self.mine)
        self.seconds += time.perf_counter() - began
        return whole[: self.numel]
