"""Denoisers: any network, asked for x0."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastsample as fs
from fastsample import solvers
from fastsample.prediction import PREDICTIONS
from fastsample.variance import predict_with_variance
from fastsample.zoo.exact import GaussianMixture

from .toys import REGULAR, SCHEDULES, Toy

VP = fs.VP.linear()
FLOW_END = fs.node(fs.Flow(), 1.0)


class Says(torch.nn.Module):
    """Returns what it is given, and keeps what it was asked."""

    def __init__(self, output, dtype=None):
        super().__init__()
        self.output, self.calls = output, []
        if dtype is not None:
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x, t, **condition):
        self.calls.append((x, t, condition))
        return self.output(x) if callable(self.output) else self.output


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("schedule", REGULAR.values(), ids=REGULAR.keys())
@given(st.floats(0.01, 0.99))
def test_every_kind_of_network_gives_the_x0_it_means(schedule, predicts, share):
    node = fs.node(schedule, schedule.t_min + share * (schedule.t_max - schedule.t_min))
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
    x = node.alpha * x0 + node.sigma * eps
    p, q = PREDICTIONS[predicts].output(node.alpha, node.sigma)
    model = fs.Denoiser(Says(p * x + q * x0), schedule, predicts, time="t")
    size = max(1, node.sigma / node.alpha, node.alpha / node.sigma) ** 2
    torch.testing.assert_close(model.predict(x, node), x0, rtol=0, atol=1e-14 * size)


@pytest.mark.parametrize("predicts", ["v", "flow", "x0"])
def test_networks_other_than_eps_start_at_alpha_zero(predicts):
    schedule = SCHEDULES["zero_terminal_snr"]
    node = fs.node(schedule, schedule.t_max)
    x, x0 = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    output = {"v": -x0, "flow": x - x0, "x0": x0}[predicts]  # v = alpha eps - sigma x0
    torch.testing.assert_close(fs.Denoiser(Says(output), schedule, predicts).predict(x, node), x0)


def test_an_eps_network_at_alpha_zero_is_refused():
    with pytest.raises(ValueError, match=r"eps network says nothing of x0 at alpha = 0 \(t = 1\)"):
        fs.Denoiser(Toy(), fs.Flow()).predict(torch.zeros(1, 2), FLOW_END)


@pytest.mark.parametrize(
    ("schedule", "time", "t", "told"),
    [
        (VP, None, 500.5, 500.5),
        (VP, "index", 999.0, 999.0),
        (VP, "unit", 499.0, 0.5),
        (VP, "t", 7.0, 7.0),
        (fs.VPContinuous(), None, 0.5, 0.5),
        (fs.VPContinuous(), "index", 0.5, 499.5),
        (fs.EDM(), None, 3.0, 3.0),
        (fs.EDM(), "sigma", 3.0, 3.0),
        (fs.EDM(), "log_sigma", 3.0, math.log(3) / 4),
        (fs.Flow(), None, 0.25, 0.25),
        (fs.Flow(), "sigma", 0.25, 1 / 3),
        (fs.Flow(3.0), "index", 0.25, 500.0),
        (fs.Flow(3.0), "unit", 0.25, 0.5),
        (fs.Flow(3.0), "t", 0.25, 0.25),
        (fs.EDM(), lambda schedule, node: 10 * node.sigma, 3.0, 30.0),
    ],
)
def test_the_network_is_told_the_time_it_was_trained_with(schedule, time, t, told):
    network = Says(torch.zeros(3, 2))
    fs.Denoiser(network, schedule, "x0", time=time).predict(torch.zeros(3, 2), fs.node(schedule, t))
    ((_, given, _),) = network.calls
    torch.testing.assert_close(given, torch.full((3,), told))
    assert given.dtype == torch.float32


class Shift(torch.nn.Module):
    """Something that depends on x and t, in doubles."""

    def forward(self, x, t):
        return torch.tanh(x) + torch.cos(t)[:, None]


@pytest.mark.parametrize("schedule", [VP, fs.VPContinuous(), fs.EDM(), fs.Flow(shift=3.0)], ids=repr)
@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow"])
def test_samples_at_their_own_times_are_each_as_alone(schedule, predicts):
    model = fs.Denoiser(Shift(), schedule, predicts, dtype=torch.float64)
    t = torch.linspace(schedule.t_min, 0.9 * schedule.t_max, 5, dtype=torch.float64)
    x = torch.linspace(-2, 2, 10, dtype=torch.float64).view(5, 2)
    alone = [model.predict(x[i : i + 1], fs.node(schedule, float(t[i]))) for i in range(5)]
    torch.testing.assert_close(model.predict(x, fs.nodes(schedule, t)), torch.cat(alone))


@pytest.mark.parametrize("time", [*fs.TIMES, lambda schedule, node: 10 * node.sigma])
def test_every_unit_of_time_is_understood_for_samples_at_their_own_times(time):
    model = fs.Denoiser(Shift(), VP, "v", time=time, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0, 500.5, 999.0], dtype=torch.float64)
    x = torch.ones(4, 2, dtype=torch.float64)
    alone = [model.predict(x[:1], fs.node(VP, float(moment))) for moment in t]
    torch.testing.assert_close(model.predict(x, fs.nodes(VP, t)), torch.cat(alone))


@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_gradients_reach_the_network_from_samples_at_their_own_times(predicts):
    network = torch.nn.Linear(2, 2)
    model = fs.Denoiser(lambda x, t: network(x), VP, predicts)
    model.predict(torch.ones(3, 2), fs.nodes(VP, torch.tensor([1.0, 2.0, 3.0]))).sum().backward()
    assert network.weight.grad.abs().sum() > 0


def test_a_number_of_times_that_is_not_the_batch_is_refused():
    with pytest.raises(ValueError, match="3 times for a batch of 2; give one for each sample"):
        fs.Denoiser(Shift(), VP).predict(torch.ones(2, 3), fs.nodes(VP, torch.ones(3)))


@pytest.mark.parametrize("moment", [torch.tensor(0.5), torch.tensor([0.5])], ids=str)
def test_a_time_that_is_a_tensor_is_told_to_every_sample(moment):
    network = Says(torch.zeros(3, 2))
    fs.Denoiser(network, VP, time=lambda schedule, node: moment).predict(torch.zeros(3, 2), fs.node(VP, 9.0))
    assert torch.equal(network.calls[0][1], torch.full((3,), 0.5))


@pytest.mark.parametrize("time", ["sigma", "log_sigma"])
def test_a_time_that_is_infinite_is_refused(time):
    with pytest.raises(ValueError, match="infinite at t = 1; start below it"):
        fs.Denoiser(Toy(), fs.Flow(), "flow", time=time).predict(torch.zeros(1, 2), FLOW_END)


def test_schedules_without_an_index_say_so():
    with pytest.raises(ValueError, match=r"EDM has no time index; give the Denoiser another `time=`"):
        fs.Denoiser(Toy(), fs.EDM(), time="index").predict(torch.zeros(1, 2), fs.node(fs.EDM(), 1.0))


def test_a_predicted_variance_is_split_off():
    x, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    node = fs.node(VP, 500.0)
    plain = fs.Denoiser(Says(eps), VP).predict(x, node)
    learned = fs.Denoiser(Says(torch.cat([eps, torch.full_like(eps, torch.nan)], 1)), VP).predict(x, node)
    assert torch.equal(plain, learned)


@pytest.mark.parametrize(
    "output", [torch.zeros(2, 4, 4), torch.zeros(2, 3, 4, 5), torch.zeros(1, 3, 4, 4), torch.zeros(2, 9, 4, 4)]
)
def test_outputs_of_another_shape_are_refused(output):
    with pytest.raises(ValueError, match=r"returned shape .* for x of shape \(2, 3, 4, 4\); expected the same"):
        fs.Denoiser(Says(output), VP).predict(torch.zeros(2, 3, 4, 4), fs.node(VP, 1.0))


@pytest.mark.parametrize("output", [None, (torch.zeros(2, 3),), {"sample": torch.zeros(2, 3)}])
def test_outputs_that_are_no_tensor_are_refused(output):
    with pytest.raises(TypeError, match=rf"returned {type(output).__name__}, not a tensor; wrap it"):
        fs.Denoiser(Says(output), VP).predict(torch.zeros(2, 3), fs.node(VP, 1.0))


def test_conditions_are_passed_on():
    network, labels = Says(torch.zeros(2, 3)), torch.tensor([4, 2])
    fs.Denoiser(network, VP).predict(torch.zeros(2, 3), fs.node(VP, 1.0), class_labels=labels, mask=None)
    assert network.calls[0][2] == {"class_labels": labels, "mask": None}


def test_calls_and_rows_are_counted():
    model = fs.Denoiser(Toy(), VP)
    for batch in (1, 3, 4):
        model.predict(torch.zeros(batch, 2), fs.node(VP, 1.0))
    assert (model.count.calls, model.count.rows) == (3, 8)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_network_in_half_precision_sees_half_x_and_a_whole_time(half, predicts):
    network = Says(lambda x: x / 2, dtype=half)
    x0 = fs.Denoiser(network, VP, predicts).predict(torch.ones(2, 3), fs.node(VP, 999.0))
    ((x, t, _),) = network.calls
    assert (x.dtype, t.dtype, x0.dtype) == (half, torch.float32, torch.float32)
    assert t.tolist() == [999, 999]  # bfloat16 has 1000


def test_the_dtype_of_a_network_may_be_given():
    network = Says(lambda x: x / 2)
    fs.Denoiser(network, VP, dtype=torch.bfloat16).predict(torch.ones(2, 3), fs.node(VP, 999.0))
    assert network.calls[0][0].dtype == torch.bfloat16


def test_float64_stays_float64():
    network = Says(lambda x: x / 2)
    x0 = fs.Denoiser(network, VP).predict(torch.ones(2, 3, dtype=torch.float64), fs.node(VP, 9.0))
    ((x, t, _),) = network.calls
    assert (x.dtype, t.dtype, x0.dtype) == (torch.float64,) * 3


def test_a_float32_network_is_told_float32_times_in_a_float64_run():
    network = Says(lambda x: x / 2, dtype=torch.float32)
    x0 = fs.Denoiser(network, VP).predict(torch.ones(2, 3, dtype=torch.float64), fs.node(VP, 9.0))
    ((x, t, _),) = network.calls
    assert (x.dtype, t.dtype, x0.dtype) == (torch.float32, torch.float32, torch.float64)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_x0_is_never_the_tensor_the_network_may_write_again(predicts):
    buffer = torch.ones(2, 3)
    x0 = fs.Denoiser(Says(buffer), VP, predicts).predict(torch.ones(2, 3), fs.node(VP, 9.0))
    before = x0.clone()
    buffer.fill_(7)
    assert torch.equal(x0, before)
    assert torch.equal(buffer, torch.full((2, 3), 7.0))


@pytest.mark.parametrize("shape", [(0, 3), (5,), (2, 1, 3, 4)])
def test_batches_may_be_empty_or_of_single_numbers(shape):
    x = torch.zeros(shape)
    assert fs.Denoiser(Toy(), VP).predict(x, fs.node(VP, 1.0)).shape == shape


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown prediction 'noise'"):
        fs.Denoiser(Toy(), VP, "noise")
    with pytest.raises(ValueError, match="unknown time 'step'; choose one of t, index, unit, sigma, log_sigma"):
        fs.Denoiser(Toy(), VP, time="step")


SPLIT = torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = {"cond": {"label": torch.tensor([1.0, 2.0, 3.0])}, "uncond": {"label": torch.tensor([0.0, 0.0, 0.0])}}


def labelled(x, t, label=None):
    """eps and a variance that both depend on the label, row by row."""
    label = torch.zeros(len(x)) if label is None else label
    shift = label.view(-1, 1, 1, 1).to(x)
    return torch.cat([x.tanh() + 0.1 * shift, torch.sin(x + shift)], 1)


def test_a_predicted_variance_is_a_share_between_its_bounds():
    node, x = fs.node(VP, 500.0), SPLIT[:, :3]
    model = fs.Denoiser(Says(SPLIT), VP)
    x0, share = predict_with_variance(model, x, node)
    torch.testing.assert_close(share, (SPLIT[:, 3:] + 1) / 2)
    assert torch.equal(x0, model.predict(x, node))
    assert model.count.calls == 2  # its own count goes on


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_hands_on_the_variance_of_cond(scale, batched):
    node, x, bottom = fs.node(VP, 500.0), SPLIT[:, :3], fs.Denoiser(labelled, VP)
    guided = fs.Thresholded(fs.Guided(bottom, **LABELS, scale=scale, batched=batched))
    x0, share = predict_with_variance(guided, x, node)
    assert torch.equal(x0, guided.predict(x, node))
    _, expected = predict_with_variance(bottom, x, node, **LABELS["cond"])
    torch.testing.assert_close(share, expected)


def test_ddpm_takes_the_variance_of_the_network_through_guidance():
    guided = fs.Guided(fs.Denoiser(labelled, VP), **LABELS, scale=2.0)
    noise = fs.noise((3, 4, 4), seeds=range(3), dtype=torch.float64)
    grid = fs.grid(VP, 6)
    x = fs.solve(guided, solvers.ddpm_learned, grid, noise)

    expected = noise.draw(0) * grid.nodes[0].sigma
    for k, (s, t) in enumerate(grid.steps()):
        x0, share = predict_with_variance(guided, expected, s)
        beta = 1 - (s.alpha / t.alpha) ** 2
        smaller = beta * t.sigma**2 / s.sigma**2
        mean = (s.alpha / t.alpha * t.sigma**2 * expected + t.alpha * beta * x0) / s.sigma**2  # Ho et al., Eq. 7
        log_variance = share * math.log(beta) + (1 - share) * math.log(max(smaller, 1e-300))
        expected = mean + (log_variance / 2).exp() * noise.draw(k + 2) if t.sigma > 0 else mean
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-9)


def test_a_network_without_a_variance_is_refused():
    noise = fs.noise((3, 4, 4), seeds=range(2))
    for model in (fs.Denoiser(Toy(), VP), fs.Thresholded(fs.Denoiser(Toy(), VP))):
        with pytest.raises(ValueError, match="3 channels for x of as many: it predicts no variance; use a solver"):
            fs.solve(model, solvers.ddpm_learned, fs.grid(VP, 2), noise)
    exact = GaussianMixture(VP, torch.ones(1), torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
    with pytest.raises(TypeError, match="GaussianMixture is no Denoiser around a network"):
        fs.solve(exact, solvers.ddpm_learned, fs.grid(VP, 2), noise)


def test_a_learned_variance_is_no_plan():
    with pytest.raises(ValueError, match=r"size the network predicts, .* run it with fs.solve, or trace ddpm"):
        fs.trace(solvers.ddpm_learned, fs.grid(VP, 2))


def test_nan_in_a_run_with_learned_variance_is_found_where_it_arose():
    network = Says(lambda x: torch.cat([x * torch.nan, x], 1))
    with pytest.raises(FloatingPointError, match="the network returned NaN or infinity at step 1 "):
        fs.solve(fs.Denoiser(network, VP), solvers.ddpm_learned, fs.grid(VP, 3), fs.noise((3, 4), seeds=[1, 2]))
