"""A step may take a network's output as it is: the same numbers as by way of x0, at less cost."""

import pytest
import torch

import fastsample as fs
from fastsample import solvers


class Around:
    """A model that shows its `predict` alone, so that every step goes by way of x0."""

    def __init__(self, model):
        self.model, self.schedule = model, model.schedule

    def predict(self, x, node, **condition):
        return self.model.predict(x, node, **condition)


def model(predicts="eps", schedule=None):
    return fs.Denoiser(lambda x, t: torch.sin(3 * x) + 1e-3 * t.view(-1, 1), schedule or fs.VP.linear(), predicts)


def plans(schedule, start=None):
    for name, solver in solvers.SOLVERS.items():
        try:
            plan = fs.trace(solver, fs.grid(schedule, 6, start=start, end=schedule.t_min))
        except (ValueError, TypeError):
            continue
        if plan.memory == 1:
            yield name, plan


MEMORYLESS = dict(plans(fs.VP.linear()))


def test_there_are_solvers_that_remember_nothing():
    assert {"ddim", "euler", "ddpm", "euler_ancestral"} <= set(MEMORYLESS)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("name", MEMORYLESS)
def test_a_step_from_the_output_is_the_step_by_way_of_x0(name, predicts):
    plain, noise = model(predicts), fs.noise((5,), range(3), dtype=torch.float64)
    by_x0 = fs.sample(Around(plain), MEMORYLESS[name], noise)
    # float64 rounding, through u = 1 / alpha = 150 at the noisiest node
    torch.testing.assert_close(fs.sample(plain, MEMORYLESS[name], noise), by_x0, rtol=1e-10, atol=1e-10)


def test_rounding_is_less_than_by_way_of_x0():
    grid = fs.grid(fs.VP.linear(), 50, fs.uniform_t)
    plan, noise = fs.trace(solvers.ddim, grid), torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    true = fs.sample(model(), plan, noise.double())
    straight, by_x0 = (fs.sample(one, plan, noise) - true for one in (model(), Around(model())))
    assert straight.square().mean() < by_x0.square().mean()


def test_looking_does_not_change_the_result_and_sees_x0():
    seen, plain, noise = [], model(), fs.noise((5,), range(3))
    plan = MEMORYLESS["ddim"]
    looked = fs.sample(plain, plan, noise, callback=lambda k, x, x0: seen.append((plan.rows[k].node, x, x0)))
    assert torch.equal(looked, fs.sample(plain, plan, noise))
    for node, x, x0 in seen:
        torch.testing.assert_close(x0, plain.predict(x, node), rtol=1e-5, atol=1e-4)


def test_a_network_is_called_once_an_evaluation_and_may_keep_its_tensor():
    kept = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    reused = fs.Denoiser(lambda x, t: kept, fs.VP.linear())
    before, plan = kept.clone(), MEMORYLESS["ddim"]
    fs.sample(reused, plan, fs.noise((5,), range(3)))
    assert torch.equal(kept, before)
    assert reused.count.calls == plan.nfe


def test_a_denoiser_with_its_own_predict_is_asked_by_that():
    class Halved(fs.Denoiser):
        def predict(self, x, node, **condition):
            return super().predict(x, node, **condition) / 2

    halved = Halved(lambda x, t: torch.sin(x), fs.VP.linear())
    plan, noise = MEMORYLESS["ddim"], fs.noise((5,), range(3))
    torch.testing.assert_close(fs.sample(halved, plan, noise), fs.sample(Around(halved), plan, noise))


def test_an_eps_network_at_alpha_zero_is_still_refused():
    plain = model(schedule=fs.Flow())
    plan = fs.trace(solvers.ddim, fs.grid(fs.Flow(), 4, fs.uniform_t, start=1.0))
    with pytest.raises(ValueError, match="alpha = 0"):
        fs.sample(plain, plan, fs.noise((5,), range(2)))
