"""Which part of the vocabulary a rank holds, and the collectives that make parts whole."""

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from asyncopd.backends.reference.rows import ELSEWHERE, PAD
from asyncopd.ops import checks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class VocabShard:
    """This rank's ids, offset .. offset + size - 1, of a vocabulary that a process group holds together.

    Made by `VocabShard.of`, once: that is a collective and synchronises; nothing else here does. What is refused later
    is refused where it is wrong, before anything is sent: an argument that is wrong on some of the ranks only leaves
    the others waiting until the group's timeout.
    """

    group: "ProcessGroup"
    rank: int
    sizes: tuple[int, ...]  # of every rank's part, in the order of ranks

    @classmethod
    def of(cls, size: int, group: "ProcessGroup | None" = None, *, vocab: int | None = None) -> "VocabShard":
        """The shard of this rank, which holds `size` ids; every rank of the group has to call it.

        Args:
            size: V_r, rows of `lm_head_weight` here; at least 1. A padded vocabulary is held without its padding:
                give the size, and the weight, of the real rows.
            group: the ranks that split the vocabulary (the tensor-parallel group); None for all ranks.
            vocab: V, what the sizes must add up to, if known.
        Raises: TypeError, ValueError naming the argument, on every rank where one of them was given a wrong size.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("group: torch.distributed is not initialised, expected init_process_group before")
        group = dist.group.WORLD if group is None else group
        assert group is not None
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("group: this rank is not one of it, expected a group that holds the caller")
        # What is no int goes as its type's name, so that every rank refuses it.
        mine = [type(v).__name__ if isinstance(v, bool) or not isinstance(v, int | None) else v for v in (size, vocab)]
        everybody: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everybody, mine, group=group)
        for other, (its_size, its_vocab) in enumerate(everybody):
            for name, value in (("size", its_size if its_size is not None else "NoneType"), ("vocab", its_vocab)):
                if isinstance(value, str):
                    raise TypeError(f"{name}: got {value} on rank {other}, expected an int")
        sizes = tuple(size for size, _ in everybody)
        if min(sizes) < 1:
            raise ValueError(f"size: got {list(sizes)} on the ranks of the group, expected at least 1 on each")
        for other, (_, expected) in enumerate(everybody):
            if expected is not None and expected != sum(sizes):
                raise ValueError(
                    f"vocab: got {expected} on rank {other}, expected {sum(sizes)}, the sum of the sizes {list(sizes)}"
                )
        return cls(group, rank, sizes)

    @property
    def size(self) -> int:
        """V_r."""
        return self.sizes[self.rank]

    @property
    def vocab(self) -> int:
        """V."""
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        """The first id held here."""
        return list(accumulate(self.sizes, initial=0))[self.rank]

    def local_ids(self, ids: Tensor) -> Tensor:
        """Ids [N, K] of the vocabulary -> columns of this shard, or PAD, or ELSEWHERE for all the others."""
        column = ids - self.offset
        here = (column >= 0) & (column < self.size)
        return torch.where(here, column, torch.where(ids == PAD, PAD, ELSEWHERE))

    def gather(self, part: Tensor) -> Tensor:
        """[N, ..] of every rank, stacked: [ranks, N, ..]."""
        out = part.new_empty((len(self.sizes), *part.shape))
        dist.all_gather(list(out.unbind(0)), part.contiguous(), group=self.group)
        return out

    def sum(self, part: Tensor) -> Tensor:
        """The sum of every rank's tensor, in the dtype that it has; `part` may be overwritten with it."""
        part = part.contiguous()  # memory is added up as it lies, and the layout is the caller's affair on each rank
        dist.all_reduce(part, group=self.group)
        return part

    def check_head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Refuse a DTensor, which `prepare_head` would gather, and a weight that is not this shard's."""
        for name, tensor in (("hidden", hidden), ("lm_head_weight", weight), ("bias", bias)):
            if hasattr(tensor, "full_tensor"):
                raise TypeError(
                    f"{name}: got a DTensor, expected this rank's part as a plain tensor ({name}.to_local())"
                )
        checks.check_matrix("lm_head_weight", weight, "H")
        self.check_size("lm_head_weight", weight.shape, weight.shape[0])

    def check_size(self, name: str, shape: torch.Size, size: int) -> None:
        if size != self.size:
            raise ValueError(
                f"{name}: got shape {list(shape)}, expected the {self.size} ids of this shard, "
                f"{self.offset}..{self.offset + self.size - 1} of {self.vocab}"
            )


def check_shard(shard: VocabShard) -> None:
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard: got {type(shard).__name__}, expected a VocabShard (VocabShard.of(size, group))")


def whole_logsumexp(parts: Tensor) -> Tensor:
    """LSE [ranks, N] of every shard -> LSE [N] of the vocabulary, in fp64: 2^-24 of an LSE of 20 is 1e-6 of a p."""
    return torch.logsumexp(parts.double(), dim=0)
