"""Is the Gram matrix of a frozen head still that of the head?

It costs V·D² to make and changes only with the head, so it is kept from step to step. torch counts
most writes to a tensor, and a counted one makes it anew. Those that it does not count (through
``.data``, in inference mode) show in sums of the bits along the rows and the columns of the weight,
2·V·D reads where the Gram costs V·D² products (151,936 × 896 in bf16 on 2 cores: 19 ms beside 1.4
s). To compare them here would wait for a GPU; the device does it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16)


class KeptGram:
    """The Gram matrix of one frozen head at a time, made when it is asked for and not there.

    A copy and a pickle of it are empty, and make their own: it is of a live weight, not of a value.

    Args:
        owner: whose head it is, for the message of the error.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.drop()

    def __reduce__(self) -> tuple[type[KeptGram], tuple[str]]:
        return type(self), (self.owner,)

    def drop(self) -> None:
        """Keep nothing, as for a head that is trained."""
        self._head: list[weakref.ref[Tensor]] = []
        self._state: tuple[object, ...] = ()
        self._sums: list[Tensor] = []
        self._gram: Tensor | None = None

    def of(
        self,
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        vocab: int,
        make: Callable[[Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """G of the first `vocab` rows of the head, without a gradient.

        Args:
            weight, bias: the head.
            vocab: rows that take part.
            make: G of the head, called with both detached: `head_gram`, or one that is as good.

        Raises:
            RuntimeError: the head changed since, in a way that torch does not count (on a GPU a
                device-side assertion).
        """
        head = [weight] if bias is None else [weight, bias]
        state = (vocab, *map(_state, head))
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be trained with later
            sums = [total for x in head for total in _bit_sums(x[:vocab])]
            if self._gram is not None and state == self._state and self._is_of(head):
                self._check(sums)
            else:
                self._gram = make(weight.detach(), None if bias is None else bias.detach())
                self._head, self._state, self._sums = [weakref.ref(x) for x in head], state, sums
        return self._gram

    def _is_of(self, head: list[Tensor]) -> bool:
        """Tensors compare by entries, and so do references to them; hence `is`."""
        return all(kept() is x for kept, x in zip(self._head, head, strict=True))

    def _check(self, sums: list[Tensor]) -> None:
        same = [(now == then).all() for now, then in zip(sums, self._sums, strict=True)]
        torch.ops.aten._assert_async.msg(
            torch.stack(same).all(),
            f"{self.owner}.weight: the head changed in a way that torch does not count (through "
            ".data, or in inference mode) after its Gram matrix was made; write to it under "
            "torch.no_grad(), or make a new loss",
        )


def _state(x: Tensor) -> tuple[object, ...]:
    """What changes, for the host to see, where a tensor is written to, moved or cast in place."""
    version = None if x.is_inference() else x._version  # inference tensors have none
    return version, x.shape, x.dtype, x.device


def _bit_sums(x: Tensor) -> list[Tensor]:
    """Integers that change with the entries of (V, D) or (V,), exact in any order of adding."""
    x = x.detach().contiguous()
    step = x.shape[-1] * x.itemsize if x.ndim > 1 else x.itemsize
    offset = x.storage_offset() * x.itemsize
    kind = next(k for k in _INTEGERS if step % k.itemsize == offset % k.itemsize == 0)
    bits = x.view(kind)
    return [bits.clone()] if x.ndim == 1 else [bits.sum(0, dtype=kind), bits.sum(1, dtype=kind)]
