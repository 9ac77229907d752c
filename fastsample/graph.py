"""A whole plan as one CUDA graph: recorded once for a shape, then replayed at the cost of one launch.

The graph reads its noises and conditions from static buffers, into which every call copies its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import index
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from .denoiser import Model
from .noise import Noise
from .plan import Plan
from .sampling import begin_at, check_fit, check_model, explained, finite, read, run, source
from .table import table

Work = Callable[[], Tensor]


def compile(
    model: Model,
    plan: Plan | Sequence[Plan],
    shape: Sequence[int],
    *,
    condition: Mapping[str, Any] | None = None,
    device: str | torch.device = "cuda",
    dtype: torch.dtype = torch.float32,
    limit: int = 8,
) -> Compiled:
    """`fs.sample` of this model and plan as a CUDA graph: `compiled(noise, condition=..., init=...)`.

    shape: of the noise, [B, ...]; recorded here already. Other shapes, of noise or conditions, are recorded when they
        first come.
    condition: an example of the network's conditions; every call brings its own with the same keywords. Tensors are
        copied into the graph's buffers; any other value is part of the graph, and a new one is recorded for it.
    dtype: of the state, float32 or float64.
    limit: graphs kept, each with the memory of a run; the one not used for the longest time goes.
    Raises RuntimeError where there is no CUDA device, or where the network does what no graph can hold, such as reading
    a number back from the device; otherwise as `fs.sample`.

    The network's weights may change in place, as training does it, but not be replaced; the same holds for tensors kept
    in the model, as in `fs.Guided(cond=...)`. It may be compiled by torch.compile, but not with
    mode="reduce-overhead", which makes CUDA graphs of its own. `Denoiser.count` counts recordings, not replays.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(
            f"fs.compile records a CUDA graph, got device {device}; elsewhere use fs.sample, or "
            f"torch.compile(lambda noise: fs.sample(model, plan, noise))"
        )
    if not torch.cuda.is_available():
        raise RuntimeError(
            "fs.compile records a CUDA graph, and torch finds no CUDA device here (torch.cuda.is_available() is "
            "False); use fs.sample, or on a CPU torch.compile(lambda noise: fs.sample(model, plan, noise))"
        )
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return Compiled(model, plan, shape, CudaRecorder(device), condition=condition, dtype=dtype, limit=limit)


class Recorder(Protocol):
    """How work on static buffers is recorded. Tests have one without a GPU."""

    device: torch.device

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """Run work; return what repeats its kernels, and the tensor in which its result then stands."""
        ...


class CudaRecorder:
    def __init__(self, device: torch.device, warmup: int = 3):
        self.device, self.warmup = device, warmup

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        with torch.cuda.device(self.device):
            # Lazy work, such as a library's workspaces or the network's own compilation, must be done before, and on
            # another stream than the default one. https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(self.warmup):
                    work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may go on, say to load data
                    result = work()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    f"the run cannot be recorded as a CUDA graph: {error}. The network (or guidance, or a condition) "
                    f"may wait for the device (.item(), .cpu(), a mask as an index) or make a graph of its own; take "
                    f"that out, or use fs.sample"
                ) from error
        return graph.replay, result


@dataclass(frozen=True)
class Recorded:
    """One graph and the buffers it reads: the start state, the noises of the steps by number, the conditions."""

    replay: Callable[[], None]
    result: Tensor
    start: Tensor
    noises: Mapping[int, Tensor]
    condition: Mapping[str, Any]


class Compiled:
    """What `fs.compile` gives: call it like `fs.sample`. One call at a time: the buffers are shared, so others wait."""

    def __init__(
        self,
        model: Model,
        plan: Plan | Sequence[Plan],
        shape: Sequence[int],
        recorder: Recorder,
        *,
        condition: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        limit: int = 8,
    ):
        check_model(model)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the state of a run is float32 or float64, got {dtype}; the network has its own dtype")
        if limit < 1:
            raise ValueError(f"limit is the number of graphs kept, at least 1, got {limit}")
        self.model, self.plan, self.recorder, self.limit = model, read(plan), recorder, limit
        check_fit(model, self.plan)
        self.keys = frozenset(condition or {})
        self.graphs: OrderedDict[Hashable, Recorded] = OrderedDict()
        self.lock = Lock()
        shape = tuple(index(size) for size in shape)
        if not shape:
            raise ValueError("shape is that of the noise, [B, ...], got (): give the batch first")
        example = torch.zeros(shape, device=recorder.device, dtype=dtype)
        with torch.no_grad():
            self._find(begin_at(self.plan, example, None), condition or {})

    @torch.no_grad()
    def __call__(
        self, noise: Noise | Tensor, *, condition: Mapping[str, Any] | None = None, init: Tensor | None = None
    ) -> Tensor:
        """The samples, [B, ...]: what `fs.sample(model, plan, noise, condition=condition, init=init)` gives.

        Noises drawn by seed are drawn before the replay, all steps at once.
        """
        condition = condition or {}
        if condition.keys() != self.keys:
            raise ValueError(
                f"the graph was recorded with the conditions {sorted(self.keys)}, the call has {sorted(condition)}; "
                f"give the same, or compile again with an example of these"
            )
        draw = source(noise, stochastic=self.plan.stochastic, name=self.plan.solver)
        z = draw(0)
        if z.device != self.recorder.device:
            raise ValueError(
                f"the noise is on {z.device}, the graph on {self.recorder.device}; make it there: "
                f"fs.noise(..., device={str(self.recorder.device)!r})"
            )
        start = begin_at(self.plan, z, init)
        with self.lock:
            found = self._find(start, condition)
            found.start.copy_(start)
            for k, buffer in found.noises.items():
                buffer.copy_(draw(k))
            _fill(found.condition, condition)
            found.replay()
            x = found.result.clone()  # the next replay writes over it
            if finite(x):  # waits for the device, and so within the lock: then the buffers are free again
                return x
            raise explained(self.model, table(self.plan, start), start, draw, found.condition)

    def _find(self, start: Tensor, condition: Mapping[str, Any]) -> Recorded:
        """The graph for such a state and such conditions, recorded where there is none yet."""
        kind = start.device.type
        mode = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = _signature("start", start), mode, _signature("condition", condition)
        found = self.graphs.pop(key, None)
        if found is None:
            while len(self.graphs) >= self.limit:  # before the new one takes its memory
                self.graphs.popitem(last=False)
            found = self._record(start, condition)
        self.graphs[key] = found
        return found

    @torch.inference_mode(False)  # or its buffers could not be written to outside of it
    @torch.no_grad()
    def _record(self, start: Tensor, condition: Mapping[str, Any]) -> Recorded:
        static = start.clone()
        what = table(self.plan, static)  # here: a graph cannot hold the copy of numbers from the host
        noises = {k + 2: torch.zeros_like(static) for k in what.noises}
        held = _copied(condition, static.device)

        def work() -> Tensor:
            return run(self.model, what, static, noises.__getitem__, held)[0]

        kind = static.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        # Autocast keeps the weights it has cast; those of a recording lie in the memory of its graph.
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            replay, result = self.recorder.record(work)
        return Recorded(replay, result, static, noises, held)


FIXED = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device)


def _signature(name: str, value: Any) -> Hashable:
    """What of a condition is fixed in a graph: the layout of tensors, and everything else."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, Mapping):
        return tuple((str(key), _signature(f"{name}[{key!r}]", value[key])) for key in sorted(value, key=str))
    if isinstance(value, list | tuple):
        return (type(value), *(_signature(f"{name}[{k}]", one) for k, one in enumerate(value)))
    if not isinstance(value, FIXED):
        raise TypeError(
            f"{name} is a {type(value).__name__}; a graph takes tensors, numbers, text, and mappings and lists of these"
        )
    return type(value), value


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(one, device) for key, one in value.items()}
    if isinstance(value, list | tuple):
        copies = [_copied(one, device) for one in value]
        return type(value)(*copies) if hasattr(value, "_fields") else type(value)(copies)
    return value


def _fill(buffers: Any, values: Any) -> None:
    if isinstance(buffers, Tensor):
        buffers.copy_(values)
    elif isinstance(buffers, Mapping):
        for key, buffer in buffers.items():
            _fill(buffer, values[key])
    elif isinstance(buffers, list | tuple):
        for buffer, value in zip(buffers, values):
            _fill(buffer, value)
