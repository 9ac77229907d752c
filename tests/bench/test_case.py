"""How a case is run: guided, of another dtype, compiled, by a given plan; and what it then costs."""

import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch

import fastsample as fs
from fastsample import bench
from fastsample.bench.case import Counted, counting, denoisers
from fastsample.bench.fingerprint import fingerprint


class Small(torch.nn.Module):
    """x0 = factor x + shift, in the dtype of its parameters."""

    def __init__(self, factor=0.5):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x, t, shift=0.0):
        assert x.dtype == self.factor.dtype
        shift = shift.view(-1, 1, 1, 1).to(x.dtype) if isinstance(shift, torch.Tensor) else shift
        return self.factor * x + shift


def guided(toys, network=None, **changes):
    return fs.Guided(toys["toy"](network or Small()), uncond={"shift": 0.0}, **{"scale": 1.0, **changes})


def shift(indices):
    return {"shift": 0.01 * indices.float()}


def product(toys, model, **how):
    return bench.Case.product(model={"m": model}, solver=toys["ddim"], steps=2, **how)


def test_settings_stand_in_the_name_the_key_and_the_record(toys):
    how = {"guidance": [None, 2.0], "dtype": [None, torch.bfloat16], "batch": [None, 3], "compiled": [False, True]}
    cases = product(toys, guided(toys), **how)
    assert len(cases) == len({case.name for case in cases}) == len({case.key for case in cases}) == 16
    assert len({case.quality_key for case in cases}) == 8  # all but the batch
    last = next(case for case in cases if len(case.settings) == 4)
    assert last.settings == {"guidance": "2", "dtype": "bfloat16", "compile": "yes", "batch": "3"}
    assert last.name == "m/ddim/2/guidance=2/dtype=bfloat16/compile=yes/batch=3"


def test_the_key_does_not_depend_on_the_address_of_an_option(toys, model):
    def made():
        def scale(node):
            return 1.0

        (case,) = bench.Case.product(
            model={"m": model}, solver=lambda m, x, g, scale: x, steps=2, options={"scale": scale}
        )
        return case

    assert "scale=scale" in made().name
    assert made().key == made().key


def test_guidance_sets_the_scale_of_the_model_and_leaves_the_given_one(sweep, toys):
    model = guided(toys)
    _, none, two = sweep(
        cases=product(toys, model, guidance=[1.0, 2.0]),
        condition=shift,
        quality=bench.fd_pixels(torch.randn(100, 1, 4, 4)),
    )
    assert (none.rows, two.rows) == (2, 4)
    assert (none.nfe, two.nfe) == (2, 2)
    assert model.scale == 1.0


def test_guidance_reaches_a_model_below_other_wrappers(toys):
    (case,) = product(toys, fs.Thresholded(guided(toys)), guidance=3.0)
    assert case.build().model.scale == 3.0


def test_guidance_of_a_model_that_has_none_is_refused(toys, model):
    with pytest.raises(
        ValueError, match=r"m/ddim/2/guidance=2 asks for guidance, but m is a Denoiser; give fs\.Guided"
    ):
        product(toys, model, guidance=2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_is_that_of_a_copy_of_the_network(sweep, toys, dtype):
    network = Small(1 / 3)
    cases = product(toys, fs.Thresholded(toys["toy"](network)), dtype=[None, dtype])
    got = []
    sweep(cases=cases, quality={"seen": lambda samples: got.append(samples) or 0.0})
    assert network.factor.dtype == torch.float32
    assert got[1].dtype == torch.float32
    apart = float((got[0] - got[1]).abs().max())
    if dtype == torch.bfloat16:
        assert 0 < apart < 1e-2  # 8 bits of numbers below 3
    else:
        assert apart < 1e-6


def test_cases_of_one_network_share_its_copy(toys):
    model = toys["toy"](Small())
    a, b, other = (
        *product(toys, model, dtype=torch.bfloat16, batch=[1, 2]),
        *product(toys, model, dtype=torch.float16),
    )
    copies = {}
    assert a.build(copies).network is b.build(copies).network
    assert other.build(copies).network is not a.build(copies).network
    assert a.build().network is not a.build().network
    assert len(copies) == 2


def test_a_dtype_of_a_plain_function_is_an_error_that_names_the_case(sweep, toys, model):
    with pytest.warns(UserWarning, match="m/ddim/2/dtype=bfloat16: ValueError: .* is a function and no torch module"):
        sweep(cases=product(toys, model, dtype=torch.bfloat16))


def test_a_dtype_of_a_model_of_another_kind_is_an_error_that_names_the_case(sweep, toys, model):
    class Mine:
        schedule = model.schedule

        def predict(self, x, node):
            return 0.5 * x

    with pytest.warns(UserWarning, match="m/ddim/2/dtype=bfloat16: ValueError: .*not of a Mine"):
        sweep(cases=product(toys, Mine(), dtype=torch.bfloat16))
    _, record = sweep(cases=product(toys, Mine()), resume=False)
    assert (record.error, record.nfe, record.rows) == (None, 2, None)  # no network is known, none counted


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_case_is_a_quality_cell_of_its_own_and_gives_the_same(sweep, toys):
    cases = product(toys, toys["toy"](Small()), compiled=[False, True])
    got = []
    records = sweep(
        cases=cases,
        n=16,
        quality={"seen": lambda samples: got.append(samples) or 0.0},
        latency=bench.latency(rounds=1, warmup=0, batch=16),
    )
    assert [record.error for record in records] == [None, None]
    assert len({record.quality for record in records}) == 2
    assert [record.rows for record in records] == [2, 2]
    torch.testing.assert_close(got[0], got[1])
    assert records[1].timing.first_s > 10 * records[1].timing.steady.median_s  # it holds the compilation


def test_a_case_runs_the_plan_it_is_given(sweep, toys, model):
    plan = fs.trace(toys["heun"], fs.grid(model.schedule, 3))
    case = bench.Case.of_plan("m", model, "tuned", plan)
    got = []
    (record,) = sweep(cases=[case], keep=3, quality={"seen": lambda samples: got.append(samples) or 0.0})
    assert (record.name, record.solver, record.steps, record.nfe) == ("m/tuned/5", "tuned", 5, 5)
    torch.testing.assert_close(got[0][:16], fs.sample(model, plan, fs.noise((1, 4, 4), range(16))))


def test_two_plans_of_one_name_are_refused(sweep, toys, model):
    plans = [fs.trace(toys["ddim"], fs.grid(model.schedule, 3, spacing)) for spacing in (fs.karras, fs.uniform_lam)]
    with pytest.raises(ValueError, match="two cases are named m/tuned/3"):
        sweep(cases=[bench.Case.of_plan("m", model, "tuned", plan) for plan in plans])


def test_another_plan_of_the_same_name_is_another_run(sweep, toys, model):
    first, second = (
        fs.trace(toys["ddim"], fs.grid(model.schedule, 3, spacing)) for spacing in (fs.karras, fs.uniform_lam)
    )
    sweep(cases=[bench.Case.of_plan("m", model, "tuned", first)])
    with pytest.raises(ValueError, match=r"holds another run \(its cases differ\)"):
        sweep(cases=[bench.Case.of_plan("m", model, "tuned", second)])


def test_the_rows_of_a_weak_model_are_counted_too(sweep, toys):
    def cases(model):
        return bench.Case.product(model={"m": model}, solver=toys["heun"], steps=2)

    auto = fs.Autoguided(toys["toy"](Small()), weak=toys["toy"](Small(0.4)), scale=2.0)
    _, record = sweep(cases=cases(auto))
    assert (record.nfe, record.rows, record.calls) == (3, 6, 6)

    class Greedy(fs.Denoiser):
        def predict(self, x, node, **condition):
            super().predict(x, node)
            return super().predict(x, node)

    greedy = fs.Autoguided(toys["toy"](Small()), weak=Greedy(Small(0.4), toys["toy"]().schedule, "x0"), scale=2.0)
    with pytest.warns(UserWarning, match="promises nfe = 3, 6 rows of the network for each sample, but it saw 9"):
        sweep(cases=cases(greedy), resume=False)


def test_a_dtype_is_that_of_the_weak_model_too(toys):
    auto = fs.Autoguided(toys["toy"](Small()), weak=toys["toy"](Small(0.4)), scale=2.0)
    (case,) = product(toys, auto, dtype=torch.bfloat16)
    assert [below.network.factor.dtype for below in denoisers(case.build())] == [torch.bfloat16] * 2
    assert [below.network.factor.dtype for below in denoisers(auto)] == [torch.float32] * 2


def test_counting_puts_every_network_back_also_after_an_error(toys):
    auto = fs.Autoguided(toys["toy"](Small()), weak=toys["toy"](Small(0.4)), scale=2.0)
    before = [below.network for below in denoisers(auto)]

    def stops():
        with counting(auto) as counted:
            counted.predict(torch.zeros(3, 1, 2, 2), fs.node(auto.schedule, 1.0))
            assert (counted.network.calls, counted.network.rows) == (2, 6)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stops()
    assert [below.network for below in denoisers(auto)] == before


def test_a_counted_denoiser_hides_nothing_from_a_run(model):
    counted = Counted(model)
    assert counted.schedule is model.schedule


def around(toys, network):
    return toys["toy"](lambda x, t, **condition: network(x, t, **condition))


def models(toys):
    """Pairs that differ in one thing each, of which a run must know."""
    return {
        "weights": lambda k: toys["toy"](Small(0.5 + k)),
        "scale": lambda k: guided(toys, scale=2.0 + k),
        "tensor condition": lambda k: fs.Guided(
            toys["toy"](Small()), {"shift": torch.full((2,), 1.0 + k)}, {"shift": 0.0}, scale=2.0
        ),
        "weak": lambda k: fs.Autoguided(toys["toy"](Small()), weak=toys["toy"](Small(0.4 + k)), scale=2.0),
        "schedule": lambda k: fs.Denoiser(Small(), fs.EDM(sigma_max=3.0 + k), "x0"),
        "prediction": lambda k: fs.Denoiser(Small(), fs.EDM(), ["x0", "v"][k]),
        "wrapper": lambda k: [fs.Thresholded(toys["toy"](Small())), toys["toy"](Small())][k],
        "limit": lambda k: fs.Thresholded(toys["toy"](Small()), limit=1.0 + k),
        "network of a function": lambda k: around(toys, Small(0.5 + k)),
        "method": lambda k: toys["toy"](Small(0.5 + k).forward),
        "partial": lambda k: toys["toy"](partial(torch.mul, other=0.5 + k)),
        "dtype": lambda k: toys["toy"](Small().to([torch.float32, torch.bfloat16][k])),
    }


@pytest.mark.parametrize("what", models({}))
def test_the_fingerprint_of_a_model_knows_what_its_samples_follow_from(toys, what):
    make = models(toys)[what]
    assert fingerprint(make(0)) == fingerprint(make(0))
    assert fingerprint(make(0)) != fingerprint(make(1))


def test_other_conditions_are_another_run(sweep, toys):
    cases = product(toys, toys["toy"](lambda x, t, label: 0.5 * x + label[:, None, None, None]))
    for shift, said in ((0, None), (0, None), (1, "its condition differ")):
        with pytest.raises(ValueError, match=said) if said else nullcontext():
            sweep(cases=cases, condition=lambda i, shift=shift: {"label": 0.01 * (i % 10 + shift)})


def test_training_changes_the_fingerprint_and_so_the_run(sweep, toys):
    network = Small()
    cases = product(toys, toys["toy"](network))
    sweep(cases=cases)
    with torch.no_grad():
        network.factor += 0.1
    with pytest.raises(ValueError, match=r"its weights differ"):
        sweep(cases=cases)
