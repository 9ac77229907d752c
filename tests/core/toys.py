"""Small schedules, networks and solvers that the tests of the core share."""

import torch

import fastsample as fs

TABLES = {
    "linear": fs.VP.linear(),
    "scaled_linear": fs.VP.scaled_linear(),
    "cosine": fs.VP.cosine(),
    "sigmoid": fs.VP.sigmoid(),
    "custom": fs.VP((0.1, 0.2, 0.05, 0.4)),
    "zero_terminal_snr": fs.VP.scaled_linear().zero_terminal_snr(),
}
SCHEDULES = {
    **TABLES,
    "continuous": fs.VPContinuous(),
    "edm": fs.EDM(),
    "flow": fs.Flow(),
    "shifted_flow": fs.Flow(shift=3.0),
    "trig_flow": fs.TrigFlow(),
}
REGULAR = {name: schedule for name, schedule in SCHEDULES.items() if name not in ("zero_terminal_snr", "custom")}


class Toy(torch.nn.Module):
    """eps = tanh(x) / 2 + t / 5000, number by number: no batch, however large, can change a sample."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, t):
        self.seen.append((x, t))
        return 0.5 * x.tanh() + (t / 5000).view(-1, *[1] * (x.dim() - 1)).to(x)


def ddim(model, x, grid):
    for s, t in grid.steps():
        x = fs.exponential_step(x, model.predict(x, s), s, t)
    return x


def two_step(model, x, grid):
    """DPM-Solver++(2M): one older x0."""
    old = None
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        slope = 0.0 * x0
        if old and t.sigma > 0:
            slope = (x0 - old[0]) * ((t.lam - s.lam) / (s.lam - old[1].lam))
        x = fs.exponential_step(x, x0 + 0.5 * slope, s, t)
        old = x0, s
    return x


def adams_eps(model, x, grid):
    """Two-step Adams-Bashforth in eps over sigma / alpha: remembers eps."""
    old = None
    for s, t in grid.steps():
        eps = (x - s.alpha * model.predict(x, s)) / s.sigma
        both = 1.5 * eps - 0.5 * old if old is not None else eps
        x = (x / s.alpha + both * (t.sigma / t.alpha - s.sigma / s.alpha)) * t.alpha
        old = eps
    return x


def heun(model, x, grid):
    """Predict with DDIM, then average the two x0: needs the older state of each step."""
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        there = fs.exponential_step(x, x0, s, t)
        if t.sigma > 0:
            there = fs.exponential_step(x, 0.5 * (x0 + model.predict(there, t)), s, t)
        x = there
    return x


def renoise(model, x, grid):
    """Multistep consistency sampling: to x0, and back to t with new noise."""
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        x = t.alpha * x0 + t.sigma * model.noise() if t.sigma > 0 else x0
    return x


def churn(model, x, grid):
    """Noise before every evaluation, the first included, taken away again by half at the step after."""
    for s, t in grid.steps():
        z = model.noise()
        x = fs.exponential_step(x + 0.1 * s.sigma * z, model.predict(x + 0.1 * s.sigma * z, s), s, t)
        x = x - 0.05 * t.sigma * z
    return x


def late_noise(model, x, grid):
    """The noise drawn before the first evaluation is used only after it."""
    z = model.noise()
    for s, t in grid.steps():
        x = fs.exponential_step(x, model.predict(x, s), s, t) + 0.1 * t.sigma * z
    return x


def long_noise(model, x, grid):
    """Uses the noises of three steps at once, and none at every second step."""
    drawn = []
    for k, (s, t) in enumerate(grid.steps()):
        x = fs.exponential_step(x, model.predict(x, s), s, t)
        drawn = [model.noise(), *drawn] if k % 2 == 0 else drawn
        for factor, z in zip((0.1, 0.2, 0.3), drawn):
            x = x + factor * t.sigma * z
    return x


ODE = [ddim, two_step, adams_eps, heun]
NOISY = [renoise, churn, late_noise, long_noise]
