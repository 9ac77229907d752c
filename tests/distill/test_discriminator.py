"""The discriminator's head: what it reads, what it says, and losses whose best answers are known."""

import math

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill
from fastsample.distill.discriminator import critic_loss, middle, student_loss
from fastsample.zoo.digits import digits_network


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 9), (5, 6, 3, 3), (5, 6, 2, 3, 4)], ids=str)
def test_there_is_one_logit_for_each_sample_that_depends_on_it_alone(shape):
    head = distill.Discriminator(6, width=8)
    features = torch.randn(shape)
    logits = head(features)
    assert logits.shape == (5,)
    torch.testing.assert_close(head(features[2:3]), logits[2:3])
    assert logits.std() > 0
    assert head(features.half()).dtype == torch.float32


def test_features_of_other_channels_are_refused():
    head = distill.Discriminator(6)
    for shape in ((5, 7, 3, 3), (6,)):
        with pytest.raises(ValueError, match=r"shape \[.*this discriminator reads \[B, 6, \.\.\.\]"):
            head(torch.randn(shape))


def test_the_head_reads_the_middle_of_a_diffusers_network(toy):
    pytest.importorskip("diffusers")
    model = digits_network("v")
    x, at = torch.randn(3, 1, 8, 8), fs.nodes(model.schedule, torch.tensor([10.0, 500.0, 999.0]))
    head = distill.Discriminator(32)
    with head.reads(model.network) as features:
        output = model.output(x, at, class_labels=torch.tensor([0, 1, 2]))
    assert [list(value.shape) for value in features] == [[3, 32, 4, 4]]
    assert middle(model.network) is model.network.network.mid_block
    assert middle(model.network.network) is model.network.network.mid_block
    model.output(x, at, class_labels=torch.tensor([0, 1, 2]))
    assert len(features) == 1  # outside it reads nothing more
    assert not model.network.network.mid_block._forward_hooks
    torch.testing.assert_close(output, model.output(x, at, class_labels=torch.tensor([0, 1, 2])))
    with pytest.raises(ValueError, match=r"Toy has no mid_block .*at=lambda network: network\.layers\[2\]"):
        middle(toy().network)


def test_the_first_of_several_outputs_is_read_and_the_hook_goes_where_the_reading_fails():
    class Pair(nn.Module):
        def forward(self, x):
            return 2 * x, x

    network = nn.Sequential(Pair())
    head = distill.Discriminator(2, at=lambda network: network[0])
    with head.reads(network) as features:
        network(torch.ones(1, 2))
    assert torch.equal(features[0], 2 * torch.ones(1, 2))
    with pytest.raises(ZeroDivisionError), head.reads(network):
        raise ZeroDivisionError
    assert not network[0]._forward_hooks


def test_the_losses_are_those_of_the_papers():
    real, fake = torch.tensor([0.5, -1.0, 40.0]), torch.tensor([2.0, -0.3, -40.0])
    right = [torch.sigmoid(real), torch.sigmoid(fake)]
    expected = -(right[0].log().mean() + (1 - right[1]).log().mean())
    torch.testing.assert_close(critic_loss(real, fake), expected)
    torch.testing.assert_close(student_loss(fake), -right[1].double().log().mean().float())
    assert critic_loss(torch.tensor([-1000.0]), torch.tensor([1000.0])) == 2000  # no log of 0


def test_the_best_head_between_two_gaussians_is_the_log_of_their_ratio():
    """Of N(0, 1) and N(1, 1) that is 1 / 2 - x: at it the loss is stationary, and grows to all sides."""
    x = torch.linspace(-9, 10, 301, dtype=torch.float64)
    real, fake = ((-0.5 * (x - mean) ** 2).exp() / math.sqrt(2 * math.pi) * (x[1] - x[0]) for mean in (0, 1))

    def loss(slope, offset):
        logits = offset + slope * x
        each = torch.stack([critic_loss(value[None], logits.new_tensor([-math.inf])) for value in logits])
        other = torch.stack([critic_loss(logits.new_tensor([math.inf]), value[None]) for value in logits])
        return (each * real).sum() + (other * fake).sum()

    slope, offset = (torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in (-1.0, 0.5))
    best = loss(slope, offset)
    best.backward()
    assert abs(slope.grad) < 1e-9  # the ends are below 1e-17, and the rule exact but for that
    assert abs(offset.grad) < 1e-9
    with torch.no_grad():
        assert all(loss(a, b) > best for a, b in ((-1.1, 0.5), (-0.9, 0.5), (-1, 0.6), (-1, 0.4)))


def test_both_roles_of_a_diffusers_network_learn_with_a_head():
    pytest.importorskip("diffusers")
    student, teacher, critic = (digits_network("v", seed=seed) for seed in range(3))
    method = distill.DistributionMatching(student, teacher, critic, steps=2, head=distill.Discriminator(32), gan=1.0)
    batch = {"x0": torch.rand(4, 1, 8, 8) * 2 - 1, "class_labels": torch.arange(4)}
    for role, model in method.roles.items():
        others = [p for other in (student, teacher, critic) if other is not model for p in other.network.parameters()]
        others += [] if role == "critic" else list(method.head.parameters())
        for p in others:
            p.requires_grad_(False)
        loss = method.loss(role, batch, 0)
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad is None for p in others)
        assert any(p.grad is not None and p.grad.any() for p in model.network.parameters())
        for p in others:
            p.requires_grad_(True)
        model.network.zero_grad()
    assert all(p.grad.any() for p in method.head.parameters())
