"""Peak memory counted in tensors: the same figure on every device, every time.

The process's resident size would not do: allocators keep what they have freed, so the second of two candidates looks free.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """While entered, `peak` is the most bytes that a model's weights and the tensors made since held at one time.

    What a kernel allocates and frees within itself is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._alive: set[int] = set()
        self._held = self.peak = 0
        for tensor in (*model.parameters(), *model.buffers()):
            self._hold(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._hold(leaf)
        return made

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:  # else a view of, or a write into, what is counted already
            self._alive.add(storage._cdata)
            self._held += storage.nbytes()
            self.peak = max(self.peak, self._held)
            weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._held -= size
