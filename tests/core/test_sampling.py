"""The one loop: equal to the direct run of every solver, in any batch, and never waiting for the device."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import fastsample as fs
from fastsample import zoo
from fastsample.zoo.exact import Empirical, GaussianMixture

from .toys import NOISY, ODE, SCHEDULES, Toy, adams_eps, churn, ddim, late_noise, long_noise, renoise, two_step

VP = fs.VP.scaled_linear()
SHAPE = (3, 5)
TENSOR = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
EVERY = pytest.mark.parametrize("solver", ODE + NOISY, ids=lambda f: f.__name__)


def seeded(batch=4, **options):
    return fs.noise(SHAPE, seeds=range(batch), **options)


def model(schedule=VP):
    return fs.Denoiser(Toy(), schedule)


def grid_of(solver, steps=7):
    return fs.grid(VP, steps, end=VP.t_min if solver is adams_eps else None)  # in eps over sigma, sigma = 0 is far


def plan_of(solver, steps=7):
    return fs.trace(solver, grid_of(solver, steps))


@EVERY
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_plan_equals_the_direct_run(solver, steps):
    noise = seeded(dtype=torch.float64)
    ours = fs.sample(model(), plan_of(solver, steps), noise)
    # exact fractions against float64 arithmetic: some hundred roundings of numbers near 1
    torch.testing.assert_close(ours, fs.solve(model(), solver, grid_of(solver, steps), noise), rtol=1e-11, atol=1e-12)


BATCHES = ([5], [2, 3, 5, 7, 11, 13, 63])  # against the same samples among 64
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@EVERY
@DTYPES
def test_a_sample_does_not_depend_on_its_batch(solver, dtype):
    plan = plan_of(solver)
    many = fs.sample(model(), plan, seeded(64, dtype=dtype))
    for seeds in BATCHES:
        assert torch.equal(fs.sample(model(), plan, fs.noise(SHAPE, seeds=seeds, dtype=dtype)), many[seeds])


def mixture(shape, components=4):
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(components, generator=generator) + 0.1
    means = torch.randn(components, *shape, generator=generator)
    return GaussianMixture(VP, weights, means, 0.1 * torch.rand(components, *shape, generator=generator) + 0.01)


@pytest.mark.parametrize("solver", [two_step, renoise], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["mixture of numbers", "mixture of images", "data", "guided", "thresholded"])
@DTYPES
def test_exact_models_give_a_sample_bit_for_bit_in_every_batch(kind, solver, dtype):
    shape = (1, 8, 8) if kind == "mixture of images" else (7,)
    data = torch.randn(50, 7, generator=torch.Generator().manual_seed(2))
    inner = {
        "data": lambda: Empirical(VP, data),
        "guided": lambda: fs.Guided(fs.Denoiser(guidable, VP), {"c": 1.0}, {"c": 0.0}, scale=3.0, batched=False),
        "thresholded": lambda: fs.Thresholded(mixture(shape), dynamic=0.9),
    }.get(kind, lambda: mixture(shape))()
    many = fs.sample(inner, plan_of(solver), fs.noise(shape, range(64), dtype=dtype))
    for seeds in BATCHES:
        assert torch.equal(fs.sample(inner, plan_of(solver), fs.noise(shape, seeds, dtype=dtype)), many[seeds])


def guidable(x, t, c):
    return 0.5 * x.tanh() + c


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-13)], ids=str)
def test_a_trained_network_gives_a_sample_in_every_batch_to_rounding(dtype, tolerance):
    """Not bit for bit: BLAS sums in other blocks for other batches. Rounding, some 4 times the size of x0 / eps."""
    pytest.importorskip("diffusers")
    inner = zoo.digits()
    inner = fs.Denoiser(inner.network.to(dtype), inner.schedule, inner.prediction, dtype=dtype)
    plan = fs.trace(two_step, fs.grid(inner.schedule, 4, fs.quadratic_t))

    def run(seeds):
        labels = {"class_labels": torch.tensor(seeds) % 10}
        return fs.sample(inner, plan, fs.noise((1, 8, 8), seeds, dtype=dtype), condition=labels)

    many = run(list(range(64)))
    for seeds in BATCHES:
        torch.testing.assert_close(run(seeds), many[seeds], rtol=0, atol=tolerance)


def test_it_starts_at_the_noise_and_at_an_image():
    plan = fs.trace(ddim, fs.grid(VP, 4, start=600.0))
    _, (start, *_) = fs.sample(model(), plan, TENSOR, trajectory=True)
    torch.testing.assert_close(start, plan.start.sigma * TENSOR)
    init = torch.ones(4, *SHAPE, dtype=torch.float64)
    _, (start, *_) = fs.sample(model(), plan, TENSOR, init=init, trajectory=True)
    torch.testing.assert_close(start, plan.start.alpha + plan.start.sigma * TENSOR)
    torch.testing.assert_close(
        fs.sample(model(), plan, TENSOR, init=init),
        fs.solve(model(), ddim, fs.grid(VP, 4, start=600.0), TENSOR, init=init),
    )


def test_the_trajectory_holds_every_state():
    x0, states = fs.sample(model(), plan_of(churn), seeded(), trajectory=True)
    assert len(states) == 8
    assert states[-1] is x0
    noise = seeded()
    torch.testing.assert_close(states[0], plan_of(churn).start.sigma * (noise.draw(0) + 0.1 * noise.draw(1)))


def test_the_callback_sees_every_evaluation_in_order():
    seen = []
    inner = model()
    plan = plan_of(two_step)
    _, states = fs.sample(
        inner, plan, TENSOR, callback=lambda k, x, x0: seen.append((k, x, x0)), trajectory=True
    )  # fmt: skip
    assert [k for k, _, _ in seen] == list(range(7))
    for (_, x, x0), state, row in zip(seen, states, plan.rows):
        assert x is state
        torch.testing.assert_close(x0, model().predict(x, row.node))


def test_conditions_reach_the_network():
    class Conditional(torch.nn.Module):
        def forward(self, x, t, label):
            return x * label.view(-1, 1, 1)

    inner = fs.Denoiser(Conditional(), VP)
    label = torch.tensor([0.0, 0.1, 0.2, 0.3])
    ours = fs.sample(inner, plan_of(ddim), TENSOR, condition={"label": label})
    assert len({float(x.std()) for x in ours}) == 4
    torch.testing.assert_close(ours, fs.solve(inner, ddim, grid_of(ddim), TENSOR, condition={"label": label}))


@pytest.mark.parametrize("entry", [fs.sample, fs.solve])
def test_noise_may_be_a_tensor_of_any_number_type(entry):
    what = plan_of(ddim) if entry is fs.sample else ddim
    rest = () if entry is fs.sample else (grid_of(ddim),)
    run = lambda noise: entry(model(), what, *rest, noise)  # noqa: E731
    assert torch.equal(run(TENSOR), run(TENSOR.transpose(0, 1).contiguous().transpose(0, 1)))
    assert run(TENSOR.half()).dtype == torch.float32
    assert run(TENSOR.int()).dtype == torch.float32
    assert run(TENSOR.double()).dtype == torch.float64
    assert run(TENSOR.clone().requires_grad_()).requires_grad is False
    assert run(TENSOR[:0]).shape == (0, *SHAPE)
    assert run(TENSOR[:, 0, 0]).shape == (4,)


def test_all_noises_of_a_run_have_the_dtype_of_its_state():
    noise = fs.noise(SHAPE, seeds=range(2), dtype=torch.float16)
    drawn = []
    fs.sample(model(), plan_of(renoise), noise, callback=lambda k, x, x0: drawn.append(x.dtype))
    assert set(drawn) == {torch.float32}


def test_a_tensor_of_noise_equals_the_seeds_it_was_drawn_from():
    assert torch.equal(fs.sample(model(), plan_of(ddim), seeded()), fs.sample(model(), plan_of(ddim), seeded().draw(0)))


@EVERY
def test_nothing_is_kept_between_runs_shapes_and_models(solver):
    plan = plan_of(solver)
    noise = seeded()
    first = fs.sample(model(), plan, noise)
    fs.sample(fs.Denoiser(Toy(), VP, "v"), plan, fs.noise((7,), seeds=range(2)))
    assert torch.equal(fs.sample(model(), plan, noise), first)


def test_a_plan_is_asked_whether_it_fits_every_schedule_it_meets():
    plan = plan_of(ddim)
    for _ in range(2):
        fs.sample(model(), plan, TENSOR)
        with pytest.raises(ValueError, match="does not fit"):
            fs.sample(model(fs.VP.linear()), plan, TENSOR)
    for k in range(70):  # more than are remembered
        other = fs.VP.linear(end=0.02 + k / 1e4)
        with pytest.raises(ValueError, match="does not fit"):
            fs.sample(model(other), plan, TENSOR)
        fs.sample(model(other), fs.trace(ddim, fs.grid(other, 2)), TENSOR)


def test_a_run_inside_a_run_disturbs_neither():
    plan, alone = plan_of(two_step), fs.sample(model(), plan_of(two_step), TENSOR)
    inside = []
    inner = model()
    outer = fs.sample(
        inner, plan, TENSOR, callback=lambda k, x, x0: inside.append(fs.sample(inner, plan, TENSOR))
    )  # fmt: skip
    assert torch.equal(outer, alone)
    assert all(torch.equal(run, alone) for run in inside)


def test_runs_in_threads_are_those_alone():
    plan, inner = plan_of(renoise), model()
    noises = [fs.noise(SHAPE, seeds=[seed, seed + 100]) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda noise: fs.sample(inner, plan, noise), noises))
    for noise, ours in zip(noises, together):
        assert torch.equal(ours, fs.sample(model(), plan, noise))


def test_nothing_given_is_changed():
    noise, init = TENSOR.clone(), torch.ones_like(TENSOR)
    fs.sample(model(), plan_of(two_step), noise, init=init)
    assert torch.equal(noise, TENSOR)
    assert torch.equal(init, torch.ones_like(TENSOR))


def test_a_network_may_write_into_one_buffer_every_time():
    class Static(torch.nn.Module):
        """As networks under a CUDA graph do."""

        def __init__(self):
            super().__init__()
            self.buffer = torch.empty(4, *SHAPE)

        def forward(self, x, t):
            return torch.mul(x.tanh(), 0.5, out=self.buffer)

    class Fresh(Static):
        def forward(self, x, t):
            return super().forward(x, t).clone()

    for predicts in ("x0", "eps", "v", "flow"):
        results = [
            run
            for network in (Static(), Fresh())
            for run in (
                fs.sample(fs.Denoiser(network, VP, predicts), plan_of(two_step), TENSOR),
                fs.solve(fs.Denoiser(network, VP, predicts), two_step, grid_of(two_step), TENSOR),
            )
        ]
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])


@pytest.mark.parametrize(
    ("error", "make", "says"),
    [
        (ValueError, lambda: fs.sample(model(), plan_of(renoise), TENSOR), "renoise adds noise at its steps: pass"),
        (ValueError, lambda: fs.sample(model(), plan_of(late_noise), TENSOR), "late_noise adds noise"),
        (ValueError, lambda: fs.solve(model(), renoise, grid_of(renoise), TENSOR), "renoise adds noise"),
        (TypeError, lambda: fs.sample(model(), ddim, TENSOR), r"plan must come from fs\.trace.* got function"),
        (TypeError, lambda: fs.sample(model(), TENSOR, plan_of(ddim)), "plan must come from .* got Tensor"),
        (TypeError, lambda: fs.sample(Toy(), plan_of(ddim), TENSOR), r"Toy has not; wrap a network: fs\.Denoiser"),
        (TypeError, lambda: fs.solve(Toy(), ddim, grid_of(ddim), TENSOR), "Toy has not; wrap a network"),
        (TypeError, lambda: fs.sample(model(), plan_of(ddim), 3), "got int"),
        (TypeError, lambda: fs.sample(model(), plan_of(ddim), (1, 8)), "got tuple"),
        (ValueError, lambda: fs.sample(model(), plan_of(ddim), torch.tensor(1.0)), "one entry for each sample"),
        (ValueError, lambda: fs.sample(model(), plan_of(ddim), TENSOR, init=TENSOR[:1]),
         r"init has shape \(1, 3, 5\), the noise \(4, 3, 5\)"),
        (ValueError, lambda: fs.sample(model(fs.VP.linear()), plan_of(ddim), TENSOR),
         r"made for VP\(1000 betas, 0.00085 .. 0.012\) and does not fit this model's VP\(1000 betas, 0.0001 .. 0.02\)"),
        (ValueError, lambda: fs.sample(model(fs.VP.scaled_linear(end=0.01201)), plan_of(ddim), TENSOR), "not fit"),
        (ValueError, lambda: fs.sample(model(fs.EDM()), plan_of(ddim), TENSOR), "does not fit"),
        (ValueError, lambda: fs.sample(model(fs.Flow()), plan_of(ddim), TENSOR), "does not fit"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused(error, make, says):
    with pytest.raises(error, match=says):
        make()


def test_two_noises_between_two_evaluations_are_refused_in_a_direct_run_too():
    def greedy(model, x, grid):
        return model.predict(x, grid.nodes[0]) + model.noise() + model.noise()

    with pytest.raises(ValueError, match="greedy draws two noises between two evaluations"):
        fs.solve(model(), greedy, grid_of(ddim), seeded())


def test_a_model_made_of_the_float32_table_of_diffusers_fits():
    table = fs.VP(tuple(float(beta) for beta in torch.tensor(VP.betas, dtype=torch.float32)))
    fs.sample(model(table), plan_of(ddim), TENSOR)


# one plan for each sample


def plans_of(solver, starts, steps=5, **options):
    end = VP.t_min if solver is adams_eps else None
    return [fs.trace(solver, fs.grid(VP, steps, start=start, end=end, **options)) for start in starts]


STARTS = (999.0, 900.0, 555.5, 200.0)


def alone(inner, plans, noise, **options):
    """Every sample in a run of its own."""
    init = options.get("init")
    runs = []
    for k, plan in enumerate(plans):
        own = fs.noise(noise.sample_shape, [noise.seeds[k]], dtype=noise.dtype)
        runs.append(fs.sample(inner, plan, own, init=None if init is None else init[k : k + 1]))
    return torch.cat(runs)


@EVERY
def test_each_sample_follows_its_own_plan(solver):
    plans, noise = plans_of(solver, STARTS), seeded(dtype=torch.float64)
    # fused against separate multiplication and addition: some ten roundings of numbers up to 1 / alpha = 14
    torch.testing.assert_close(
        fs.sample(model(), plans, noise), alone(model(), plans, noise), rtol=1e-13, atol=1e-13
    )  # fmt: skip


@EVERY
def test_each_sample_follows_its_own_plan_in_float32(solver):
    plans, noise = plans_of(solver, STARTS), seeded()
    torch.testing.assert_close(fs.sample(model(), plans, noise), alone(model(), plans, noise), rtol=1e-5, atol=1e-5)


def test_plans_of_several_solvers_spacings_and_memories_run_together():
    plans = [
        fs.trace(two_step, fs.grid(VP, 6, fs.karras)),
        plan_of(renoise, 6),
        fs.trace(adams_eps, fs.grid(VP, 6, fs.quadratic_t, end=10.0)),
        plan_of(churn, 6),
        plan_of(long_noise, 6),
        fs.trace(ddim, fs.grid(VP, 6, start=700.0, warm=fs.Gaussian(torch.tensor(0.1), torch.tensor(0.5)))),
    ]
    noise = seeded(6, dtype=torch.float64)
    torch.testing.assert_close(
        fs.sample(model(), plans, noise), alone(model(), plans, noise), rtol=1e-13, atol=1e-13
    )  # fmt: skip


def test_each_sample_starts_from_its_own_image_at_its_own_strength():
    plans = [fs.trace(ddim, fs.grid(VP, steps, fs.uniform_t, strength=3 / steps)) for steps in (3, 5, 10, 30)]
    noise, image = seeded(dtype=torch.float64), torch.randn(4, *SHAPE, dtype=torch.float64)
    together = fs.sample(model(), plans, noise, init=image)
    torch.testing.assert_close(together, alone(model(), plans, noise, init=image), rtol=1e-13, atol=1e-13)
    away = (together - image).flatten(1).norm(dim=1)
    assert away[0] > away[1] > away[2] > away[3]


@EVERY
def test_equal_plans_in_a_list_are_one_plan_bit_for_bit(solver):
    noise, plan = seeded(), plan_of(solver)
    for plans in ([plan] * 4, [plan_of(solver) for _ in range(4)]):
        assert torch.equal(fs.sample(model(), plans, noise), fs.sample(model(), plan, noise))


@pytest.mark.parametrize("kind", ["guided", "interval", "rescale", "thresholded", "mixture", "data"])
def test_models_that_wrap_or_are_exact_follow_a_plan_for_each_sample(kind):
    # a sine: tanh gives one number for all that is large, and rescale then divides rounding by rounding
    base = fs.Denoiser(lambda x, t, c: 0.5 * x.sin() + (c + t / 5000).view(-1, 1, 1).to(x), VP)
    given = {"scale": 3.0, **{"interval": {"interval": (-1.0, 1.0)}, "rescale": {"rescale": 0.5}}.get(kind, {})}
    guided = fs.Guided(base, {"c": torch.ones(1)}, {"c": torch.zeros(1)}, batched=False, **given)
    inner = {
        "mixture": lambda: mixture(SHAPE),
        "data": lambda: Empirical(VP, torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(0))),
        "thresholded": lambda: fs.Thresholded(guided, dynamic=0.9),
    }.get(kind, lambda: guided)()
    plans, noise = plans_of(two_step, STARTS), seeded(dtype=torch.float64)
    # exact models divide by sigma^2, down to 1e-3: their rounding is a thousand times larger
    torch.testing.assert_close(
        fs.sample(inner, plans, noise), alone(inner, plans, noise), rtol=1e-11, atol=1e-11
    )  # fmt: skip


def test_a_sample_with_its_own_plan_does_not_depend_on_its_batch():
    plans = plans_of(two_step, [999.0 - 10 * k for k in range(64)])
    many = fs.sample(model(), plans, seeded(64))
    for seeds in BATCHES[1:]:
        few = fs.sample(model(), [plans[seed] for seed in seeds], fs.noise(SHAPE, seeds))
        assert torch.equal(few, many[seeds])


def test_the_callback_and_the_trajectory_see_a_batch_of_plans():
    seen, plans = [], plans_of(two_step, STARTS)
    x0, states = fs.sample(model(), plans, seeded(), callback=lambda k, x, x0: seen.append(k), trajectory=True)
    assert seen == list(range(5))
    assert len(states) == 6
    assert states[-1] is x0


def test_a_vector_of_times_reaches_the_network():
    """diffusers#1784: there a vector of times raises in every scheduler."""
    inner = model()
    fs.sample(inner, plans_of(ddim, STARTS), seeded())
    assert [t.dtype for _, t in inner.network.seen] == [torch.float32] * 5
    torch.testing.assert_close(inner.network.seen[0][1], torch.tensor(STARTS))


@pytest.mark.parametrize(
    ("error", "make", "says"),
    [
        (ValueError, lambda: fs.sample(model(), [plan_of(ddim, 3), plan_of(ddim, 4)] * 2, TENSOR),
         "the plans of a batch take 3, 4 network evaluations; make all with the same"),
        (ValueError, lambda: fs.sample(model(), [], TENSOR), "an empty list of plans"),
        (ValueError, lambda: fs.sample(model(), plans_of(ddim, STARTS[:3]), TENSOR), "3 plans for a batch of 4"),
        (ValueError, lambda: fs.sample(model(), [plan_of(ddim)] * 3, TENSOR), "3 plans for a batch of 4"),
        (TypeError, lambda: fs.sample(model(), [plan_of(ddim), ddim], TENSOR[:2]), "got function"),
        (ValueError, lambda: fs.sample(model(), [*plans_of(ddim, STARTS[:3]), plan_of(renoise, 5)], TENSOR),
         "ddim, renoise adds noise at its steps"),
        (ValueError, lambda: fs.sample(model(), plans_of(ddim, STARTS), TENSOR, init=TENSOR[:1]), "init has shape"),
        (ValueError, lambda: fs.sample(model(), [
            plan_of(ddim), fs.trace(ddim, fs.grid(fs.VP.linear(), 7))], TENSOR[:2]), "does not fit this model"),
        (ValueError, lambda: fs.sample(
            fs.Denoiser(Toy(), SCHEDULES["zero_terminal_snr"]),
            [fs.trace(ddim, fs.grid(SCHEDULES["zero_terminal_snr"], 3, fs.uniform_t, start=t)) for t in (999.0, 9.0)],
            TENSOR[:2]), "an eps network says nothing of x0 at alpha = 0"),
    ],
)  # fmt: skip
def test_plans_that_cannot_be_run_together_are_refused(error, make, says):
    with pytest.raises(error, match=says):
        make()


def test_a_batch_of_plans_names_the_sample_that_breaks_and_its_time():
    plans = plans_of(two_step, STARTS)
    broken = fs.Denoiser(Breaks(1000, float("nan"), [2]), VP)
    with pytest.raises(FloatingPointError, match=r"at step 1 \(t = 555.5, sigma = .*\) for samples \[2\]"):
        fs.sample(broken, plans, seeded())


def test_a_batch_of_plans_runs_where_numbers_cannot_be_read():
    inner, seen = fs.Denoiser(lambda x, t: x * t.view(-1, 1, 1), VP), []
    with pytest.raises(RuntimeError, match="meta"):
        fs.sample(inner, plans_of(two_step, STARTS), TENSOR.to("meta"), callback=lambda k, x, x0: seen.append(k))
    assert seen == list(range(5))


# numbers that are not finite


class Breaks(torch.nn.Module):
    """Returns NaN or infinity for some samples from one call on."""

    def __init__(self, at, value, samples):
        super().__init__()
        self.at, self.value, self.samples = at, value, samples

    def forward(self, x, t):
        out = 0.1 * x
        if t.flatten()[0] <= self.at:
            out[self.samples] = self.value
        return out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("solver", [ddim, two_step, renoise], ids=lambda f: f.__name__)
def test_a_prediction_that_is_not_finite_is_named_with_step_time_and_sample(solver, value):
    plan = plan_of(solver)
    third = plan.rows[2].node
    broken = fs.Denoiser(Breaks(third.t + 1e-3, value, [1, 3]), VP)
    says = rf"the network returned NaN or infinity at step 3 \(t = {third.t:g}, .*\) for samples \[1, 3\]"
    with pytest.raises(FloatingPointError, match=says):
        fs.sample(broken, plan, seeded())
    with pytest.raises(FloatingPointError, match=says):
        fs.solve(broken, solver, grid_of(solver), seeded())


def test_noise_that_is_not_finite_is_not_blamed_on_the_network():
    noise = TENSOR.clone()
    noise[2, 1, 1] = torch.nan
    for run in (
        lambda: fs.sample(model(), plan_of(ddim), noise),
        lambda: fs.solve(model(), ddim, grid_of(ddim), noise),
    ):
        with pytest.raises(FloatingPointError, match=r"was given NaN or infinity at step 1 .*samples \[2\]"):
            run()


def test_a_result_that_is_not_finite_after_sound_predictions_is_named():
    plan = plan_of(ddim)
    huge = replace(plan, rows=(*plan.rows[:-1], replace(plan.rows[-1], b=(1e38,))))
    far = fs.Denoiser(lambda x, t: torch.full_like(x, 1e3), VP, "x0")
    with pytest.raises(FloatingPointError, match="ddim ended at NaN or infinity although no prediction was"):
        fs.sample(far, huge, TENSOR)


def test_the_batch_of_single_numbers_has_its_bad_samples_named_too():
    broken = fs.Denoiser(Breaks(1000, float("nan"), [2]), VP)
    with pytest.raises(FloatingPointError, match=r"samples \[2\]"):
        fs.sample(broken, plan_of(ddim), TENSOR[:, 0, 0])


def test_a_result_whose_sum_overflows_is_finite_all_the_same():
    plan = plan_of(ddim)
    huge = replace(plan, rows=(*plan.rows[:-1], replace(plan.rows[-1], b=(1e35,))))
    far = fs.Denoiser(lambda x, t: torch.full_like(x, 3e3), VP, "x0")
    ours = fs.sample(far, huge, TENSOR)
    assert ours.sum().isinf()
    torch.testing.assert_close(ours, torch.full_like(ours, 3e38))


# modes of torch


def test_it_runs_in_inference_mode():
    expected = fs.sample(model(), plan_of(two_step), TENSOR)
    with torch.inference_mode():
        assert torch.equal(fs.sample(model(), plan_of(two_step), TENSOR), expected)


def test_it_leaves_no_graph_of_gradients():
    linear = torch.nn.Linear(5, 5)
    inner = fs.Denoiser(torch.nn.Module(), VP)
    inner.network = lambda x, t: linear(x)
    x, states = fs.sample(inner, plan_of(ddim), TENSOR, trajectory=True)
    assert not x.requires_grad
    assert not any(state.requires_grad for state in states)
    assert not fs.solve(inner, ddim, grid_of(ddim), TENSOR).requires_grad
    assert torch.is_grad_enabled()


class Mixing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(5, 5)

    def forward(self, x, t):
        return 0.1 * self.linear(x)


def test_autocast_keeps_a_float32_state():
    dtypes = []
    inner = fs.Denoiser(Mixing(), VP)
    expected = fs.sample(inner, plan_of(ddim), TENSOR)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert inner.network(TENSOR, None).dtype == torch.bfloat16
        ours = fs.sample(
            inner, plan_of(ddim), TENSOR, callback=lambda k, x, x0: dtypes.extend([x.dtype, x0.dtype])
        )  # fmt: skip
    assert set(dtypes) == {torch.float32}
    # bfloat16 has 8 bits: 0.4 % of each of 7 predictions, where their sum is of the size of the noise over alpha
    torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_a_compiled_network_is_a_network():
    eager = fs.Denoiser(Mixing(), VP)
    compiled = fs.Denoiser(torch.compile(Mixing(), backend="eager"), VP)
    assert compiled.dtype == torch.float32
    torch.testing.assert_close(
        fs.sample(compiled, plan_of(ddim), TENSOR), fs.sample(eager, plan_of(ddim), TENSOR)
    )  # fmt: skip


@pytest.mark.parametrize("solver", [two_step, ddim], ids=lambda f: f.__name__)
def test_the_whole_loop_compiles_to_one_graph(solver):
    torch._dynamo.reset()
    inner, plan = fs.Denoiser(Mixing(), VP), plan_of(solver, 10)
    whole = torch.compile(lambda noise: fs.sample(inner, plan, noise), fullgraph=True, backend="aot_eager")
    for noise in (TENSOR, TENSOR + 1):
        torch.testing.assert_close(whole(noise), fs.sample(inner, plan, noise))


def test_a_batch_of_plans_compiles_to_one_graph():
    torch._dynamo.reset()
    inner, plans = model(), plans_of(two_step, STARTS)
    inner.network.forward = lambda x, t: 0.5 * x.tanh() + (t / 5000).view(-1, 1, 1)
    whole = torch.compile(lambda noise: fs.sample(inner, plans, noise), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(TENSOR), fs.sample(inner, plans, TENSOR))


def test_a_compiled_run_is_compiled_once():
    """A count of the network's calls that the graph read would be another constant in every run."""
    torch._dynamo.reset()
    counter = CompileCounter()
    inner, plan = fs.Denoiser(Mixing(), VP), plan_of(ddim)
    whole = torch.compile(lambda noise: fs.sample(inner, plan, noise), fullgraph=True, backend=counter)
    for k in range(10):
        whole(TENSOR + k)
    assert counter.frame_count == 1


def test_a_guided_and_thresholded_run_compiles_to_one_graph():
    torch._dynamo.reset()

    def network(x, t, c):
        return 0.5 * x.tanh() + c[:, None, None]

    inner = fs.Guided(fs.Denoiser(network, VP), {"c": torch.ones(4)}, {"c": 0.0}, scale=2.0, rescale=0.5)
    inner, plan = fs.Thresholded(inner, dynamic=0.9), plan_of(two_step)
    whole = torch.compile(lambda noise: fs.sample(inner, plan, noise), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(TENSOR), fs.sample(inner, plan, TENSOR))


class Recorder(TorchDispatchMode):
    """The names of the operations that reach the device between the first and the last call of the network."""

    WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "_to_copy", "copy_", "masked_select")

    def __init__(self):
        super().__init__()
        self.names, self.marks = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def waits(self):
        return [name for name in self.names[self.marks[0] : self.marks[-1]] if name in self.WAITS]


@EVERY
@pytest.mark.parametrize("guided", [False, True])
def test_the_loop_never_waits_for_the_device(solver, guided):
    """Without a GPU: nothing that reads a number back is dispatched between the network's calls."""
    recorder = Recorder()

    def network(x, t, **condition):
        recorder.marks.append(len(recorder.names))
        return 0.5 * x.tanh()

    inner = fs.Denoiser(network, VP)
    if guided:
        labels = torch.zeros(4), torch.ones(4)
        inner = fs.Guided(inner, {"c": labels[0]}, {"c": labels[1]}, scale=2.0, rescale=0.5)
        inner = fs.Thresholded(inner, dynamic=0.9)
    drawn = seeded()
    # noises are drawn on the CPU and sent without a wait; here they lie ready, so that only the loop is looked at
    ready = {k: drawn.draw(k) for k in range(10)}
    noise = Ready(drawn.sample_shape, drawn.seeds, drawn.device, drawn.dtype)
    object.__setattr__(noise, "ready", ready)
    plan = plan_of(solver)
    with recorder:
        fs.sample(inner, plan, noise)
    assert len(recorder.marks) == plan.nfe
    assert recorder.waits() == []
    assert "mul" in recorder.names  # the recorder does see the loop


class Ready(fs.Noise):
    def draw(self, k):
        return self.ready[k]


def test_the_recorder_would_see_a_wait():
    recorder = Recorder()

    def curious(x, t):
        recorder.marks.append(len(recorder.names))
        return x * float(x.max())

    with recorder:
        fs.sample(fs.Denoiser(curious, VP), plan_of(ddim), TENSOR)
    assert "_local_scalar_dense" in recorder.waits()


def test_the_loop_runs_where_numbers_cannot_be_read_at_all():
    """On the meta device any look at a number raises; `sample` looks once, at the end."""
    inner = fs.Denoiser(lambda x, t: x * t.view(-1, 1, 1), VP)
    seen = []
    with pytest.raises(RuntimeError, match="meta"):
        fs.sample(inner, plan_of(two_step), TENSOR.to("meta"), callback=lambda k, x, x0: seen.append(x.device.type))
    assert seen == ["meta"] * 7


@pytest.mark.parametrize("solver", [long_noise, late_noise, churn], ids=lambda f: f.__name__)
def test_each_noise_is_drawn_once(solver):
    drawn = []

    class Counted(fs.Noise):
        def draw(self, k):
            drawn.append(k)
            return super().draw(k)

    base = seeded()
    fs.sample(model(), plan_of(solver), Counted(base.sample_shape, base.seeds, base.device, base.dtype))
    assert sorted(drawn) == sorted({0} | {k + 2 for k in plan_of(solver).noises})


def test_a_plan_keeps_no_more_states_than_it_needs(monkeypatch):
    import fastsample.sampling as sampling

    held = []

    def watched(x, x0, memory, noises, row):
        held.append((len(memory), len(row.b), len(noises)))
        return fs.step.plan_step(x, x0, memory, noises, row)

    def straight(x, output, u, w, noises, row):
        held.append((0, len(row.b), len(noises)))
        return fs.step.affine_step(x, output, u, w, noises, row)

    monkeypatch.setattr(sampling, "plan_step", watched)
    monkeypatch.setattr(sampling, "affine_step", straight)
    fs.sample(model(), plan_of(ddim), TENSOR)
    assert {memory for memory, _, _ in held} == {0}
    held.clear()
    fs.sample(model(), plan_of(two_step), TENSOR)
    assert [memory for memory, _, _ in held] == [0, 1, 1, 1, 1, 1, 1]
    held.clear()
    fs.sample(model(), plan_of(renoise), seeded())
    assert {noises for _, _, noises in held} == {1}


@pytest.mark.parametrize("name", ["zero_terminal_snr", "flow"])
def test_a_run_may_start_at_alpha_zero(name):
    schedule = SCHEDULES[name]
    target = torch.full((4, *SHAPE), 0.3)
    x0 = fs.Denoiser(lambda x, t: target, schedule, "x0")
    v = "v" if name != "flow" else "flow"
    grid = fs.grid(schedule, 5, fs.uniform_t)

    def network(x, t):  # exact for data that are one point
        node = next(n for n in grid.nodes if abs(schedule.index(n.t) - float(t[0])) < 1e-2)
        p, q = fs.prediction(v).output(node.alpha, node.sigma)
        return p * x + q * target

    for inner in (x0, fs.Denoiser(network, schedule, v, time="index")):
        ours = fs.sample(inner, fs.trace(ddim, grid), TENSOR)
        torch.testing.assert_close(ours, target, rtol=1e-4, atol=1e-4)  # float32, v over sigma near the data
