"""Every method on the toy in the plane, by name: what holds for all of them is tested on all of them.

METHODS[name](make) gives a new Method of new networks; make(predicts, seed=, schedule=, boundary=) makes a denoiser.
"""

import torch
from torch import nn

import fastsample as fs
from fastsample import distill, solvers

NULL = {"class_labels": 2}
DROP = {"drop": 0.1, "null": NULL}


def guided(model, scale=2.0):
    return fs.Guided(model, uncond={"class_labels": torch.tensor([2])}, scale=scale)


def consistency_training(make):
    return distill.ConsistencyTraining(make("v"), times=distill.Doubling(4, 16, over=12), **DROP)


def original(make):
    return distill.ConsistencyTraining.original(make("v"), over=12, s1=20)


def distribution(make, *, adversarial=False, **options):
    if adversarial:
        torch.manual_seed(4)  # of the head's first weights
        options["head"] = distill.Discriminator(64, at=lambda network: network.layers[4])
    student, teacher, critic = make("v", seed=0), make("v", seed=1), make("v", seed=2)
    return distill.DistributionMatching(student, teacher, critic, ratio=3, **options)


class TwoTimes(nn.Module):
    """A network of one time, told half of each of two."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t, r, **condition):
        return self.network(x, 500 * (t + r), **condition)


def mean_flow(make, teacher=None, **options):
    return distill.MeanFlow(distill.FlowMap(TwoTimes(make("flow", schedule=fs.Flow()).network)), teacher, **options)


METHODS = {
    "diffusion": lambda make: distill.Diffusion(make("eps"), **DROP),
    "diffusion_importance": lambda make: distill.Diffusion(
        make("v"), weight=distill.MinSNR(), importance=distill.Importance(bins=4, history=2)
    ),
    "conversion": lambda make: distill.Conversion(make("v"), make("eps", seed=1), **DROP),
    "progressive": lambda make: distill.ProgressiveDistillation(make("v"), make("v", seed=1), steps=4, **DROP),
    "progressive_guided": lambda make: distill.ProgressiveDistillation(make("x0"), guided(make("v", seed=1)), steps=2),
    "consistency": lambda make: distill.ConsistencyDistillation(make("v"), make("v", seed=1), **DROP),
    "consistency_average": lambda make: distill.ConsistencyDistillation(
        make("v"), make("v", seed=1), solver=solvers.heun, target=0.9, times=distill.Doubling(4, 16, over=12)
    ),
    "consistency_training": consistency_training,
    "consistency_training_original": original,
    "easy_consistency_tuning": lambda make: distill.EasyConsistencyTuning(make("v"), every=4, stages=2),
    "latent_consistency": lambda make: distill.LatentConsistency(
        make("v", boundary="lcm"), guided(make("v", seed=1)), scales=distill.Scales(1.5, 3.0, embed=None), target=0.95
    ),
    "distribution": distribution,
    "distribution_adversarial": lambda make: distribution(make, adversarial=True, steps=2),
    "continuous": lambda make: distill.ContinuousConsistency(make("v"), make("v", seed=1), warmup=8, **DROP),
    "continuous_training": lambda make: distill.ContinuousConsistency(make("v"), tangent="finite_difference"),
    "mean_flow": lambda make: mean_flow(make, scale=2.0, **DROP),
    "mean_flow_distillation": lambda make: mean_flow(make, guided(make("v", seed=1))),
    "reflow": lambda make: distill.Reflow(make("flow", schedule=fs.Flow())),
}


def points(count, dtype=torch.float32):
    """Batches' tensors: points in the plane, their classes, and a noise for those that learn from pairs."""
    generator = torch.Generator().manual_seed(3)
    x0 = (0.5 * torch.randn(count, 2, generator=generator, dtype=torch.float64)).clamp(-1, 1).to(dtype)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64).to(dtype)
    return x0, torch.arange(count) % 2, noise


def loader(name, size=32, count=256, dtype=torch.float32):
    x0, labels, noise = points(count, dtype)
    condition = {"class_labels": labels} | ({"noise": noise} if name == "reflow" else {})
    return distill.Batches(x0, condition, size=size)


def maker(network, dtype=torch.float32, **options):
    """make, of a class of networks with a seed."""

    def make(predicts, *, seed=0, schedule=None, boundary=None):
        made = network(seed=seed, **options).to(dtype)
        model = fs.Denoiser(made, schedule or fs.VP.scaled_linear(), predicts, time="unit" if schedule else None)
        return model if boundary is None else distill.bounded(model, boundary)

    return make
