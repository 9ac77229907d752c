"""The trainer: one loop for every `Method`, on accelerate; a run that is killed goes on bit for bit.

Random numbers are stateless: those of step k are seeded with mix(seed, k), those of batch j of epoch e with
mix(seed, e, j). So a checkpoint needs no generators, and the steps after it do not know of the interruption. Nor do
they know how a batch is split: the loader gives the whole batch of an update, of which each process takes its rows.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsample import files
from fastsample.denoiser import Denoiser
from fastsample.noise import mix

from . import checkpoint as checkpoints
from . import draws
from .checkpoint import Checkpoint
from .data import Stream, check_parts
from .log import Log, bar
from .method import Batch, Method
from .options import Schedule, optimizer_of, schedule_of, settings_of
from .processes import accelerator_of, agreed, on_main, spread, summed
from .role import Optimizer, Role, digest

Evaluate = Callable[[Denoiser, int], Mapping[str, float] | None]
LEAST_SCALE = 1e-4  # of fp16's losses: gradients that are infinite with less stay so


def train(
    method: Method,
    loader: Iterable[Batch],
    *,
    steps: int,
    out: str | Path | None = None,
    lr: float | Mapping[str, float] = 5e-4,
    optimizer: str | Optimizer = "Adam",
    schedule: str | Schedule = "linear",
    warmup: int = 0,
    ema: float | Sequence[float] = 0.995,
    clip: float = 1.0,
    seed: int = 0,
    precision: str | None = None,
    accumulate: int = 1,
    compiled: bool = False,
    checkpointing: bool | Sequence[str] = False,
    save_every: int = 500,
    keep: int = 2,
    log_every: int = 10,
    trackers: Sequence[str] = (),
    evaluate: Evaluate | None = None,
    evaluate_every: int = 500,
    resume: bool = True,
    progress: bool | None = None,
) -> Denoiser:
    """Train every role of a method; return the first with the moving average of its weights, in eval mode.

    loader: gives batches {"x0": images in [-1, 1], "class_labels": ..., ...}, anew each time it is iterated: a
        DataLoader or `Batches`. A batch is that of one update, whatever the number of processes and parts.
    out: the folder of the run: checkpoints step-000500, ... and log.jsonl; None writes nothing.
    lr, schedule, warmup: the learning rate, for all or by role; its factor over the run, "linear", "cosine",
        "constant" or a function of the share done; the steps it takes to rise to lr.
    optimizer: the name of one in torch.optim, or a function (parameters, lr=...) -> optimizer, such as
        functools.partial(torch.optim.AdamW, weight_decay=0.1).
    ema: decay of the moving average, in float32; it begins smaller, so that short runs forget their start. Of several
        the first is returned, and `averaged` has the others.
    clip: largest norm of a role's gradient; math.inf clips none.
    precision: "no", "fp16" or "bf16"; None is what `accelerate launch` was told, else "no".
    accumulate: parts that a process cuts its rows into, one after another, to save memory.
    compiled: run the networks through torch.compile.
    checkpointing: compute activations again in the backward pass, to save memory: True asks the network, as diffusers'
        can; names of classes choose its modules.
    save_every, keep: steps between checkpoints, and how many stay.
    trackers: of accelerate, "tensorboard" or "wandb" for example, beside log.jsonl.
    evaluate: (model with its average, step) -> numbers for the log, or None, every `evaluate_every` steps and at the
        end.
    resume: go on from the newest checkpoint in `out`, with the weights that an uninterrupted run would have had; a
        warning says where another number of threads, processes, device or torch may change their last digits.
    progress: show a bar; None: on a terminal.
    Raises FloatingPointError where a loss is not finite; the last checkpoint stays.

    The networks are trained in place; under FSDP the model that is returned has a new one.
    Under `accelerate launch`, DDP and FSDP 2 change nothing but speed and rounding, as `accumulate` does, but for
    dropout, which draws other masks, and BatchNorm, whose statistics are those of a part.
    """
    decays = (float(ema),) if isinstance(ema, int | float) else tuple(float(decay) for decay in ema)
    counts = {"steps": steps, "accumulate": accumulate, "save_every": save_every, "keep": keep, "log_every": log_every}
    _check({**counts, "evaluate_every": evaluate_every}, warmup=warmup, ema=decays, clip=clip)
    rates = _rates(method, lr)
    factor_of, make = schedule_of(schedule), optimizer_of(optimizer)
    folder = Path(out) if out is not None else None
    with accelerator_of(precision, trackers, out) as accelerator, _generators_kept(accelerator.device):
        data = Stream(loader, seed, accelerator.process_index, accelerator.num_processes)
        example = data.first()
        parts = _Parts(accelerator, accumulate, seed)
        if len(example["x0"]) < parts.number:
            raise ValueError(
                f"a batch of {len(example['x0'])} cannot be split into {parts.number} parts "
                f"({accelerator.num_processes} processes, accumulate = {accumulate}); the loader gives the batch of a "
                f"whole update: make it larger"
            )
        check_parts(loader, parts.number)
        if folder is not None:
            on_main(accelerator, lambda: files.folder(folder))
        settings = method.settings()  # before the networks are wrapped
        options = {"optimizer": make, "ema": decays, "compiled": compiled, "recompute": checkpointing}
        with _prepared(method, accelerator, rates, options) as roles:
            first = next(iter(roles.values()))
            training = {
                "lr": rates,
                "optimizer": settings_of(first.inner),
                "schedule": getattr(factor_of, "__name__", type(factor_of).__name__),
                "warmup": warmup,
                "ema": list(decays),
                "clip": clip,
                "seed": seed,
                "precision": str(accelerator.mixed_precision),
            }
            configuration = {"steps": steps, "training": training, **_configuration(method, settings, roles, example)}
            if differs := checkpoints.differences(agreed(accelerator, configuration), configuration):
                raise ValueError(
                    f"process {accelerator.process_index} has another run than the first: {'; '.join(differs[:5])} "
                    f"(was: in the first); give all of them the same"
                )
            run = _Run(method, roles, data, accelerator, accumulate)
            done = run.resumed(folder, configuration, resume) if folder else 0
            writes = folder if accelerator.is_main_process else None
            shown = progress if accelerator.is_main_process else False
            log = Log(writes, done, log_every, accelerator if trackers else None, configuration)
            with bar(steps, done, shown) as tell, log:
                for step in range(done, steps):
                    batch = parts.cut(*data.next_part())
                    factor = min(1.0, (step + 1) / max(warmup, 1)) * factor_of(step / steps)
                    losses = {}
                    for turn, name in enumerate(method.turns(step)):
                        loss, norm = parts.gradient(method, roles, name, batch, step, turn, clip)
                        losses[name] = loss
                        if not math.isfinite(loss) or not (math.isfinite(norm) or _is_passing(accelerator.scaler)):
                            raise FloatingPointError(_burst(name, loss, norm, step, steps, folder))
                        roles[name].update(factor)
                        roles[name].follow(step)
                    method.after(step)
                    log.add(step, losses, first.lr * factor)
                    tell(step + 1, losses)
                    last = step + 1 == steps
                    if evaluate is not None and ((step + 1) % evaluate_every == 0 or last):
                        log.evaluation(step, run.evaluated(evaluate, step + 1))
                    if folder and ((step + 1) % save_every == 0 or last):
                        run.save(folder, step + 1, configuration, keep)
            for role in roles.values():
                role.finish(average=role is first)
    return first.model


def averaged(model: Denoiser, out: str | Path, ema: float, *, role: str | None = None) -> Denoiser:
    """Put the moving average of another decay, from the newest checkpoint in `out`, into a model; returns it.

    model: what `train` returned, or one of the same shape, in place; weights that were not trained stay as they are.
    role: None is the first.
    Raises ValueError where the run kept no such average.
    """
    found = checkpoints.folders(Path(out))
    if not found:
        raise FileNotFoundError(f"{out} holds no checkpoint; give the folder that train wrote to")
    tensors = checkpoints.tensors(found[-1])
    role = role or checkpoints.roles(found[-1])[0]
    network: Any = model.network
    own = dict(network.named_parameters())
    values = _below(f"{role}.average.{float(ema)}.", tensors)
    if not values or any(key not in own or own[key].shape != value.shape for key, value in values.items()):
        raise ValueError(f"{found[-1]} has no average of role {role!r} with decay {ema:g} for this network")
    buffers = dict(network.named_buffers())
    values |= {key: value for key, value in _below(f"{role}.buffer.", tensors).items() if key in buffers}
    with torch.no_grad():
        for key, value in values.items():
            (own | buffers)[key].copy_(value)
    network.eval()
    return model


def _below(begin: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(begin): value for key, value in tensors.items() if key.startswith(begin)}


class _Parts:
    """A batch as the processes, and the parts of each, share it."""

    def __init__(self, accelerator: Any, accumulate: int, seed: int):
        self.accelerator, self.accumulate, self.seed = accelerator, accumulate, seed
        self.number = accelerator.num_processes * accumulate
        self.generator = torch.Generator(accelerator.device)

    def cut(self, rows: Batch, first: int, total: int) -> tuple[int, list[tuple[int, Batch]]]:
        """The size of the whole batch, and the own parts: where each begins in it, and its rows on the device."""
        own = len(rows["x0"])
        if own < self.accumulate:
            raise ValueError(
                f"the loader gave a batch of {total}, too few for {self.number} parts; leave out the last batch of an "
                f"epoch (drop_last=True)"
            )
        edges = [k * own // self.accumulate for k in range(self.accumulate + 1)]
        device = self.accelerator.device
        return total, [
            (first + low, {key: value[low:high].detach().to(device) for key, value in rows.items()})
            for low, high in pairwise(edges)
        ]

    def gradient(
        self,
        method: Method,
        roles: dict[str, Role],
        name: str,
        batch: tuple[int, list[tuple[int, Batch]]],
        step: int,
        turn: int,
        clip: float,
    ) -> tuple[float, float]:
        """Fill the gradients of a role; its loss over the whole batch, and the norm of its gradient before clipping."""
        role, (total, parts) = roles[name], batch
        value = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        role.optimizer.zero_grad()
        with role.alone(roles.values()):
            for k, (begin, part) in enumerate(parts):
                count = len(part["x0"])
                self.generator.manual_seed(mix(self.seed, step, *([turn] if turn else [])))
                # dropout has a seed of its own: from the same one its masks would follow the noise
                torch.manual_seed(mix(self.seed, step, turn, 1 + self.accelerator.process_index * self.accumulate + k))
                with (
                    draws.part(self.generator, first=begin, count=count, total=total),
                    role.part(last=k + 1 == len(parts)),
                ):
                    loss = method.loss(name, part, step)
                    # DDP and FSDP take the mean over the processes, where the sum is wanted
                    self.accelerator.backward(loss * (count / total * self.accelerator.num_processes))
                value += loss.detach() * (count / total)
            found = float(summed(self.accelerator, value))
            return found, role.gradient(clip)


class _Run:
    """What a checkpoint must hold, and what it is compared with."""

    def __init__(self, method: Method, roles: dict[str, Role], data: Stream, accelerator: Any, accumulate: int):
        self.method, self.roles, self.data, self.accelerator = method, roles, data, accelerator
        self.machine = _machine(accelerator, accumulate)

    def resumed(self, folder: Path, configuration: dict[str, Any], resume: bool) -> int:
        """Restore the newest checkpoint; the number of steps that are done."""
        found = checkpoints.folders(folder)
        newest = found[-1].name if found else None
        if (told := agreed(self.accelerator, newest)) != newest:
            raise ValueError(
                f"process {self.accelerator.process_index} finds {newest or 'no checkpoint'} in {folder}, the first "
                f"process {told or 'none'}: all of them need the same folder"
            )
        if not found:
            on_main(self.accelerator, lambda: checkpoints.sweep(folder))
            return 0
        if not resume:
            raise FileExistsError(
                f"{folder} holds {newest} of an earlier run; pass resume=True, remove it, or choose another folder"
            )
        checkpoint = checkpoints.load(found[-1], configuration)
        on_main(self.accelerator, lambda: checkpoints.sweep(folder))
        changes = checkpoints.differences(checkpoint.machine, self.machine)
        if changes and checkpoint.step < configuration["steps"]:
            warnings.warn(
                f"{found[-1]} was made elsewhere: {'; '.join(changes)}. The run goes on, but the last digits of its "
                f"weights may not be those of an uninterrupted run",
                stacklevel=3,
            )
        for role in self.roles.values():
            role.restore(checkpoint.tensors, checkpoint.numbers)
        with torch.no_grad():
            for key, value in self._kept().items():
                value.copy_(checkpoint.tensors[key])
        if checkpoint.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)
        if checkpoint.step < configuration["steps"]:  # else no batch is wanted, and going there would read an epoch
            self.data.go_to(*checkpoint.place)
        return checkpoint.step

    def save(self, folder: Path, step: int, configuration: dict[str, Any], keep: int) -> None:
        scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        tensors, numbers = self._kept(), dict[str, Any]()
        for role in self.roles.values():
            more, beside = role.state()
            tensors |= more
            numbers |= beside
        now = Checkpoint(step, (self.data.epoch, self.data.used), self.machine, scaler, tensors, numbers)
        on_main(self.accelerator, lambda: checkpoints.save(folder, now, configuration, keep=keep))

    def evaluated(self, evaluate: Evaluate, step: int) -> dict[str, float]:
        """What `evaluate` says of the average, asked by the first process, or by all where they share the weights."""
        first, found = next(iter(self.roles.values())), dict[str, float]()
        with first.averaged() as model, _generators_kept(self.accelerator.device), torch.no_grad():

            def ask() -> None:
                found.update({key: float(value) for key, value in (evaluate(model, step) or {}).items()})

            if self.accelerator.is_fsdp2:
                ask()
            else:
                on_main(self.accelerator, ask)
        return found

    def _kept(self) -> dict[str, Tensor]:
        return {
            f"kept.{name}.{key}": value.detach()
            for name, module in self.method.kept.items()
            for key, value in [*module.named_parameters(), *module.named_buffers()]
        }


def _check(counts: Mapping[str, int], *, warmup: int, ema: Sequence[float], clip: float) -> None:
    for name, number in {**counts, "warmup": warmup}.items():
        if not isinstance(number, int):
            raise TypeError(f"{name} must be a whole number, got {number!r}; int({number!r}) for example")
    for name, number in counts.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    if not ema or not all(0 <= decay < 1 for decay in ema) or len(set(ema)) < len(ema):
        raise ValueError(f"ema is one decay, or several different ones, of 0 <= ema < 1, got ema = {_listed(ema)}")
    if not clip > 0:
        raise ValueError(f"clip must be above 0, got clip = {clip:g}; math.inf clips none")


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _rates(method: Method, lr: float | Mapping[str, float]) -> dict[str, float]:
    """The learning rate of each role."""
    if not method.roles:
        raise ValueError(f"{type(method).__name__} has no roles: there is nothing to train")
    if isinstance(lr, Mapping) and set(lr) != set(method.roles):
        raise ValueError(f"lr names {sorted(lr)}, the roles of {type(method).__name__} are {sorted(method.roles)}")
    rates = {name: lr[name] if isinstance(lr, Mapping) else lr for name in method.roles}
    if not all(rate > 0 for rate in rates.values()):
        raise ValueError(f"lr must be above 0, got lr = {_listed(rates.values())}")
    return rates


def _generators_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """What the caller draws next does not depend on the training."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def _prepared(
    method: Method, accelerator: Any, rates: Mapping[str, float], options: Mapping[str, Any]
) -> Iterator[dict[str, Role]]:
    """The roles, wrapped by accelerate inside, in eval mode and plain again outside."""
    kept = method.kept
    if kept and accelerator.is_fsdp2:
        raise ValueError(
            f"{type(method).__name__} keeps {', '.join(kept)} beside the networks, which FSDP would not spread; run it "
            f"under DDP, or choose options without it"
        )
    models, helpers = method.roles, method.helpers
    if unknown := sorted(helpers.keys() - models.keys()):
        raise ValueError(f"helpers of {type(method).__name__} name {unknown}, its roles are {sorted(models)}")
    for module in [*(model.network for model in method.frozen), *kept.values()]:
        if isinstance(module, nn.Module):
            module.to(accelerator.device).eval()
    for network in (model.network for model in [*method.frozen, *models.values()]):
        _check_finite(network)
    for module in kept.values():
        spread(accelerator, _tensors(module))
    roles: dict[str, Role] = {}
    try:
        for name, model in models.items():
            roles[name] = Role(name, model, accelerator, lr=rates[name], helper=helpers.get(name))
            roles[name].start(**options)
        yield roles
    finally:
        for role in roles.values():
            role.abandon()
        accelerator.free_memory()


def _check_finite(network: Any) -> None:
    for name, value in network.named_parameters() if isinstance(network, nn.Module) else ():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"{name} of {type(network).__name__} holds NaN or infinity before training; load its weights again"
            )


def _configuration(
    method: Method, settings: Mapping[str, Any], roles: dict[str, Role], example: Batch
) -> dict[str, Any]:
    """What must be the same for a run to go on, beside the numbers that `train` was given."""
    kept = {name: [list(value.shape) for value in _tensors(module)] for name, module in method.kept.items()}
    return {
        **({"kept": kept} if kept else {}),
        "method": {"name": type(method).__name__, **settings},
        "batch": {key: list(value.shape) for key, value in example.items()},
        "networks": {name: role.shape() for name, role in roles.items()},
        "frozen": {
            **{str(k): digest(model.network, _tensors(model.network)) for k, model in enumerate(method.frozen)},
            **{name: role.fixed for name, role in roles.items() if role.fixed},
        },
    }


def _tensors(network: Any) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()] if isinstance(network, nn.Module) else []


def _machine(accelerator: Any, accumulate: int) -> dict[str, str]:
    """What the order of summation, and so the last bits of a result, depends on."""
    device = accelerator.device
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()),
        "processes": str(accelerator.num_processes),
        "accumulate": str(accumulate),
    }


def _is_passing(scaler: Any) -> bool:
    """Whether fp16's scale of the loss may yet fall to where gradients are finite: until then it leaves out steps."""
    return scaler is not None and scaler.get_scale() > LEAST_SCALE


def _burst(role: str, loss: float, norm: float, step: int, steps: int, folder: Path | None) -> str:
    found = checkpoints.folders(folder) if folder else []
    what = f"the gradient of role {role!r} is {norm}" if math.isfinite(loss) else f"the loss of role {role!r} is {loss}"
    return (
        f"{what} at step {step + 1} of {steps}; "
        f"{f'the last good checkpoint is {found[-1]}' if found else 'there is no checkpoint yet'}; "
        f"try a smaller lr, a smaller clip, or precision='bf16' in place of 'fp16'"
    )
