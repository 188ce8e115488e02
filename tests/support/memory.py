"""How much memory tensors take on a CPU, where torch itself keeps no account."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """A context that knows, in `peak`, the most bytes held at once by tensors made inside it, graphs included."""

    def __init__(self):
        super().__init__()
        self._known, self._held, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage):
        if storage.data_ptr() not in self._known:
            self._known[storage.data_ptr()] = weakref.finalize(storage, self._forget, storage.data_ptr(), len(storage))
            self._held += len(storage)
            self.peak = max(self.peak, self._held)

    def _forget(self, pointer, size):
        del self._known[pointer]
        self._held -= size
