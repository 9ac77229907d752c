"""Weights of the loss: those of the papers, whatever the network predicts."""

import pytest
import torch

import fastsample as fs
from fastsample import distill
from fastsample.distill.weights import WEIGHTS, of_output, snr

VP = fs.VP.scaled_linear()


def table(weight, predicts, schedule=VP):
    """SNR at many times, and the factor of the squared error of what the network says."""
    t = torch.linspace(schedule.t_min, schedule.t_max, 200, dtype=torch.float64)
    at = fs.nodes(schedule, t.round() if schedule is VP else t)
    return (at.alpha / at.sigma) ** 2, of_output(weight, fs.prediction(predicts), at), at


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_is_that_of_its_paper_for_every_prediction(gamma):
    """Hang et al. 2023: min(SNR, gamma) of x0, over SNR of eps, over SNR + 1 of v."""
    for predicts, over in (("x0", lambda r: 1), ("eps", lambda r: r), ("v", lambda r: r + 1)):
        ratio, found, _ = table(distill.MinSNR(gamma), predicts)
        torch.testing.assert_close(found, torch.minimum(ratio, torch.tensor(gamma)) / over(ratio))


def test_p2_is_that_of_its_paper():
    """Choi et al. 2022: 1 / (k + SNR)^gamma of eps."""
    ratio, found, _ = table(distill.P2(gamma=0.5, k=2.0), "eps")
    torch.testing.assert_close(found, 1 / (2 + ratio) ** 0.5)


def test_truncated_snr_is_the_larger_of_the_errors_of_x0_and_eps_and_snr_plus_one_that_of_v():
    ratio, found, _ = table(WEIGHTS["truncated_snr"], "eps")
    torch.testing.assert_close(found, torch.maximum(ratio, torch.ones(())) / ratio)
    _, found, _ = table(WEIGHTS["snr+1"], "v")
    torch.testing.assert_close(found, torch.ones_like(found))


def test_the_weight_of_edm_is_that_of_its_paper_and_one_for_a_preconditioned_network():
    """Karras et al. 2022, Table 1: (sigma^2 + sd^2) / (sigma sd)^2; the effective weight c_out^2 lambda is 1."""
    schedule = fs.EDM()
    _, found, at = table(distill.EDMWeight(0.5), "x0", schedule)
    torch.testing.assert_close(found, (at.sigma**2 + 0.25) / (at.sigma * 0.5) ** 2)
    model = distill.edm_model(torch.nn.Linear(2, 2), schedule, sigma_data=0.5)
    torch.testing.assert_close(
        of_output(distill.EDMWeight(0.5), model.prediction, at), torch.ones_like(found), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("schedule", [VP, fs.VPContinuous(), fs.Flow(), fs.EDM()], ids=repr)
def test_one_weight_means_the_same_error_of_x0_for_every_prediction(name, schedule):
    """The output of a network that is wrong by d in x0 is wrong by q d."""
    x, x0, wrong = torch.randn(3, 200, dtype=torch.float64)
    losses = []
    for predicts in ("eps", "x0", "v", "flow"):
        _, factor, at = table(WEIGHTS[name], predicts, schedule)
        keep = at.alpha > 1e-6
        p, q = fs.prediction(predicts).output(at.alpha, at.sigma)
        off = (p * x + q * wrong) - (p * x + q * x0)
        losses.append((factor * off**2)[keep])
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=1e-12)  # p x cancels in the difference
    torch.testing.assert_close(losses[1], (WEIGHTS[name](at) * (wrong - x0) ** 2)[keep])


def test_min_snr_has_its_limit_where_alpha_is_zero():
    schedule = VP.zero_terminal_snr()
    at = fs.nodes(schedule, torch.tensor([999.0]))
    assert at.alpha == 0
    for predicts, expected in (("eps", 1.0), ("x0", 0.0), ("v", 0.0)):
        assert of_output(distill.MinSNR(), fs.prediction(predicts), at).item() == pytest.approx(expected, abs=1e-9)


def test_snr_is_the_square_of_alpha_over_sigma():
    at = fs.nodes(fs.Flow(), torch.tensor([0.25]))
    assert snr(at).item() == pytest.approx(9.0)


def test_weights_that_do_not_fit_are_refused_before_any_training(toy):
    with pytest.raises(ValueError, match=r"unknown weight 'snr'; choose one of truncated_snr, snr\+1, min_snr"):
        distill.Diffusion(toy(), weight="snr")
    blind = fs.Denoiser(toy().network, VP.zero_terminal_snr(), "eps")
    distill.Diffusion(blind, weight="min_snr")
    for name in ("truncated_snr", "snr+1", "edm"):
        with pytest.raises(
            ValueError, match=r"at t = 999 this weight makes 1e\+16 .*error of eps: take another weight"
        ):
            distill.Diffusion(blind, weight=distill.EDMWeight(1.0) if name == "edm" else name)
    with pytest.raises(ValueError, match="this weight makes -1 of"):
        distill.Diffusion(toy("x0"), weight=lambda at: -torch.ones_like(at.t))
    with pytest.raises(ValueError, match=r"a number for each of the nodes \[2\], got shape \[2, 2\]"):
        distill.Diffusion(toy("x0"), weight=lambda at: at.t[:, None])
    with pytest.raises(ValueError, match="gamma must be above 0, got 0"):
        distill.MinSNR(0)
