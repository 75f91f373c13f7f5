"""A solve of the teacher's ODE as one CUDA graph: recorded once for each shape, and replayed by a single call.

    graphs = SolveGraphs()
    graphs.integrate(solver, velocity, noise) -> actions        bit for bit what solver.integrate gives

Ten evaluations of SmolVLA's velocity start ten thousand kernels. The host needs longer to start most kernels than a GPU
needs to run them. A graph starts them all at once.

A graph reads and writes fixed memory, and everything that is a number while it is recorded stays as it was. So the
noise, the encoded prefix and the solver's grid are tensors, which each call copies into the graph's own. Nothing of
LeRobot is changed: only while a solve is recorded, `torch.tensor` gives the tensors that a solve before has made.
"""

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from smolvla_reflow.errors import ReflowError, first_line
from smolvla_reflow.smolvla.velocity import Velocity
from smolvla_reflow.solver import ADAPTIVE, Solver

# A graph keeps a copy of its inputs, at batch 32 some hundred MB. Sentences of other lengths and the last batch of an
# epoch have other shapes.
MOST_GRAPHS = 4

Function: TypeAlias = Callable[..., Tensor]
# From a function and the tensors it is always called with to a replay, which may write its result to the same memory.
Recorder: TypeAlias = Callable[[Function, Sequence[Tensor]], Callable[[], Tensor]]


class KnownTensors(TorchFunctionMode):
    """Within it, `torch.tensor` of numbers that it has seen copies the tensor that it made then, on the device.

    `denoise_step` makes its attention mask from a list in each evaluation. A graph cannot hold a copy from the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.tensor or not args or not _are_numbers(args[0]):
            return func(*args, **(kwargs or {}))
        key = repr((args, kwargs))
        if key not in self.known:
            self.known[key] = func(*args, **(kwargs or {}))
        return self.known[key].clone()  # the caller may write into it


def _are_numbers(data: object) -> bool:
    return all(map(_are_numbers, data)) if isinstance(data, list | tuple) else isinstance(data, int | float)


class CudaGraphs:
    """Records CUDA graphs. They never run at the same time, so those that are alive share their memory."""

    def __init__(self) -> None:
        self.alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, function: Function, inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Record `function(*inputs)`; a replay reads what the inputs hold by then."""
        device = inputs[0].device
        if device.type != "cuda":
            raise RuntimeError(f"the tensors are on the device {device}")
        with torch.cuda.device(device):
            ahead = torch.cuda.Stream()
            ahead.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(ahead):  # the first calls of a library set up memory, which a graph may not
                function(*inputs)
                with _not_waiting():
                    function(*inputs)
            torch.cuda.current_stream().wait_stream(ahead)
            graph = torch.cuda.CUDAGraph()
            pool = next((other.pool() for other in self.alive), None)
            try:
                # Other threads may use the GPU meanwhile: LeRobot's loader pins memory, and several processes exchange.
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    result = function(*inputs)
            except Exception as error:
                raise ReflowError(
                    f"The teacher's solve cannot be a CUDA graph ({first_line(error)}); leave out cuda_graph."
                ) from error
        self.alive.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@contextlib.contextmanager
def _not_waiting() -> Iterator[None]:
    """Within it, what waits for the GPU raises RuntimeError, while that does no harm yet."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(eq=False)
class SolveGraphs:
    """The recorded solves of one policy."""

    record: Recorder = field(default_factory=CudaGraphs)  # makes a replay of a function
    # by everything that a graph cannot change, at most `MOST_GRAPHS`
    recorded: dict[Hashable, tuple[tuple[Tensor, ...], Callable[[], Tensor]]] = field(default_factory=dict)
    known: KnownTensors = field(default_factory=KnownTensors)  # tensors that the graphs hold
    weights: tuple[int, ...] = ()  # addresses of the policy's parameters, which the graphs read
    failed: bool = False  # True after a solve that could not be recorded; no other is tried

    def __deepcopy__(self, memo: object) -> "SolveGraphs":
        """None yet: a copy of the policy has its weights elsewhere, and a CUDA graph cannot be copied."""
        return SolveGraphs(self.record)

    @torch.no_grad()
    def integrate(self, solver: Solver, velocity: Velocity, noise: Tensor) -> Tensor:
        """`solver.integrate(velocity, noise)`, from a graph where there is one, or can be.

        Args:
            solver: of fixed steps, with its `num_steps`.
            velocity: of the policy whose graphs these are.
            noise: (B, chunk_size, max_action_dim).
        """
        numbers = solver.grid()
        if self.failed:
            return solver.follow(numbers, velocity, noise)
        weights = tuple(parameter.data_ptr() for parameter in velocity.model.parameters())
        if weights != self.weights:
            self.recorded.clear()
            self.weights = weights
        inputs = (noise, torch.tensor(numbers), *velocity.prefix.tensors)
        key = (solver, _autocast(noise), *((each.shape, each.dtype, each.device) for each in inputs))
        if key not in self.recorded:
            if len(self.recorded) == MOST_GRAPHS:
                return solver.follow(numbers, velocity, noise)
            try:
                self.recorded[key] = self._recorded(solver, velocity, inputs)
            except ReflowError:
                raise
            except Exception as error:  # LeRobot's code or the driver may refuse in any way
                self.failed = True
                logging.getLogger(__name__).warning(
                    "The teacher's solve cannot be a CUDA graph (%s); it runs kernel by kernel.", first_line(error)
                )
                return solver.follow(numbers, velocity, noise)
            logging.getLogger(__name__).info(
                "The teacher's solve of %d couplings is a CUDA graph (%d of at most %d).",
                *(len(noise), len(self.recorded), MOST_GRAPHS),
            )
        own, replay = self.recorded[key]
        _copy(inputs, own)
        return replay().clone()  # the next replay writes into the same memory

    def _recorded(
        self, solver: Solver, velocity: Velocity, inputs: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
        noise = inputs[0]
        own = tuple(each.to(noise.device, copy=True) for each in inputs)

        def solve(noise: Tensor, grid: Tensor, *prefix: Tensor) -> Tensor:
            return solver.follow(grid, Velocity(velocity.model, velocity.prefix.of(prefix)), noise)

        enabled, dtype = _autocast(noise)
        # Weights that autocast has cast before are freed after their solve; a graph has to cast its own.
        with self.known, torch.autocast(noise.device.type, dtype, enabled, cache_enabled=False):
            return own, self.record(solve, own)


def _copy(given: Sequence[Tensor], own: Sequence[Tensor]) -> None:
    """Copy tensors into others, all of a format by one kernel."""
    formats = defaultdict(list)
    for source, target in zip(given, own, strict=True):
        formats[source.dtype, source.device].append((source, target))
    for pairs in formats.values():
        sources, targets = zip(*pairs, strict=True)
        torch._foreach_copy_(list(targets), list(sources), non_blocking=True)


def check_recordable(solver: Solver) -> None:
    """Raise ReflowError if a solver decides while it solves."""
    if solver.method in ADAPTIVE:
        raise ReflowError(
            f"cuda_graph has no effect with solver={solver.method}, which chooses its steps as it goes; leave it out."
        )


def solved(solver: Solver, velocity: Velocity, noise: Tensor, graphs: SolveGraphs | None) -> Tensor:
    """`solver.integrate(velocity, noise)`, from these graphs if there are any."""
    return solver.integrate(velocity, noise) if graphs is None else graphs.integrate(solver, velocity, noise)


def _autocast(tensor: Tensor) -> tuple[bool, torch.dtype]:
    device = tensor.device.type
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
