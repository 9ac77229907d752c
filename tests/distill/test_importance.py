"""Importance sampling of times: as often as the loss is large, without another mean, on any number of processes."""

import json
import subprocess
import sys

import pytest
import torch

import fastsample as fs
from fastsample import distill
from fastsample.distill import draws

VP = fs.VP.scaled_linear(steps=20)


def told(memory, losses, rounds=10):
    """A memory that heard the loss of every bin, `rounds` times."""
    bins = torch.arange(len(losses))
    for step in range(rounds):
        memory.hear(step, bins, losses)
        memory.learn(step)
    return memory


def test_the_chances_are_those_of_the_root_of_the_mean_square():
    """Nichol and Dhariwal 2021, Eq. 18, with the uniform share of their code."""
    memory = distill.Importance(uniform=0.01).memory(VP)
    torch.manual_seed(0)
    losses = torch.rand(10, 20, dtype=torch.float64)
    for step, row in enumerate(losses):
        memory.hear(step, torch.arange(20), row)
        memory.learn(step)
        if step < 9:  # until all are known, uniform
            torch.testing.assert_close(memory.chances, torch.full((20,), 0.05, dtype=torch.float64))
    root = losses.square().mean(0).sqrt()
    torch.testing.assert_close(memory.chances, 0.99 * root / root.sum() + 0.01 / 20)


def test_only_the_last_losses_count_and_those_that_are_not_finite_do_not():
    memory = distill.Importance(history=3, bins=2).memory(VP)
    told(memory, torch.tensor([9.0, 1.0]), 5)
    told(memory, torch.tensor([1.0, 1.0]), 3)
    torch.testing.assert_close(memory.chances, torch.full((2,), 0.5, dtype=torch.float64))
    told(memory, torch.tensor([torch.inf, torch.nan]), 3)
    torch.testing.assert_close(memory.chances, torch.full((2,), 0.5, dtype=torch.float64))
    told(memory, torch.tensor([0.0, 0.0]), 3)  # a loss that vanishes everywhere
    torch.testing.assert_close(memory.chances, torch.full((2,), 0.5, dtype=torch.float64))


def test_times_are_drawn_as_often_as_their_chances_and_weighed_by_them():
    memory = told(distill.Importance().memory(VP), torch.linspace(0.1, 4, 20))
    torch.manual_seed(0)
    share, factor, bins = memory.warp(torch.rand(200_000, dtype=torch.float64))
    assert torch.equal((share * 20).floor().long(), bins)
    often = torch.bincount(bins, minlength=20) / 200_000
    torch.testing.assert_close(often, memory.chances.float(), rtol=0, atol=0.002)  # five standard errors
    torch.testing.assert_close(factor, 1 / (20 * memory.chances[bins]))
    assert factor.mean().item() == pytest.approx(1, abs=0.05)  # five standard errors: rare bins count much


def test_the_ends_of_a_bin_stay_in_it():
    memory = told(distill.Importance(bins=1000).memory(VP), torch.rand(1000) + 0.01)
    edges = memory.edges
    for share in (edges[:-1], torch.nextafter(edges[1:], torch.zeros((), dtype=torch.float64))):
        moved, _, bins = memory.warp(share)
        assert torch.equal(bins, torch.arange(1000))
        assert torch.equal((moved * 1000).floor().long(), bins)


@pytest.mark.parametrize(
    ("schedule", "times"),
    [(VP, "uniform"), (VP, "lognormal"), (fs.EDM(), "lognormal"), (fs.Flow(), "uniform"), (fs.Flow(), "logit_normal")],
    ids=str,
)
def test_the_mean_of_the_loss_does_not_change(toy, schedule, times):
    """Whatever it has learnt of the losses, however wrongly."""
    torch.manual_seed(0)
    batch = {"x0": torch.rand(100_000, 2) * 2 - 1}
    model = fs.Denoiser(toy(width=8).network, schedule, "v", time=lambda schedule, node: node.sigma / node.alpha)
    plain = distill.Diffusion(model, times=times, weight="min_snr")
    sampled = distill.Diffusion(model, times=times, weight="min_snr", importance=distill.Importance(bins=20))
    told(sampled.memory, torch.linspace(0.5, 4, 20))
    with torch.no_grad():
        expected, found = plain.loss("model", batch, 0).item(), sampled.loss("model", batch, 0).item()
    assert found == pytest.approx(expected, rel=0.04)  # five standard errors, and more


def test_the_chances_find_a_known_loss_and_make_its_noise_less(toy):
    """The error of t = k is known: the chances come to its shape, and the losses of a batch scatter less."""

    class Known(distill.Diffusion):
        def loss(self, role, batch, step):
            at, factor, bins = self._drawn(len(batch["x0"]), batch["x0"].device)
            losses = size[at.t.long()] * (1 + 0.2 * draws.randn(len(bins)))
            self.memory.hear(step, bins, losses)
            return (losses * factor).mean()

    torch.manual_seed(0)
    size = torch.logspace(-2, 1, 20)
    method = Known(fs.Denoiser(toy().network, VP, "v"), importance=True)
    means = []
    for step in range(400):
        means.append(method.loss("model", {"x0": torch.zeros(64, 2)}, step).item())
        method.after(step)
    expected = 0.999 * size / size.sum() + 0.001 / 20
    torch.testing.assert_close(method.memory.chances.float(), expected, rtol=0.25, atol=0)  # of ten values each
    known = torch.tensor(means[-100:])
    assert known.mean().item() == pytest.approx(size.mean().item(), rel=0.02)  # five standard errors
    assert known.std() < 0.3 * size.std() / 8  # that of the mean of 64 losses at times that are uniform


def test_a_memory_does_not_depend_on_how_a_batch_is_split(toy):
    def learned(cuts):
        method = distill.Diffusion(
            fs.Denoiser(toy().network, VP, "v"), importance=distill.Importance(bins=4, history=3)
        )
        for step in range(12):
            generator = torch.Generator()
            x0 = torch.rand(24, 2, generator=generator.manual_seed(step))
            for first, last in reversed(cuts):  # the order they come in does not matter either
                with draws.part(generator.manual_seed(99 + step), first=first, count=last - first, total=24):
                    method.loss("model", {"x0": x0[first:last]}, step)
            method.after(step)
        return method.memory

    whole, parts = learned([(0, 24)]), learned([(0, 5), (5, 16), (16, 24)])
    assert (whole.seen > 3).all()
    assert torch.equal(whole.seen, parts.seen)
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-5, atol=0)  # matrices of other sizes sum otherwise
    torch.testing.assert_close(parts.edges, whole.edges, rtol=1e-5, atol=0)
    assert not torch.allclose(whole.edges, torch.linspace(0, 1, 5, dtype=torch.float64))


def heard(rank, store):
    """What process `rank` of two remembers of two batches of twelve; the first hears its rows in two parts."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        memory = distill.Importance(bins=4, history=2).memory(fs.VP.linear())
        losses, bins = torch.arange(1.0, 13.0), torch.arange(12) % 4
        for step in range(2):
            for first, last in ((0, 4), (4, 7)) if rank == 0 else ((7, 12),):
                with draws.part(torch.Generator(), first=first, count=last - first, total=12):
                    memory.hear(step, bins[first:last], losses[first:last])
            memory.learn(step)
        return [buffer.tolist() for buffer in memory.buffers()]
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_remember_what_one_would(tmp_path):
    store = str(tmp_path / "store")
    code = f"import json, runpy; heard = runpy.run_path({__file__!r})['heard']; print(json.dumps(heard(1, {store!r})))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path) as second:
        first = heard(0, store)
        found = json.loads(second.communicate(timeout=120)[0])
    memory = distill.Importance(bins=4, history=2).memory(VP)
    for step in range(2):
        memory.hear(step, torch.arange(12) % 4, torch.arange(1.0, 13.0))
        memory.learn(step)
    assert first == found == [buffer.tolist() for buffer in memory.buffers()]


def test_what_a_step_that_failed_left_behind_is_forgotten():
    memory = distill.Importance(bins=2, history=1).memory(VP)
    memory.hear(0, torch.tensor([0, 1]), torch.tensor([100.0, 1.0]))
    told(memory, torch.tensor([1.0, 1.0]), 2)
    torch.testing.assert_close(memory.losses, torch.ones(2, 1, dtype=torch.float64))


def test_losses_that_are_only_looked_at_are_not_remembered(toy):
    method = distill.Diffusion(toy(), importance=True)
    with torch.no_grad():
        method.loss("model", {"x0": torch.rand(8, 2)}, 0)
    method.after(0)
    assert method.memory.seen.sum() == 0
    method.loss("model", {"x0": torch.rand(8, 2)}, 0).backward()
    method.after(0)
    assert method.memory.seen.sum() == 8
    assert method.kept == {"losses": method.memory}


def test_without_importance_nothing_is_kept(toy):
    assert distill.Diffusion(toy()).kept == {}


def test_wrong_numbers_are_refused():
    for options in ({"bins": 1}, {"history": 0}, {"uniform": 0.0}, {"uniform": 1.5}):
        with pytest.raises(ValueError, match="at least 2 bins, a history of at least 1 and a uniform share above 0"):
            distill.Importance(**options)
