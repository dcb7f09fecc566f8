"""A stand-in for CUDA graphs, so that what is captured and replayed can be tested without a GPU."""

from __future__ import annotations

import ctypes
import gc
import itertools

import torch

from fsvd_compile.cuda_graph import CudaApi


def extent(tensor: torch.Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 0 if 0 in tensor.shape else 1 + sum((n - 1) * s for n, s in steps)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_strided((extent(tensor),), (1,))


def at_address(tensor: torch.Tensor):
    """A function that makes a tensor like this one from its raw address, without holding it."""
    pointer, count, dtype = tensor.data_ptr(), extent(tensor), tensor.dtype
    size, stride = tensor.shape, tensor.stride()
    if not count:
        return lambda: torch.empty(size, dtype=dtype)

    def make():
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
        return torch.frombuffer(memory, dtype=dtype).as_strided(size, stride)

    return make


class FakeApi(CudaApi):
    """CUDA graphs as far as the contract goes, on a CPU.

    A capture leaves all inputs as they were and garbage in the outputs, as kernels do not run; a
    replay reads and writes raw addresses and holds no tensor.
    """

    device_type = "cpu"

    def __init__(self):
        super().__init__()
        self.capturing = self.replaying = False
        self.copies = 0  # tensors copied in
        self.copy_calls = 0
        self.pools = []  # one per capture
        self.handles = itertools.count()
        self.stream = 0
        self.joins = []
        self.collecting = []

    def is_capturing(self):
        return self.capturing or self.replaying

    def new_pool(self):
        return next(self.handles)

    def capture(self, fn, args, pool, device):
        self.collecting.append(gc.isenabled())
        self.pools.append(pool)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        before = [(flat(t), flat(t).clone()) for t in tensors]
        storages = {t.untyped_storage().data_ptr() for t in tensors}
        self.capturing = True
        try:
            outputs = fn(*args)
        finally:
            self.capturing = False
            for memory, values in before:
                memory.copy_(values)
        for out in outputs:
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in storages:
                flat(out).fill_(113)
        takes = [at_address(a) if isinstance(a, torch.Tensor) else lambda a=a: a for a in args]
        gives = [at_address(o) if isinstance(o, torch.Tensor) else None for o in outputs]

        def graph():
            self.replaying = True  # no Python of `fn` would run: nested callables keep out
            outputs = fn(*[take() for take in takes])
            self.replaying = False
            for give, out in zip(gives, outputs, strict=True):
                if give is not None:
                    flat(give()).copy_(flat(out).clone())

        return graph, outputs

    def replay(self, graph):
        graph()

    def copy(self, destinations, sources):
        self.copy_calls += 1
        self.copies += len(destinations)
        super().copy(destinations, sources)

    def stream_id(self, device):
        return self.stream

    def join(self, device, earlier):
        self.joins.append((earlier, self.stream))
        return self.stream

    def synchronize(self, device):
        pass
