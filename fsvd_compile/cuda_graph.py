"""CUDA graphs for compiled callables: captured once per set of addresses, replayed from then on.

A graph holds raw addresses. `GraphedCallable` states when they are the right ones (every other call
runs the callable itself), `GraphPool` what graphs that share memory may expect of each other.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import itertools
import logging
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fsvd_compile.kernels._triton import own_capture

log = logging.getLogger(__name__)

# About this many replays pay for one capture (synchronise, record, instantiate: a few plain calls).
PAYBACK = 8
MOST_PATIENCE = 1024

_returning = contextvars.ContextVar("returning", default=False)

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_CONSTANT = (int, bool, str, type(None))  # no float: 0.0 == -0.0, and NaN is not NaN


@contextlib.contextmanager
def returning_addresses() -> Iterator[None]:
    """While it lasts, who calls promises that the addresses of these calls come again, see `GraphedCallable`, 2."""
    before = _returning.set(True)
    try:
        yield
    finally:
        _returning.reset(before)


def _same_pointers(tensors: list, pointers: list, indices: list) -> bool:
    return all(tensors[i].data_ptr() == pointers[i] for i in indices)


# One C++ loop over what may be 500 inputs; only CUDA builds of torch have it.
_same_pointers = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", _same_pointers)


class _OnStream(TorchDispatchMode):
    """Runs each operator on one stream, whichever is current."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch.cuda.stream(self._stream):
            return func(*args, **(kwargs or {}))


class _Graph(torch.cuda.CUDAGraph):
    """A graph that runs nothing on the stream of its capture.

    As a capture begins, torch 2.11 fills two tensors of the random generator by kernels on the current stream, which
    has to be that of the capture. Some kernels on a second stream, and every graph of the process is 1.5 to 4 %
    slower from then on (H200; bench/NOTES.md).
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        super().__init__()
        self._callers = stream

    def __new__(cls, stream: torch.cuda.Stream):
        return super().__new__(cls)

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        with _OnStream(self._callers):
            super().capture_begin(*args, **kwargs)


class CudaApi:
    """The CUDA calls in use, in one place so that the logic can be tested without a GPU."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._side: dict[torch.device, torch.cuda.Stream] = {}

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, fn: Callable, args: list, pool: Any, device: torch.device) -> tuple[Any, Any]:
        """Records `fn(*args)` without running its kernels; returns the graph and the outputs.

        Always on one side stream: the allocator reuses a pool's blocks per stream. cuBLAS keeps a
        workspace per (handle, stream) whose address goes into the graph. Workspaces are dropped
        before, as one in ordinary memory could be freed under the graph, and after, as the
        destructor of any other graph of the stream may drop it (pytorch#193402); in between, it is
        an allocation of the pool like any other. torch's cudagraph trees do the same.
        """
        side = self._side.get(device) or self._side.setdefault(device, torch.cuda.Stream(device))
        graph = _Graph(torch.cuda.current_stream(device))
        # The outer stream context: torch.cuda.graph leaves its own set when a capture cannot end.
        with torch.cuda.device(device), torch.cuda.stream(side):
            torch._C._cuda_clearCublasWorkspaces()
            try:
                # "thread_local": CUDA calls of other threads do not break the capture.
                with (
                    torch.cuda.graph(
                        graph, pool=pool, stream=side, capture_error_mode="thread_local"
                    ),
                    own_capture(),
                ):
                    outputs = fn(*args)
            except BaseException:
                # torch 2.11 leaves the allocator recording to the pool (pytorch#180395); where it
                # has stopped, this raises.
                with contextlib.suppress(Exception):
                    torch._C._cuda_endAllocateToPool(device.index, pool)
                raise
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        return graph, outputs

    def replay(self, graph: Any) -> None:
        graph.replay()

    def copy(self, destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        torch._foreach_copy_(destinations, sources)

    def stream_id(self, device: torch.device) -> int:
        return torch._C._cuda_getCurrentRawStream(device.index)

    def join(self, device: torch.device, earlier: Any) -> Any:
        """Makes the current stream wait for `earlier`, if any, and returns it."""
        stream = torch.cuda.current_stream(device)
        if earlier is not None:
            stream.wait_stream(earlier)
        return stream

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)


class _Generation:
    """One memory pool, held by its entries: torch refuses a pool all of whose graphs are gone."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.order = -1  # the largest one captured so far


class GraphPool:
    """The memory that all graphs of a backend share, and the counters for `explain`.

    Once a graph is captured its temporaries are free, so the outputs of a later capture may lie
    there, and a replay of the earlier graph overwrites them. Outputs that are cloned at once do not
    mind. Lent ones (`borrow_outputs=True`) need an order: callables of a chain are *constructed* in
    call order, and a pass calls them in that order, with no other callable of the pool in between
    (`with pool.lock:` around the pass if several threads run). A capture that comes out of order,
    such as the second KV cache of a layer, starts a fresh pool. So what is replayed between the
    making and the use of a lent output was captured around it, or has other memory.

    Replays are enqueued under `lock` on the current stream, which first waits for the stream of the
    replay before, if that was another one. Reading a lent output on a third stream is the reader's
    to order, as for any tensor.

    Attributes:
        warm_ups, captures, replays: Counters by callable name.
        stood_aside: Counter by (callable name, reason) of calls that ran uncaptured.
    """

    def __init__(self, api: Any = None) -> None:
        self.api = CudaApi() if api is None else api
        self.lock = threading.RLock()
        self.warm_ups: Counter[str] = Counter()
        self.captures: Counter[str] = Counter()
        self.replays: Counter[str] = Counter()
        self.stood_aside: Counter[tuple[str, str]] = Counter()
        self.callables: weakref.WeakSet[GraphedCallable] = weakref.WeakSet()
        self.orders = itertools.count()
        self.lent: weakref.WeakValueDictionary[int, _Entry] = weakref.WeakValueDictionary()
        self._generation: Callable[[], _Generation | None] = lambda: None
        self._streams: dict[torch.device, tuple[int, Any]] = {}

    def reset(self) -> None:
        """Frees all graphs and buffers; callables stay usable and start over. Counters stay."""
        with self.lock:
            for graphed in list(self.callables):
                graphed.reset()
            self.retire_generation()
            self._streams.clear()

    def generation(self, order: int, borrow: bool) -> _Generation:
        generation = self._generation()
        if generation is None or (borrow and generation.order >= order):
            generation = _Generation(self.api.new_pool())
            self._generation = weakref.ref(generation)
        generation.order = max(generation.order, order)
        return generation

    def retire_generation(self) -> None:
        self._generation = lambda: None

    def enter_stream(self, device: torch.device) -> None:
        stream_id = self.api.stream_id(device)
        last_id, last = self._streams.get(device, (None, None))
        if stream_id != last_id:
            self._streams[device] = stream_id, self.api.join(device, last)


class _Signature(NamedTuple):
    """What a call and a capture must have in common. Indices are those of the inputs."""

    addresses: tuple[tuple[int, int], ...]  # pointers of static and mutated inputs
    constants: tuple[tuple[int, type, Any], ...]
    # (size, stride, dtype) of the others, and the pointer if an earlier callable lent it out.
    others: tuple[tuple[int, int | None, torch.Size, tuple[int, ...], torch.dtype], ...]


class _Entry:
    """One captured graph, its input buffers and its outputs; none of the caller's tensors."""

    def __init__(self, signature: _Signature, args: list, order: int) -> None:
        self.order, self.replays = order, 0
        self.returns = False  # whether somebody promised that its addresses do
        self.constants, self.others = signature.constants, signature.others
        self.pointers: list[int | None] = [None] * len(args)
        self.fixed: list[int] = []
        for i, pointer in signature.addresses:
            self.pointers[i] = pointer
            self.fixed.append(i)
        self.device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        self.buffers: dict[int, torch.Tensor] = {}
        self.groups: dict[torch.dtype, tuple[list, list]] = {}
        # Not in inference mode: a tensor made there cannot be written outside of it.
        with torch.inference_mode(False):
            for i, lent_at, size, stride, dtype in signature.others:
                if lent_at is not None:
                    continue
                buffer = torch.empty_strided(size, stride, dtype=dtype, device=self.device)
                self.buffers[i] = buffer
                layout = _copy_layout(buffer)
                targets, sources = self.groups.setdefault(dtype, ([], []))
                targets.append(buffer if layout is None else buffer.as_strided(*layout))
                sources.append((i, layout))

    @property
    def promised(self) -> bool:
        """Whether it waits for addresses that were promised to come again."""
        return self.returns and not self.replays

    def matches(self, args: list) -> bool:
        # These first: a fake tensor warns when asked for its address.
        for i, lent_at, size, stride, dtype in self.others:
            arg = args[i]
            if type(arg) not in _PLAIN or arg.device != self.device or arg.dtype is not dtype:
                return False
            if arg.shape != size or arg.stride() != stride or _is_wrapper(arg):
                return False
            if lent_at is not None and arg.data_ptr() != lent_at:
                return False
        try:
            if not _same_pointers(args, self.pointers, self.fixed):
                return False
        except (RuntimeError, TypeError, AttributeError):  # not a tensor, or one without memory
            return False
        return all(type(args[i]) is kind and args[i] == value for i, kind, value in self.constants)

    def copy_in(self, api: Any, args: list) -> None:
        for targets, sources in self.groups.values():
            tensors = [args[i] if at is None else args[i].as_strided(*at) for i, at in sources]
            api.copy(targets, tensors)

    def capture(self, api: Any, fn: Callable, args: list, into: _Generation, borrow: bool) -> None:
        inside = [self.buffers.get(i, arg) for i, arg in enumerate(args)]
        self.graph, outputs = api.capture(fn, inside, into.handle, self.device)
        self.generation = into
        if not isinstance(outputs, (list, tuple)):
            raise TypeError(f"returns a {type(outputs).__name__}, not a list or tuple")
        self.container = type(outputs)
        owners = {
            arg.untyped_storage().data_ptr(): i
            for i, arg in reversed(list(enumerate(inside)))
            if isinstance(arg, torch.Tensor) and arg.numel()
        }
        made: dict[int, list[torch.Tensor]] = {}
        for out in outputs:
            if type(out) not in _PLAIN + _CONSTANT:
                raise TypeError(f"returns a {type(out).__name__}")
            if isinstance(out, torch.Tensor):
                if out.device != self.device or out.is_conj() or out.is_neg():
                    raise TypeError(f"returns a tensor on {out.device}, or a lazily negated one")
                storage = out.untyped_storage().data_ptr()
                if out.numel() and storage not in owners:
                    made.setdefault(storage, []).append(out)
        # Outputs in one storage are cloned together, so that they stay views of one another.
        self.spans = [] if borrow else [_span(tensors) for tensors in made.values()]
        self.lent = [out for tensors in made.values() for out in tensors] if borrow else []
        slots = {storage: slot for slot, storage in enumerate(made)}
        # How to make each output: (None, it), or (index into inputs + cloned spans, view of that).
        self.outputs: list[tuple[int | None, Any]] = []
        for out in outputs:
            same = [i for i, arg in enumerate(inside) if arg is out]
            if not isinstance(out, torch.Tensor):
                self.outputs.append((None, out))
            elif same:
                self.outputs.append((same[0], None))
            elif not out.numel():
                self.outputs.append((None, torch.empty_like(out)))
            elif (storage := out.untyped_storage().data_ptr()) in owners:
                i = owners[storage]
                self.outputs.append((i, _place(out, inside[i])))
            elif borrow:
                self.outputs.append((None, out))
            else:
                span = self.spans[slots[storage]]
                self.outputs.append((len(inside) + slots[storage], _place(out, span)))

    def replay(self, api: Any, args: list) -> list | tuple:
        self.copy_in(api, args)
        api.replay(self.graph)
        self.replays += 1
        bases = args + [span.clone() for span in self.spans]
        return self.container(
            value if i is None else bases[i] if value is None else _view(bases[i], *value)
            for i, value in self.outputs
        )


class GraphedCallable:
    """`fn(*args) -> list | tuple`, captured in a CUDA graph per set of addresses and replayed.

    1. The first call with new addresses runs `fn` uncaptured on the current stream. It is the
       warm-up (kernels get compiled and loaded) and the answer: its writes to caches and counters
       stay, so nothing is restored. Addresses that come only once never cost a capture.
    2. The second call captures, which runs no kernel, and replays once: mutated inputs advance
       exactly once per call. If the capture raises they are as before the call; this call and all
       later ones without a capture run uncaptured, the reason is logged once and counted. (After a
       failed capture that drew random numbers, torch may leave the default generator unusable.)
       With `ahead` and within `returning_addresses` the first call captures as well, behind its warm-up and
       without a replay, while nothing has to make room for that. What was captured so and never replayed
       goes when the next one comes, and counts for nothing in 6.
    3. A capture is found by the addresses of the `static` inputs (parameters, buffers), of the
       `mutated` ones (KV caches, counters) and of what shares memory with these, and by the value
       of each int, bool, str and None. Such tensors are never copied, as writes to a copy
       would be lost, and never referenced, as a graph must not keep an old KV cache alive. Where an
       address was freed and reused, Dynamo's guards say that the new tensor looks like the old one,
       and the graph reads what is there now; where it went to anything else, no call has it and
       nothing is replayed.
    4. Other tensors are copied into buffers before each replay, except those that an earlier
       callable of the pool lent out: these are read in place, at their address. What `fn` makes is
       cloned, or lent until this callable's next replay (`borrow_outputs=True`; do not resize it).
       An output that is an input or a view of one comes back as the caller's tensor or a view of
       it, and outputs that share memory still do.
    5. Copies are batched by dtype, into buffers of the layout that `fn` was compiled for; of an
       expanded input only the distinct elements are copied.
    6. At most `max_captures` captures are held, the least recently found one makes room: generation
       lets the old KV cache go and its capture is dead weight. When one goes before `PAYBACK`
       replays, addresses have to be seen twice as often before they are captured (up to
       `MOST_PATIENCE`); when one goes that did pay, half as often. So captures cost no more than
       they bring, however many caches take turns. Calls that have to wait are counted as in 7.
    7. `fn` runs directly, counted by reason, while the current stream is capturing; if an input is
       off the one CUDA device (a CPU scalar is read at launch and would go stale), not strided, a
       subclass (fake, functional) or no constant of 3.; if a gradient may be asked for; and for
       good once a warm-up was seen to write an input that 4 would copy.
    8. `reset()` frees graphs and buffers; later calls start over at 1.
    9. Any thread, any stream, as `GraphPool` says. Uncaptured calls hold no lock.
    10. Python's collector is off during a capture: freeing CUDA memory or graphs may invalidate it.

    Default random generators are registered with the graph by torch; each replay draws new numbers.

    Args:
        fn: The compiled callable, for inference: nothing here knows about saved tensors.
        name: What `explain` and the log call it.
        static, mutated: Indices into `args`; they may overlap.
        pool: The backend's. Callables of a chain are constructed in call order.
        max_captures: See 6.
        borrow_outputs: See 4 and `GraphPool`.
        ahead: See 2. Not for a chain: what one lends, the next would meet elsewhere in the next call.
    """

    def __init__(
        self,
        fn: Callable[..., list | tuple],
        *,
        name: str,
        static: frozenset[int],
        mutated: frozenset[int],
        pool: GraphPool,
        max_captures: int,
        borrow_outputs: bool = False,
        ahead: bool = False,
    ) -> None:
        self.name, self._ahead = name, ahead
        self._fn, self._pool, self._api = fn, pool, pool.api
        self._mutated, self._fixed = frozenset(mutated), frozenset(static) | frozenset(mutated)
        self._max_captures, self._borrow = max_captures, borrow_outputs
        self._entries: OrderedDict[_Signature, _Entry] = OrderedDict()
        # How often addresses were seen, of late; lent inputs aside, since each capture moves those.
        self._sights: OrderedDict[tuple, int] = OrderedDict()
        self._order = next(pool.orders)
        self.reset()
        pool.callables.add(self)

    def reset(self) -> None:
        with self._pool.lock:
            for entry in self._entries.values():
                self._api.synchronize(entry.device)
            self._last: _Entry | None = None
            self._entries.clear()
            self._sights.clear()
            self._failure: str | None = None
            self._patience = 1

    def __call__(self, *args: Any) -> list | tuple:
        args = list(args)
        if self._api.is_capturing():
            return self._stand_aside(args, "the current stream is capturing already")
        entry = self._last
        if entry is None or not entry.matches(args) or _wants_grad(args):
            entry = None  # it may be about to make room, and must be gone then
            if self._failure is not None and not self._entries:
                return self._stand_aside(args, self._failure)
            if (reason := self._unfit(args)) is not None:
                return self._stand_aside(args, reason)
            with self._pool.lock:
                signature = self._signature(args)
                entry, sights = self._find(signature, args)
            if entry is None and self._failure is not None:
                return self._stand_aside(args, self._failure)
            if entry is None and sights:
                reason = f"more than {self._max_captures} (max_captures) address sets take turns"
                return self._stand_aside(args, reason)
            if entry is None:
                outputs = self._warm_up(args, signature)
                if self._ahead and _returning.get():
                    self._capture_ahead(signature, args)
                return outputs
        with self._pool.lock:
            self._pool.enter_stream(entry.device)
            self._pool.replays[self.name] += 1
            return entry.replay(self._api, args)

    def _find(self, signature: _Signature, args: list) -> tuple[_Entry | None, int]:
        """The entry to replay, captured if it is time; else how often the addresses were seen."""
        entry, sights = self._entries.get(signature), 0
        if entry is None and self._failure is None:
            sights = self._sights.pop(signature[:2], 0)
            self._sights[signature[:2]] = sights + 1
            if len(self._sights) > 4 * self._max_captures:
                self._sights.popitem(last=False)
            if sights >= self._patience:
                entry = self._capture(signature, args)
        if entry is not None:
            self._entries.move_to_end(signature)
            self._last = entry
        return entry, sights

    def _unfit(self, args: list) -> str | None:
        device = None
        for i, arg in enumerate(args):
            if not isinstance(arg, torch.Tensor):
                if type(arg) not in _CONSTANT:
                    return f"input {i} is a {type(arg).__name__}"
            elif type(arg) not in _PLAIN or _is_wrapper(arg):
                return f"input {i} is a tensor subclass or wrapper ({type(arg).__name__})"
            elif arg.device.type != self._api.device_type or arg.layout is not torch.strided:
                return f"input {i} is {arg.layout} on {arg.device}"
            elif arg.device != (device := device or arg.device):
                return f"inputs are on {device} and {arg.device}"
        if device is None:
            return "no input is a tensor"
        return "a gradient may be asked for" if _wants_grad(args) else None

    def _signature(self, args: list) -> _Signature:
        written = {
            args[i].untyped_storage().data_ptr()
            for i in self._mutated
            if isinstance(args[i], torch.Tensor) and args[i].numel()
        }
        addresses, constants, others = [], [], []
        for i, arg in enumerate(args):
            if not isinstance(arg, torch.Tensor):
                constants.append((i, type(arg), arg))
            elif i in self._fixed or arg.untyped_storage().data_ptr() in written:
                addresses.append((i, arg.data_ptr()))
            else:
                lender = self._pool.lent.get(arg.data_ptr())
                # What a later callable lent and is fed back would move with every capture.
                lent_at = arg.data_ptr() if lender and lender.order < self._order else None
                others.append((i, lent_at, arg.shape, arg.stride(), arg.dtype))
        return _Signature(tuple(addresses), tuple(constants), tuple(others))

    def _warm_up(self, args: list, signature: _Signature) -> list | tuple:
        self._pool.warm_ups[self.name] += 1
        others = [(i, args[i]) for i, *_ in signature.others if not args[i].is_inference()]
        versions = [arg._version for _, arg in others]
        outputs = self._fn(*args)
        for (i, arg), version in zip(others, versions, strict=True):
            if arg._version != version:
                self._fail(f"input {i} is written but not declared mutated")
        return outputs

    def _capture(self, signature: _Signature, args: list) -> _Entry | None:
        self._make_room()
        collecting = gc.isenabled()
        gc.disable()
        try:
            entry = _Entry(signature, args, self._order)
            entry.copy_in(self._api, args)
            generation = self._pool.generation(self._order, self._borrow)
            entry.capture(self._api, self._fn, args, generation, self._borrow)
        except Exception as error:
            self._pool.retire_generation()
            # Ending an invalidated capture raises on top of what invalidated it.
            reasons = [_first_line(e) for e in (error.__context__, error) if e is not None]
            self._fail("capture failed: " + ", then ".join(reasons))
            return None
        finally:
            if collecting:
                gc.enable()
        self._pool.lent.update({out.data_ptr(): entry for out in entry.lent})
        self._pool.captures[self.name] += 1
        self._entries[signature] = entry
        return entry

    def _capture_ahead(self, signature: _Signature, args: list) -> None:
        with self._pool.lock:
            for other in [s for s, entry in self._entries.items() if entry.promised]:
                self._drop(other)
            room = len(self._entries) < self._max_captures and self._patience == 1
            if room and self._failure is None and signature not in self._entries:
                self._last = self._capture(signature, args)
                if self._last is not None:
                    self._last.returns = True

    def _drop(self, signature: _Signature) -> _Entry:
        entry = self._entries.pop(signature)
        self._api.synchronize(entry.device)  # its last replay may still be running
        self._sights.pop(signature[:2], None)
        self._last = None
        return entry

    def _make_room(self) -> None:
        while len(self._entries) >= self._max_captures:
            entry = self._drop(next(iter(self._entries)))
            if entry.promised:
                continue
            if entry.replays < PAYBACK:
                self._patience = min(2 * self._patience, MOST_PATIENCE)
            else:
                self._patience = max(self._patience // 2, 1)

    def _stand_aside(self, args: list, reason: str) -> list | tuple:
        key = self.name, reason
        if key not in self._pool.stood_aside:
            log.info("%s runs uncaptured: %s", self.name, reason)
        self._pool.stood_aside[key] += 1
        return self._fn(*args)

    def _fail(self, reason: str) -> None:
        log.warning("%s is captured no more: %s", self.name, reason)
        self._failure = reason


def _is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a transform (functionalization, vmap) looks like a plain tensor here."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or torch._is_functional_tensor(tensor)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _wants_grad(args: list) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)


def _extent(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements of memory from the first to the last one of a strided tensor."""
    return 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


def _copy_layout(buffer: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The (size, stride) to copy by so that no element is written twice; None if as it is."""
    size, stride = buffer.shape, buffer.stride()
    distinct = tuple(1 if s == 0 and n else n for n, s in zip(size, stride, strict=True))
    if torch._debug_has_internal_overlap(buffer.as_strided(distinct, stride)) != 0:
        # Overlapping windows, or gaps that torch cannot tell from them: the memory as it lies.
        return (_extent(size, stride),), (1,)
    return None if distinct == size else (distinct, stride)


def _place(view: torch.Tensor, base: torch.Tensor) -> tuple:
    return view.data_ptr() - base.data_ptr(), view.dtype, view.shape, view.stride()


def _view(base: torch.Tensor, shift: int, dtype: torch.dtype, size: Any, stride: Any) -> Any:
    """A tensor in `base`'s memory, `shift` bytes behind its first element."""
    offset = base.storage_offset() * base.itemsize + shift
    out = torch.empty(0, dtype=dtype, device=base.device)
    return out.set_(base.untyped_storage(), offset // dtype.itemsize, size, stride)


def _span(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The bytes from the first to the last element of tensors in one storage."""
    first = min(t.storage_offset() * t.itemsize for t in tensors) // 16 * 16  # keeps alignment
    last = max((t.storage_offset() + _extent(t.shape, t.stride())) * t.itemsize for t in tensors)
    span = torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
    return span.set_(tensors[0].untyped_storage(), first, (last - first,), (1,))
