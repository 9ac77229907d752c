"""A plan as a CUDA graph: its bookkeeping with a recorder that needs no GPU, the graphs where there is one."""

from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastsample as fs
from fastsample.graph import Compiled

from .toys import NOISY, ODE, adams_eps, ddim, late_noise, renoise, two_step

VP = fs.VP.scaled_linear()
SHAPE = (3, 5)
CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize("solver", ODE + NOISY, ids=lambda f: f.__name__)


class Eager:
    """Records as a graph does: what is called later repeats the work on the same tensors, and writes to the same."""

    device = CPU

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def record(self, work):
        self.recorded += 1
        result = work()

        def replay():
            self.replayed += 1
            result.copy_(work())

        return replay, result


def network(x, t, scale=None, shift=None, **rest):
    eps = 0.5 * x.tanh() + (t / 5000).view(-1, *[1] * (x.dim() - 1)).to(x)
    eps = eps if scale is None else eps * scale.view(-1, *[1] * (x.dim() - 1))
    return eps if shift is None else eps + shift


def model():
    return fs.Denoiser(network, VP)


def plan_of(solver, steps=5, **options):
    return fs.trace(solver, fs.grid(VP, steps, end=VP.t_min if solver is adams_eps else None, **options))


def seeded(batch=4, shape=SHAPE, **options):
    return fs.noise(shape, seeds=range(batch), **options)


def compiled(plan=None, inner=None, shape=(4, *SHAPE), **options):
    return Compiled(inner or model(), plan or plan_of(two_step), shape, Eager(), **options)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_replay_is_a_run(solver, dtype):
    plan = plan_of(solver)
    graph = compiled(plan, dtype=dtype)
    for seeds in (range(4), range(4, 8), range(4)):  # new noises at every step of every replay
        noise = fs.noise(SHAPE, seeds, dtype=dtype)
        assert torch.equal(graph(noise), fs.sample(model(), plan, noise))
    assert (graph.recorder.recorded, graph.recorder.replayed) == (1, 3)


def test_a_result_is_not_written_over_by_the_next_call():
    graph = compiled()
    first = graph(seeded())
    before = first.clone()
    graph(fs.noise(SHAPE, range(10, 14)))
    assert torch.equal(first, before)


def test_a_tensor_of_noise_and_an_image_are_copied_in():
    plan = plan_of(two_step, start=600.0)
    graph, noise, image = compiled(plan), seeded().draw(0), torch.ones(4, *SHAPE)
    assert torch.equal(graph(noise), fs.sample(model(), plan, noise))
    assert torch.equal(graph(noise, init=image), fs.sample(model(), plan, noise, init=image))
    assert torch.equal(graph(noise), fs.sample(model(), plan, noise))  # the image is gone again
    assert graph.recorder.recorded == 1


def test_a_warm_start_and_one_plan_for_each_sample_are_recorded_too():
    warm = plan_of(two_step, start=700.0, warm=fs.Gaussian(torch.tensor(0.1), torch.tensor(0.5)))
    assert torch.equal(compiled(warm)(seeded()), fs.sample(model(), warm, seeded()))
    starts = {ddim: 999.0, two_step: 800.0, renoise: 700.0, late_noise: 600.0}
    plans = [plan_of(solver, start=start) for solver, start in starts.items()]
    assert torch.equal(compiled(plans)(seeded()), fs.sample(model(), plans, seeded()))


def test_conditions_are_copied_into_the_buffers_at_every_call():
    def given(k):
        return {"scale": torch.arange(4.0) / (k + 1), "shift": torch.full((1, *SHAPE), float(k))}

    graph = compiled(condition=given(0))
    held = given(5)
    for condition in (given(1), given(2), held, held):
        assert torch.equal(
            graph(seeded(), condition=condition), fs.sample(model(), graph.plan, seeded(), condition=condition)
        )
        held["scale"] += 1  # what was given stays the caller's
    assert graph.recorder.recorded == 1


def test_nested_conditions_are_copied_tensor_by_tensor():
    Pair = namedtuple("Pair", "a b")

    def nested(x, t, given):
        return 0.1 * x + given["deep"]["add"].view(-1, 1, 1) + given["list"][1] + given["pair"].b * given["number"]

    def given(k):
        tensor = torch.tensor([0.1, 0.2]) * k
        return {"given": {"deep": {"add": tensor}, "list": [0, tensor[:1].view(1, 1, 1)], "number": 2.0,
                          "pair": Pair(None, tensor[1])}}  # fmt: skip

    inner = fs.Denoiser(nested, VP)
    graph = compiled(inner=inner, shape=(2, *SHAPE), condition=given(1))
    for k in (2, 3):
        ours = graph(seeded(2), condition=given(k))
        assert torch.equal(ours, fs.sample(inner, graph.plan, seeded(2), condition=given(k)))
    assert graph.recorder.recorded == 1


def test_a_value_that_is_no_tensor_is_part_of_the_graph_and_a_new_one_is_recorded():
    inner = fs.Denoiser(lambda x, t, factor, kind: x * factor * (2 if kind == "double" else 1), VP)
    graph = compiled(inner=inner, condition={"factor": 0.1, "kind": "single"})
    for condition in ({"factor": 0.2, "kind": "single"}, {"factor": 0.2, "kind": "double"}):
        for _ in range(2):
            ours = graph(seeded(), condition=condition)
            assert torch.equal(ours, fs.sample(inner, graph.plan, seeded(), condition=condition))
    assert graph.recorder.recorded == 3


def test_a_new_shape_or_dtype_is_recorded_once():
    graph = compiled()
    for noise in (seeded(), seeded(7), seeded(4, dtype=torch.float64), seeded(7), seeded(2, (6,)), seeded()):
        assert torch.equal(graph(noise), fs.sample(model(), graph.plan, noise))
    assert graph.recorder.recorded == len(graph.graphs) == 4


def test_a_new_layout_or_shape_of_a_condition_is_recorded_once():
    graph = compiled(condition={"shift": torch.zeros(4, *SHAPE)})
    other = torch.randn(4, 5, 3).transpose(1, 2)  # strides decide which kernels a network takes
    for shift in (torch.ones(4, *SHAPE), torch.ones(1, 1, 5), other, torch.ones(1, 1, 5), other):
        ours = graph(seeded(), condition={"shift": shift})
        assert torch.equal(ours, fs.sample(model(), graph.plan, seeded(), condition={"shift": shift}))
    assert graph.recorder.recorded == 3


def test_of_too_many_graphs_the_one_unused_for_longest_goes():
    graph = compiled(limit=2)  # 4
    for batch, recorded in ((5, 2), (4, 2), (6, 3), (4, 3), (5, 4), (6, 5), (6, 5)):
        graph(seeded(batch))
        assert graph.recorder.recorded == recorded
        assert len(graph.graphs) <= 2


def test_guidance_with_its_own_memory_starts_every_replay_afresh():
    class Counting:
        schedule = VP

        def __init__(self):
            self.calls = 0

        def begin(self):
            return Counting()

        def predict(self, x, node, **condition):
            self.calls += 1
            return x * (0.1 * self.calls)

    graph = compiled(inner=Counting())
    for _ in range(2):
        assert torch.equal(graph(seeded()), fs.sample(Counting(), graph.plan, seeded()))


def test_a_graph_of_autocast_is_not_used_without_it():
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 5)
    inner = fs.Denoiser(lambda x, t: 0.1 * linear(x), VP)
    graph = compiled(inner=inner)
    plain = fs.sample(inner, graph.plan, seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = fs.sample(inner, graph.plan, seeded())
        assert torch.equal(graph(seeded()), mixed)
    assert not torch.equal(plain, mixed)
    assert torch.equal(graph(seeded()), plain)
    assert graph.recorder.recorded == 2


def test_a_graph_recorded_in_inference_mode_serves_outside_of_it():
    graph = compiled()
    with torch.inference_mode():
        graph(seeded(2))
    assert torch.equal(graph(seeded(2)), fs.sample(model(), graph.plan, seeded(2)))
    assert graph.recorder.recorded == 2


def test_calls_from_threads_do_not_mix():
    graph = compiled(plan_of(renoise))
    noises = [fs.noise(SHAPE, range(k, k + 4)) for k in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(graph, noises))
    for noise, ours in zip(noises, together):
        assert torch.equal(ours, fs.sample(model(), graph.plan, noise))


def test_a_compiled_network_is_recorded():
    torch._dynamo.reset()
    inner = fs.Denoiser(torch.compile(network, backend="eager"), VP)
    graph = compiled(inner=inner)
    assert torch.equal(graph(seeded()), fs.sample(model(), graph.plan, seeded()))


def test_weights_that_change_in_place_are_seen():
    linear = torch.nn.Linear(5, 5)
    inner = fs.Denoiser(lambda x, t: 0.1 * linear(x), VP)
    graph = compiled(inner=inner)
    with torch.no_grad():
        linear.weight.mul_(2)
    assert torch.equal(graph(seeded()), fs.sample(inner, graph.plan, seeded()))


def test_numbers_that_are_not_finite_are_named_as_in_a_run():
    graph = compiled(condition={"shift": torch.zeros(4, 1, 1)})
    shift = torch.tensor([0.0, 0.0, float("nan"), 0.0]).view(4, 1, 1)
    with pytest.raises(FloatingPointError, match=r"the network returned NaN or infinity at step 1 .* samples \[2\]"):
        graph(seeded(), condition={"shift": shift})
    ours = graph(seeded(), condition={"shift": torch.zeros(4, 1, 1)})  # the buffers are clean again
    assert torch.equal(ours, fs.sample(model(), graph.plan, seeded()))


@pytest.mark.parametrize(
    ("error", "make", "says"),
    [
        (ValueError, lambda: fs.compile(model(), plan_of(ddim), (4, *SHAPE), device="cpu"),
         r"records a CUDA graph, got device cpu; elsewhere use fs\.sample, or torch\.compile"),
        (TypeError, lambda: compiled(inner=network), "function has not; wrap a network"),
        (TypeError, lambda: compiled(ddim), "plan must come from"),
        (ValueError, lambda: compiled(fs.trace(ddim, fs.grid(fs.Flow(), 3, fs.uniform_t))), "does not fit this model"),
        (ValueError, lambda: compiled(dtype=torch.float16), "float32 or float64, got torch.float16"),
        (ValueError, lambda: compiled(limit=0), "at least 1, got 0"),
        (ValueError, lambda: compiled(shape=()), "give the batch first"),
        (TypeError, lambda: compiled(shape=(4, 2.5)), "float"),
        (ValueError, lambda: compiled()(seeded(), condition={"scale": torch.ones(4)}),
         r"recorded with the conditions \[\], the call has \['scale'\]"),
        (ValueError, lambda: compiled(condition={"scale": torch.ones(4)})(seeded()),
         r"recorded with the conditions \['scale'\], the call has \[\]; give the same"),
        (TypeError, lambda: compiled(condition={"scale": {"a": [torch.ones(4), object()]}}),
         r"condition\['scale'\]\['a'\]\[1\] is a object; a graph takes tensors"),
        (ValueError, lambda: compiled(plan_of(late_noise))(torch.zeros(4, *SHAPE)), "late_noise adds noise"),
        (ValueError, lambda: compiled()(torch.zeros(4, *SHAPE, device="meta")), "noise is on meta, the graph on cpu"),
        (ValueError, lambda: compiled()(seeded(), init=torch.zeros(1, *SHAPE)), "init has shape"),
        (TypeError, lambda: compiled()(3), "got int"),
        (ValueError, lambda: compiled([plan_of(ddim)] * 3), "3 plans for a batch of 4"),
        (ValueError, lambda: compiled([plan_of(ddim), plan_of(two_step)] * 2)(seeded(3)), "4 plans for a batch of 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_refused(error, make, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"finds no CUDA device here .*; use fs\.sample, or on a CPU torch\.compile"):
        fs.compile(model(), plan_of(ddim), (4, *SHAPE))


# on a GPU


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.Conv2d(32, 3, 3, padding=1)
        self.labels = torch.nn.Embedding(10, 32)

    def forward(self, x, t, labels):
        h = torch.nn.functional.silu(self.a(x)) + self.labels(labels)[:, :, None, None]
        return self.b(h + (t / 1000).view(-1, 1, 1, 1).to(h))


def gpu_noise(batch=4, seed=0):
    return fs.noise((3, 16, 16), range(seed, seed + batch), device="cuda")


def gpu_labels(batch=4, k=0):
    return {"labels": (torch.arange(batch, device="cuda") + k) % 10}


@pytest.mark.gpu
@pytest.mark.parametrize("solver", [two_step, renoise], ids=lambda f: f.__name__)
@pytest.mark.parametrize("guided", [False, True])
def test_on_a_gpu_a_replay_is_a_run_bit_for_bit(solver, guided):
    inner, plan = fs.Denoiser(Net().cuda().eval(), VP), plan_of(solver)
    if guided:
        inner = fs.Guided(inner, uncond={"labels": 0}, scale=2.0, rescale=0.5)
    graph = fs.compile(inner, plan, (4, 3, 16, 16), condition=gpu_labels())
    for k, batch in ((0, 4), (1, 4), (2, 6), (3, 4)):
        noise, condition = gpu_noise(batch, 10 * k), gpu_labels(batch, k)
        assert torch.equal(graph(noise, condition=condition), fs.sample(inner, plan, noise, condition=condition))
    assert len(graph.graphs) == 2


@pytest.mark.gpu
def test_on_a_gpu_one_plan_for_each_sample_is_recorded():
    inner = fs.Denoiser(Net().cuda().eval(), VP)
    plans = [plan_of(two_step, start=start) for start in (999.0, 800.0, 700.0, 600.0)]
    graph = fs.compile(inner, plans, (4, 3, 16, 16), condition=gpu_labels())
    ours = graph(gpu_noise(), condition=gpu_labels())
    assert torch.equal(ours, fs.sample(inner, plans, gpu_noise(), condition=gpu_labels()))


@pytest.mark.gpu
def test_on_a_gpu_a_compiled_network_is_recorded():
    inner = fs.Denoiser(torch.compile(Net().cuda().eval()), VP)
    graph = fs.compile(inner, plan_of(two_step), (4, 3, 16, 16), condition=gpu_labels())
    ours = graph(gpu_noise(), condition=gpu_labels())
    assert torch.equal(ours, fs.sample(inner, plan_of(two_step), gpu_noise(), condition=gpu_labels()))


@pytest.mark.gpu
def test_on_a_gpu_noise_of_the_host_is_refused_and_nan_named():
    inner = fs.Denoiser(Net().cuda().eval(), VP)
    graph = fs.compile(inner, plan_of(two_step), (4, 3, 16, 16), condition=gpu_labels())
    with pytest.raises(ValueError, match=r"noise is on cpu, the graph on cuda:0.*device='cuda:0'"):
        graph(fs.noise((3, 16, 16), range(4)), condition=gpu_labels())
    bad = gpu_noise().draw(0)
    bad[2] = torch.nan
    with pytest.raises(FloatingPointError, match=r"samples \[2\]"):
        graph(bad, condition=gpu_labels())


@pytest.mark.gpu
def test_on_a_gpu_a_network_that_waits_is_refused():
    inner = fs.Denoiser(lambda x, t, labels: x * float(x.mean()), VP)
    with pytest.raises(RuntimeError, match=r"cannot be recorded as a CUDA graph.*wait for the device"):
        fs.compile(inner, plan_of(ddim), (4, 3, 16, 16), condition=gpu_labels())
