"""Options of the trainer: each does what it says, and a run with it that is stopped goes on bit for bit."""

import json
import math
from functools import partial

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill
from fastsample.distill.options import optimizer_of, schedule_of

pytest.importorskip("accelerate")


class Stopped(distill.Diffusion):
    """Stops the run at a step, as a crash would."""

    at = 0

    def after(self, step):
        if step + 1 == self.at:
            raise KeyboardInterrupt


Stopped.__name__ = "Diffusion"  # it is the same method to a checkpoint


def run(model, loader, out=None, *, at=0, steps=12, **options):
    method = Stopped(model)
    object.__setattr__(method, "at", at)
    return distill.train(method, loader, steps=steps, out=out, **{"save_every": 5, **options})


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.network.parameters(), other.network.parameters()))


def goes_on(make, loader, folder, **options):
    """The weights of a run that was stopped in its seventh step are those of one that was not."""
    with pytest.raises(KeyboardInterrupt):
        run(make(), loader, folder, at=7, **options)
    one, other = run(make(), loader, folder, **options), run(make(), loader, **options)
    assert same(one, other)
    return one


@pytest.mark.parametrize("parts", [2, 3, 64])
def test_accumulation_changes_rounding_alone(parts, toy, loader):
    def trained(accumulate):
        model = toy()
        model.network.double()
        model.dtype = torch.float64
        batches = distill.Batches(
            loader.tensors["x0"].double(), {"class_labels": loader.tensors["class_labels"]}, size=64
        )
        return run(model, batches, steps=6, accumulate=accumulate)

    one, other = trained(1), trained(parts)
    torch.testing.assert_close(list(one.network.parameters()), list(other.network.parameters()), rtol=1e-9, atol=1e-9)
    assert not same(one, other) or parts == 1


def test_a_run_with_accumulation_and_two_averages_goes_on(toy, loader, tmp_path):
    goes_on(lambda: toy(dropout=0.1), loader, tmp_path, accumulate=3, ema=(0.9, 0.99), precision="bf16")


def test_more_parts_than_samples_are_refused(toy, loader):
    with pytest.raises(
        ValueError, match=r"a batch of 64 cannot be split into 65 parts \(1 processes, accumulate = 65\)"
    ):
        run(toy(), loader, accumulate=65)


def test_each_average_is_that_of_its_decay_alone(toy, loader, tmp_path):
    both = run(toy(), loader, tmp_path, ema=(0.5, 0.9))
    alone = {decay: run(toy(), loader, ema=decay) for decay in (0.5, 0.9)}
    assert same(both, alone[0.5])
    assert not same(both, alone[0.9])
    assert same(distill.averaged(both, tmp_path, 0.9), alone[0.9])
    with pytest.raises(ValueError, match=r"no average of role 'model' with decay 0\.7"):
        distill.averaged(both, tmp_path, 0.7)
    with pytest.raises(ValueError, match="no average of role 'critic'"):
        distill.averaged(both, tmp_path, 0.9, role="critic")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        distill.averaged(both, tmp_path / "other", 0.9)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RAdam", "Adafactor", "Rprop", "NAdam", "ASGD", "Adamax"])
def test_a_run_of_every_kind_of_optimizer_goes_on(name, toy, loader, tmp_path):
    goes_on(toy, loader, tmp_path, optimizer=name, lr=1e-3)
    with pytest.raises(ValueError, match=rf'training\.optimizer\.name was "{name}", now "Adagrad"'):
        run(toy(), loader, tmp_path, optimizer="Adagrad", lr=1e-3)


def test_an_optimizer_that_is_given_goes_on_and_its_settings_are_remembered(toy, loader, tmp_path):
    goes_on(toy, loader, tmp_path, optimizer=partial(torch.optim.SGD, momentum=0.9))
    with pytest.raises(ValueError, match=r"training\.optimizer\.momentum was 0\.9, now 0\.5"):
        run(toy(), loader, tmp_path, optimizer=partial(torch.optim.SGD, momentum=0.5))


def test_one_step_of_the_named_optimizer_is_torch_own(toy, loader):
    """SGD moves against the gradient by lr times it."""
    model, own = toy(), toy()
    seen = []

    class Watched(distill.Diffusion):
        def after(self, step):
            seen.extend(value.grad.clone() for value in self.model.network.parameters())

    distill.train(Watched(model), loader, steps=1, lr=0.1, optimizer="SGD", clip=math.inf, ema=0.0, schedule="constant")
    for before, after, gradient in zip(own.network.parameters(), model.network.parameters(), seen):
        torch.testing.assert_close(after, before - 0.1 * gradient)


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda s: 1.0),
        ("cosine", lambda s: 0.5 + 0.5 * math.cos(math.pi * s)),
        (lambda s: s**2, lambda s: s**2),
    ],
)
def test_the_rate_follows_its_schedule(schedule, factor, toy, loader, tmp_path):
    run(toy(), loader, tmp_path, steps=10, lr=0.01, schedule=schedule, log_every=1)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.01 * factor(k / 10) for k in range(10)])


def test_unknown_names_are_refused_with_the_known_ones(toy, loader, tmp_path):
    with pytest.raises(ValueError, match=r"unknown optimizer 'Adamw'; choose one of .*AdamW.*partial\("):
        optimizer_of("Adamw")
    with pytest.raises(ValueError, match="unknown optimizer 'LBFGS'"):  # it asks for a closure
        optimizer_of("LBFGS")
    with pytest.raises(ValueError, match="unknown schedule 'onecycle'; choose one of linear, constant, cosine"):
        schedule_of("onecycle")
    with pytest.raises(ValueError, match=r"lr names \['student'\], the roles of \w+ are \['model'\]"):
        run(toy(), loader, lr={"student": 1.0})
    with pytest.raises(ValueError, match="lr must be above 0, got lr = 0"):
        run(toy(), loader, lr=0.0)
    with pytest.raises(ValueError, match="ema is one decay, or several different ones"):
        run(toy(), loader, ema=(0.9, 0.9))
    with pytest.raises(ValueError, match="clip must be above 0, got clip = 0"):
        run(toy(), loader, clip=0.0)
    with pytest.raises(ValueError, match=r"unknown tracker 'tensorbord'; accelerate has .*tensorboard"):
        run(toy(), loader, tmp_path, trackers=["tensorbord"])
    with pytest.raises(ValueError, match=r"trackers \(tensorboard\) need a folder"):
        run(toy(), loader, trackers=["tensorboard"])


def test_a_tracker_that_is_not_installed_is_named(toy, loader, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: False)
    with pytest.raises(ImportError, match="tracker wandb is not installed: pip install wandb"):
        run(toy(), loader, tmp_path, trackers=["wandb"])


def test_tensorboard_is_told_what_the_log_says(toy, loader, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(toy(), loader, tmp_path, trackers=["tensorboard"], log_every=4, evaluate=lambda model, step: {"fd": 2.0 * step})
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.name == "fastsample"}
    found = EventAccumulator(str(events)).Reload()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]["model"]) for line in lines if "loss" in line]
    told = found.Scalars("loss/model")
    assert [event.step for event in told] == [step for step, _ in losses] == [4, 8, 12]
    assert [event.value for event in told] == pytest.approx([loss for _, loss in losses])
    assert [(event.step, event.value) for event in found.Scalars("evaluation/fd")] == [(12, 24.0)]


def test_an_evaluation_sees_the_average_in_eval_mode_and_changes_nothing(toy, loader, tmp_path):
    def evaluate(model, step):
        torch.rand(3)
        assert not model.network.training
        assert not torch.is_grad_enabled()
        seen.append([value.clone() for value in model.network.parameters()])
        return {"fd": step / 2}

    seen = []
    watched = run(toy(dropout=0.1), loader, tmp_path, evaluate=evaluate, evaluate_every=5)
    assert same(watched, run(toy(dropout=0.1), loader))
    for value, last in zip(watched.network.parameters(), seen[-1]):
        assert torch.equal(value, last)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["evaluation"]) for line in lines if "evaluation" in line] == [
        (5, {"fd": 2.5}), (10, {"fd": 5.0}), (12, {"fd": 6.0}),
    ]  # fmt: skip


@pytest.mark.parametrize("modules", [["Linear"], ["Sequential", "Embedding"]])
def test_activation_checkpointing_changes_nothing_but_memory(modules, toy, loader):
    def calls(module, *given):
        counted.append(module)

    model, counted = toy(dropout=0.1), []
    model.network.layers[0].register_forward_hook(calls)
    found = run(model, loader, steps=3, checkpointing=modules)
    assert len(counted) == 6 if modules != ["Linear"] else len(counted) in (3, 6)
    assert same(found, run(toy(dropout=0.1), loader, steps=3))
    assert "forward" not in model.network.layers[0].__dict__


def test_activation_checkpointing_asks_a_network_of_diffusers_itself():
    model = fs.zoo.digits_network("v")
    inside = model.network.network
    seen = []

    class Watched(distill.Diffusion):
        def loss(self, role, batch, step):
            seen.append(inside.is_gradient_checkpointing)
            return super().loss(role, batch, step)

    batches = distill.Batches(torch.zeros(8, 1, 8, 8), {"class_labels": torch.zeros(8, dtype=torch.long)}, size=8)
    distill.train(Watched(model), batches, steps=1, checkpointing=True)
    assert seen == [True]
    assert not inside.is_gradient_checkpointing


def test_activation_checkpointing_of_what_is_not_there_is_refused(toy, loader):
    with pytest.raises(ValueError, match=r"Toy has no enable_gradient_checkpointing; .*checkpointing=\['Embedding'\]"):
        run(toy(), loader, checkpointing=True)
    with pytest.raises(ValueError, match=r"Toy has no modules of class Conv2d; it has .*Linear"):
        run(toy(), loader, checkpointing=["Conv2d"])


@pytest.mark.slow  # a compiler runs
def test_compiled_networks_learn_the_same_and_are_plain_again(toy, loader):
    compiled, plain = run(toy(), loader, steps=3, compiled=True), run(toy(), loader, steps=3)
    torch.testing.assert_close(
        dict(compiled.network.named_parameters()), dict(plain.network.named_parameters()), rtol=1e-4, atol=1e-5
    )
    assert type(compiled.network) is type(plain.network)


def needs(model):
    """Whether its weights need a gradient; None where they do not agree."""
    found = {value.requires_grad for value in model.network.parameters()}
    return found.pop() if len(found) == 1 else None


class Two(distill.Method):
    """A student that a critic judges with a head of its own, and a kept average: all that a method may hold."""

    def __init__(self, student, critic):
        self.student, self.critic = student, critic
        self.head = nn.Linear(2, 1)
        torch.nn.init.constant_(self.head.weight, 0.3)
        torch.nn.init.constant_(self.head.bias, 0.1)
        self.memory = nn.BatchNorm1d(2)
        self.at, self.told = 0, []

    @property
    def roles(self):
        return {"student": self.student, "critic": self.critic}

    @property
    def helpers(self):
        return {"critic": self.head}

    @property
    def kept(self):
        return {"memory": self.memory}

    def settings(self):
        return {}

    def turns(self, step):
        return ("critic", "student") if step % 3 == 2 else ("critic",)

    def loss(self, role, batch, step):
        x0 = batch["x0"]
        at = fs.grid(self.student.schedule, 4).nodes[1]
        made = self.student.predict(x0 + distill.draws.randn_like(x0), at)
        own, other = (self.student, self.critic) if role == "student" else (self.critic, self.student)
        self.told.append(
            (role, needs(own), needs(other), self.head.weight.requires_grad)
        )  # fmt: skip
        if role == "student":
            return self.head(self.critic.predict(made, at)).square().mean()
        return (self.head(self.critic.predict(made.detach(), at)) - x0[:, :1]).square().mean()

    def after(self, step):
        with torch.no_grad():
            value = next(iter(distill.plain(self.student).network.parameters()))
            self.memory.running_mean.lerp_(value.flatten()[:2], 0.1)
        if step + 1 == self.at:
            raise KeyboardInterrupt


def test_a_method_of_two_roles_with_a_head_and_a_memory_goes_on(toy, loader, tmp_path):
    def trained(out=None, at=0):
        method = Two(toy(), toy(seed=1))
        method.at = at
        distill.train(
            method, loader, steps=12, out=out, save_every=5, accumulate=2, lr={"student": 1e-3, "critic": 2e-3}
        )
        return method

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, at=7)
    one, other = trained(tmp_path), trained()
    for a, b in (
        (one.student.network, other.student.network),
        (one.critic.network, other.critic.network),
        (one.head, other.head),
    ):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert torch.equal(one.memory.running_mean, other.memory.running_mean)
    assert float(one.head.weight.detach().sub(0.3).abs().max()) > 1e-3  # it learns
    assert {told[1:3] for told in other.told} == {(True, False)}  # the other is only asked
    assert {(told[0], told[3]) for told in other.told} == {("student", False), ("critic", True)}
    assert all(p.requires_grad for p in other.critic.network.parameters())


def test_the_average_is_that_of_the_first_role_where_none_is_named(toy, loader, tmp_path):
    """Not of the first in the alphabet, in which a file holds them."""
    method = Two(toy(), toy(seed=1))
    student = distill.train(method, loader, steps=6, out=tmp_path, ema=0)
    critic = distill.averaged(toy(seed=2), tmp_path, 0, role="critic")
    assert same(distill.averaged(toy(seed=2), tmp_path, 0), student)
    assert same(critic, method.critic)
    assert not same(critic, student)
    with pytest.raises(ValueError, match=r"no average of role 'student' with decay 0 for this network"):
        distill.averaged(toy(width=32), tmp_path, 0)


def test_an_average_comes_with_the_buffers_of_the_run(toy, loader, tmp_path):
    def normed():
        model = toy()
        model.network.layers.append(nn.BatchNorm1d(2))
        return model

    model = run(normed(), loader, tmp_path, ema=(0.5, 0.9))
    found = distill.averaged(normed(), tmp_path, 0.5)
    torch.testing.assert_close(found.network.state_dict(), model.network.state_dict(), rtol=0, atol=0)
    assert not found.network.training


def test_what_fails_before_the_first_step_leaves_a_network_as_it_was(toy, loader):
    model = toy()
    with pytest.raises(TypeError, match="momentm"):
        run(model, loader, optimizer=partial(torch.optim.SGD, momentm=0.9), precision="bf16", checkpointing=["Linear"])
    for module in model.network.modules():
        assert "forward" not in vars(module)
        assert not module.training


@pytest.mark.parametrize("modules", [["Toy"], ["Sequential"], False])
def test_a_network_has_its_own_forward_again_and_no_gradients(modules, toy, loader):
    """Half precision and activation checkpointing both stand before it."""
    model = toy()
    run(model, loader, steps=2, checkpointing=modules, precision="bf16")
    assert all("forward" not in vars(module) for module in model.network.modules())
    assert all(value.grad is None for value in model.network.parameters())
    found = model.network(torch.zeros(3, 2), torch.zeros(3))
    assert found.dtype == torch.float32


def test_activation_checkpointing_that_a_network_had_on_stays_on():
    model = fs.zoo.digits_network("v")
    model.network.network.enable_gradient_checkpointing()
    batches = distill.Batches(torch.zeros(8, 1, 8, 8), {"class_labels": torch.zeros(8, dtype=torch.long)}, size=8)
    distill.train(distill.Diffusion(model), batches, steps=1, checkpointing=True)
    assert model.network.network.is_gradient_checkpointing


def test_a_helper_keeps_what_it_holds_still_and_goes_on(toy, loader, tmp_path):
    def trained(out=None, at=0, still=0.1):
        method = Two(toy(), toy(seed=1))
        method.head.bias.requires_grad_(False).fill_(still)
        method.at = at
        distill.train(method, loader, steps=6, out=out, save_every=2)
        return method.head

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, at=5)
    head, other = trained(tmp_path, still=0.2), trained()
    assert not head.bias.requires_grad
    assert not head.training
    assert float(other.bias) == pytest.approx(0.1)
    torch.testing.assert_close(head.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_helper_of_no_role_is_refused(toy, loader):
    class Wrong(Two):
        helpers = property(lambda self: {"critc": self.head})

    with pytest.raises(ValueError, match=r"helpers of Wrong name \['critc'\], its roles are \['critic', 'student'\]"):
        distill.train(Wrong(toy(), toy(seed=1)), loader, steps=1)


class Counting(torch.optim.SGD):
    """Counts in its groups, as some optimizers that need no schedule do, and slows by it."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] /= group["count"]
        return super().step(closure)


def test_what_an_optimizer_keeps_in_its_groups_goes_on(toy, loader, tmp_path):
    goes_on(toy, loader, tmp_path, optimizer=Counting, lr=0.1)


@pytest.fixture
def half(monkeypatch):
    """fp16 with a scaler on the CPU, where accelerate has none; the scalers that were made."""
    import accelerate

    made = []

    class Half(accelerate.Accelerator):
        def __init__(self, **options):
            super().__init__(**{**options, "mixed_precision": "no"})
            self.state._mixed_precision = "fp16"
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
            made.append(self.scaler)

    monkeypatch.setattr(accelerate, "Accelerator", Half)
    return made


class Overflowing(Two):
    """The student's gradient is infinite at its first turn."""

    def loss(self, role, batch, step):
        loss = super().loss(role, batch, step)
        return loss * (1e38 if role == "student" and step == 2 else 1.0)


def test_a_gradient_that_overflows_halves_the_scale_once(half, toy, loader):
    """Not at each turn of the other role until its own next."""
    method = Overflowing(toy(), toy(seed=1))
    before = [value.clone() for value in method.critic.network.parameters()]
    distill.train(method, loader, steps=5, precision="fp16", ema=0)
    assert half[0].get_scale() == 2.0**10  # doubled after three good updates, halved, one more of two good ones
    assert all(torch.equal(a, b) for a, b in zip(toy().network.parameters(), method.student.network.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(before, method.critic.network.parameters()))


def test_gradients_that_stay_infinite_stop_a_run_in_half_precision(half, toy, loader):
    class Always(distill.Diffusion):
        def loss(self, role, batch, step):
            return (0 * super().loss(role, batch, step)).sqrt()

    with pytest.raises(FloatingPointError, match="gradient of role 'model' is nan at step 25 of 40"):  # 2^-14 < 1e-4
        distill.train(Always(toy()), loader, steps=40, precision="fp16")


def test_a_run_with_a_scaler_goes_on(half, toy, loader, tmp_path):
    goes_on(lambda: toy(dropout=0.1), loader, tmp_path, precision="fp16")
    manifest = json.loads((tmp_path / "step-000010" / "manifest.json").read_text())
    assert manifest["scaler"]["scale"] > 2.0**10


def test_accumulation_that_accelerate_was_told_is_refused(toy, loader, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"accumulate the gradients of 4 steps; .*pass accumulate=4 to train"):
        run(toy(), loader)


def test_an_accelerator_of_the_caller_that_is_accumulating_does_not_matter(toy, loader):
    from accelerate import Accelerator

    own = Accelerator(gradient_accumulation_steps=3)
    with own.accumulate():
        assert not own.sync_gradients
        assert same(run(toy(), loader, steps=2), run(toy(), loader, steps=2))
        assert not same(run(toy(), loader, steps=2, ema=0), toy())
        assert not own.sync_gradients


def test_numbers_of_steps_are_whole(toy, loader):
    with pytest.raises(TypeError, match=r"steps must be a whole number, got 10000\.0; int\(10000\.0\)"):
        run(toy(), loader, steps=1e4)


def test_an_evaluation_may_have_nothing_to_tell_or_fail(toy, loader, tmp_path):
    run(toy(), loader, tmp_path / "none", evaluate=lambda model, step: None)
    model = toy()
    with pytest.raises(ZeroDivisionError):
        run(model, loader, tmp_path / "fails", evaluate=lambda model, step: 1 / 0, evaluate_every=2, ema=0.9)
    assert same(model, run(toy(), loader, steps=2, ema=0, schedule=lambda done: 1 - done / 6))  # its own, not averaged
    assert not model.network.training


def test_a_number_of_an_evaluation_that_is_not_finite_is_written_as_text(toy, loader, tmp_path):
    run(toy(), loader, tmp_path, evaluate=lambda model, step: {"fd": math.nan})
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_tensorboard_forgets_what_is_done_again(toy, loader, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"trackers": ["tensorboard"], "log_every": 1}
    with pytest.raises(KeyboardInterrupt):
        run(toy(), loader, tmp_path, at=9, **options)
    run(toy(), loader, tmp_path, **options)
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.name == "fastsample"}
    told = EventAccumulator(str(events)).Reload().Scalars("loss/model")
    assert [event.step for event in told] == list(range(1, 13))
