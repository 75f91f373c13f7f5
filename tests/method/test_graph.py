"""A recorded solve gives bit for bit what the solver gives, on inputs that it was not recorded with.

Without a GPU a trace stands in for the CUDA graph. A trace, too, keeps every number that is no tensor and every tensor
that is no input, so a solve that is a static graph for one is a static graph for the other.
"""

import copy
import logging

import pytest
import torch
from helpers import CHUNK, WIDTH, loss_of, make_batch, plain
from oracle import inputs_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smolvla_reflow import ReflowError, Solver, attach
from smolvla_reflow.smolvla.graph import MOST_GRAPHS, CudaGraphs, KnownTensors, SolveGraphs
from smolvla_reflow.smolvla.observation import Observation
from smolvla_reflow.smolvla.velocity import Velocity, velocity_of
from smolvla_reflow.solver import FIXED_STEP

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
COPIED_FROM_THE_HOST = {"lift_fresh", "lift_fresh_copy", "_local_scalar_dense", "nonzero"}


class Traces:
    """Records by tracing; all replays of a trace write to the same memory, as those of a CUDA graph do."""

    def __init__(self):
        self.graphs, self.replays = [], 0

    def __call__(self, function, inputs):
        result = function(*inputs).clone()
        graph = make_fx(function)(*inputs)
        self.graphs.append(graph)

        def replay():
            self.replays += 1
            return result.copy_(graph(*inputs))

        return replay

    @property
    def operations(self):
        nodes = [node for graph in self.graphs for node in graph.graph.nodes if node.op == "call_function"]
        return [node.target.overloadpacket.__name__ for node in nodes if hasattr(node.target, "overloadpacket")]


RECORDERS = [("cpu", Traces), pytest.param("cuda", CudaGraphs, marks=needs_gpu)]


def encoded(policy, batch, device, per_frame=1):
    with torch.no_grad():
        inputs = inputs_of(policy, {name: tensor.to(device) for name, tensor in batch.items()})
        return velocity_of(policy.model, Observation(*inputs)).repeated(per_frame)


def other_batch():
    """Another batch of the same shape, with other images and words; one sentence is shorter."""
    batch = make_batch(4, seed=7)
    batch["observation.language.attention_mask"][1, -1] = False
    return batch


@pytest.mark.parametrize(("device", "recorder"), RECORDERS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", FIXED_STEP)
def test_a_recorded_solve_is_the_solvers_bit_for_bit(policy, batch, noise, method, autocast, device, recorder):
    policy, solver, graphs = policy.to(device), Solver(method, num_steps=2), SolveGraphs(recorder())
    first, second = (encoded(policy, each, device) for each in (batch, other_batch()))
    given = [(first, noise.to(device)), (second, noise.flip(0).to(device)), (second, 2 * noise.to(device))]
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
        torch.manual_seed(0)
        expected = [solver.integrate(*each) for each in given]
        torch.manual_seed(0)
        found = [graphs.integrate(solver, *each) for each in given]
    for each, wanted in zip(found, expected, strict=True):
        assert torch.equal(each, wanted)
    assert len({tuple(each.flatten().tolist()) for each in found}) == 3
    assert len(graphs.recorded) == 1
    assert not graphs.failed


def test_a_recorded_solve_copies_nothing_from_the_host_and_reads_nothing_there(policy, batch, noise):
    """And one without the known tensors would, so the trace shows it."""
    traces = Traces()
    graphs, solver = SolveGraphs(traces), Solver("jittered", num_steps=3)
    velocity = encoded(policy, batch, "cpu")
    graphs.integrate(solver, velocity, noise)
    assert len(traces.operations) > 100
    assert not COPIED_FROM_THE_HOST & set(traces.operations)

    class Unknown(KnownTensors):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    traces.graphs.clear()
    SolveGraphs(traces, known=Unknown()).integrate(solver, velocity, noise)
    assert traces.operations.count("lift_fresh_copy") + traces.operations.count("lift_fresh") == 6  # of each evaluation


class Crossings(TorchDispatchMode):
    """Lists the operations that have tensors of several devices, among their arguments and results."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        if len({each.device.type for each in tensors}) > 1 or "_local_scalar_dense" in str(function):
            self.found.append(function.overloadpacket.__name__)
        return result


@torch.no_grad()
def test_on_a_pretended_gpu_nothing_crosses_between_host_and_device(make_policy, batch, noise):
    """On the CPU a copy to the device is no copy. PyTorch's fake tensors know the device, and hold no values."""
    policy, solver, known = make_policy(seed=0), Solver("jittered", num_steps=3), KnownTensors()
    prefix, grid = encoded(policy, batch, "cpu").prefix, torch.tensor(solver.grid())
    with FakeTensorMode():

        def on_gpu(tensor):
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

        for module in policy.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: on_gpu(each) for name, each in tensors.items() if each is not None})
        velocity = Velocity(policy.model, prefix.of([on_gpu(each) for each in prefix.tensors]))
        inputs = on_gpu(grid), velocity, on_gpu(noise)
        with known:
            solver.follow(*inputs)
        with Crossings() as none, known:
            assert solver.follow(*inputs).device.type == "cuda"
        with Crossings() as some:
            solver.follow(*inputs)
    assert not none.found
    assert len(some.found) == 6  # of each evaluation


def test_known_tensors_are_those_of_the_same_numbers_and_may_be_written_into():
    stock, known = torch.tensor, KnownTensors()
    with known:
        first = torch.tensor([1, 2], dtype=torch.float64)
        first += 1
        assert torch.equal(torch.tensor([1, 2], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64))
        assert torch.tensor([1, 2]).dtype == torch.int64
        assert torch.tensor([1, 3]).tolist() == [1, 3]
        assert torch.tensor([True, False]).tolist() == [True, False]
        assert torch.tensor(first[0].item()) == 2
        assert torch.tensor([torch.ones(()), torch.zeros(())]).tolist() == [1, 0]
    assert len(known.known) == 6  # a tensor of tensors is none of them
    assert torch.tensor is stock


def test_each_shape_format_and_solver_is_recorded_once_and_beyond_a_few_nothing_is(policy, batch, noise, caplog):
    caplog.set_level(logging.INFO)
    traces, solver = Traces(), Solver("euler", num_steps=2)
    graphs, velocity = SolveGraphs(traces), encoded(policy, batch, "cpu")

    def agree(solver, velocity, noise, autocast=False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(graphs.integrate(solver, velocity, noise), solver.integrate(velocity, noise))

    for _ in range(2):
        agree(solver, velocity, noise)
        agree(solver, velocity.repeated(2), noise.repeat_interleave(2, dim=0))
        agree(solver, velocity, noise, autocast=True)
        agree(Solver("midpoint", num_steps=2), velocity, noise)
    assert len(traces.graphs) == len(graphs.recorded) == MOST_GRAPHS == 4
    assert traces.replays == 8
    agree(Solver("euler", num_steps=3), velocity, noise)
    assert len(traces.graphs) == 4
    assert "of 8 couplings is a CUDA graph (2 of at most 4)" in caplog.text


def test_other_weights_are_recorded_anew_and_changed_ones_are_read(make_policy, batch, noise):
    """A replay reads the weights where they lie. A policy that moves, or is given others, has them elsewhere."""
    policy, traces = make_policy(seed=0), Traces()
    graphs, solver, velocity = SolveGraphs(traces), Solver("euler", num_steps=2), encoded(policy, batch, "cpu")
    before = graphs.integrate(solver, velocity, noise)
    with torch.no_grad():
        policy.model.action_out_proj.weight.mul_(2)
        policy.model.action_out_proj.bias.mul_(2)
    doubled = graphs.integrate(solver, velocity, noise)
    assert len(traces.graphs) == 1
    assert torch.equal(doubled, solver.integrate(velocity, noise).detach())
    assert not torch.equal(doubled, before)
    policy.model.action_out_proj.weight = torch.nn.Parameter(policy.model.action_out_proj.weight.detach() / 2)
    assert torch.equal(graphs.integrate(solver, velocity, noise), solver.integrate(velocity, noise).detach())
    assert len(traces.graphs) == 2
    assert len(graphs.recorded) == 1


def test_a_solve_that_cannot_be_recorded_runs_as_before_and_says_so_once(policy, batch, noise, caplog):
    tried = []

    def broken(function, inputs):
        tried.append(function(*inputs))
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs, solver, velocity = SolveGraphs(broken), Solver("jittered", num_steps=2), encoded(policy, batch, "cpu")
    torch.manual_seed(0)
    expected = [solver.integrate(velocity, noise).detach() for _ in range(2)]
    torch.manual_seed(0)
    assert all(torch.equal(graphs.integrate(solver, velocity, noise), each) for each in expected)
    assert len(tried) == 1
    message = "cannot be a CUDA graph (operation not permitted when stream is capturing); it runs kernel by kernel."
    assert [message in line for line in caplog.text.splitlines()].count(True) == 1


def test_a_recording_that_breaks_off_stops_the_run(policy, batch, noise):
    """The GPU's random generator is unusable by then, so the next draw of noise would fail and blame something else."""

    def broken(function, inputs):
        raise ReflowError("The teacher's solve cannot be a CUDA graph (why); leave out cuda_graph.")

    with pytest.raises(ReflowError, match="leave out cuda_graph"):
        SolveGraphs(broken).integrate(Solver("euler", num_steps=2), encoded(policy, batch, "cpu"), noise)


@needs_gpu
def test_a_gpu_is_as_before_after_a_function_that_waits_and_after_graphs_that_are_gone():
    ones = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError):
        CudaGraphs()(lambda x: x * x.sum().item(), [ones])
    assert torch.randn(4, device="cuda").isfinite().all()
    assert torch.cuda.get_sync_debug_mode() == 0
    recorders = [CudaGraphs(), CudaGraphs()]
    for _ in range(3):  # each round the graphs of the round before are gone
        for record in recorders:
            replays = [record(lambda x: torch.nn.functional.linear(x, x[None]) * 2, [ones]) for _ in range(2)]
            assert [replay().item() for replay in replays] == [8, 8]
            assert len(record.alive) == 2
        del replays


@pytest.mark.parametrize("per_frame", [1, 3])
def test_a_student_learns_the_same_from_recorded_solves(policy, teacher, batch, per_frame):
    losses = []
    for record in (None, Traces()):
        with attach(
            policy, teacher, recipe=plain(couplings_per_frame=per_frame), cuda_graph=record is not None
        ) as state:
            if record is not None:
                state.source.graphs.record = record
            torch.manual_seed(0)
            losses.append([loss_of(policy, make_batch(4, seed=seed)) for seed in range(3)])
    assert losses[0] == losses[1]
    assert record.replays == 3
    assert len(record.graphs) == 1


def test_a_copy_of_an_attached_policy_records_its_own(policy, teacher, batch, noise):
    """As for averaged weights. The replay is of no kind that could be copied."""
    with attach(policy, teacher, solver="euler", cuda_graph=True) as attachment:
        attachment.source.graphs.record = Traces()
        found = policy.model.generate_reflow_target(*inputs_of(policy, batch), noise=noise).actions
        graphs = copy.deepcopy(attachment.source).graphs
    assert len(attachment.source.graphs.recorded) == 1
    assert not graphs.recorded
    assert graphs.record is attachment.source.graphs.record
    assert found.isfinite().all()


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_training_on_a_gpu_gives_the_same_losses(make_policy, autocast):
    """Twenty steps, whose last batch is smaller; the graph's couplings are the solver's."""
    losses = []
    for recorded in (False, True):
        policy, teacher = make_policy(seed=0).cuda(), make_policy(seed=1).cuda()
        teacher.model.state_proj.load_state_dict(policy.model.state_proj.state_dict())
        attachment = attach(policy.train(), teacher, cuda_graph=recorded)
        optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-3)
        torch.manual_seed(0)
        losses.append([])
        for step in range(20):
            batch = {name: tensor.cuda() for name, tensor in make_batch(4 if step < 19 else 2, seed=step).items()}
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = policy.forward(batch)[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        assert not recorded or len(attachment.source.graphs.recorded) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"solver": "dopri5"}, "cuda_graph has no effect with solver=dopri5, which chooses its steps as it goes"),
        ({"strategy": "standard"}, "cuda_graph has no effect with strategy=standard"),
    ],
)
def test_a_graph_of_nothing_is_refused(policy, given, message):
    with pytest.raises(ReflowError, match=message):
        attach(policy, cuda_graph=True, **given)


def test_without_a_gpu_the_solve_runs_as_before(policy, teacher, batch, noise, caplog):
    if torch.cuda.is_available():
        policy, teacher = policy.cpu(), teacher.cpu()
    found = []
    for cuda_graph_ in (False, True):
        with attach(policy, teacher, solver="euler", cuda_graph=cuda_graph_):
            found.append(policy.model.generate_reflow_target(*inputs_of(policy, batch), noise=noise).actions)
    assert torch.equal(*found)
    assert found[0].shape == (4, CHUNK, WIDTH)
    assert "cannot be a CUDA graph (the tensors are on the device cpu); it runs kernel by kernel." in caplog.text
