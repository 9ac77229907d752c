"""The trainer: a run that is stopped goes on bit for bit, a wrong one stops at once and says why."""

import errno
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import fastsample as fs
from fastsample import distill
from fastsample.distill import checkpoint
from fastsample.distill.log import Log

pytest.importorskip("accelerate")
HERE = Path(__file__).parent


class Stopping(distill.Diffusion):
    """Stops the run at a step, as a crash would."""

    at = 0

    def after(self, step):
        if step + 1 == self.at:
            raise KeyboardInterrupt


Stopping.__name__ = "Diffusion"  # it is the same method to a checkpoint


def run(toy, loader, out=None, *, at=0, steps=24, **options):
    method = Stopping(toy(dropout=0.1), drop=0.1, null={"class_labels": 2})
    object.__setattr__(method, "at", at)
    return distill.train(method, loader, steps=steps, out=out, **{"save_every": 5, **options})


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.network.parameters(), other.network.parameters()))


def test_two_runs_of_one_seed_are_equal_and_of_another_are_not(toy, loader):
    first = run(toy, loader)
    torch.rand(7)  # what the caller draws does not matter
    assert same(first, run(toy, loader))
    assert not same(first, run(toy, loader, seed=1))


@pytest.mark.parametrize("at", [3, 5, 17, 20])  # before any checkpoint, on one, in the second epoch of 16 batches
def test_a_run_that_fails_goes_on_to_the_same_weights(at, toy, loader, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(toy, loader, tmp_path / "stopped", at=at)
    assert same(run(toy, loader, tmp_path / "stopped"), run(toy, loader, tmp_path / "whole"))
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("stopped", "whole")]
    assert [json.loads(line)["step"] for line in logs[0]] == [json.loads(line)["step"] for line in logs[1]] == [10, 20]


def test_a_data_loader_with_random_transforms_goes_on_alike(toy, ring, tmp_path):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 96

        def __getitem__(self, i):
            return {"x0": (ring[0][i] + 0.01 * torch.randn(2)).clamp(-1, 1), "class_labels": ring[1][i]}

    loader = torch.utils.data.DataLoader(Noisy(), batch_size=16, shuffle=True)
    with pytest.raises(KeyboardInterrupt):
        run(toy, loader, tmp_path / "stopped", at=9)
    assert same(run(toy, loader, tmp_path / "stopped"), run(toy, loader))


KILLED = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from conftest import Toy
import fastsample as fs
from fastsample import distill
points = torch.linspace(-1, 1, 256).view(128, 2)
class Slow(distill.Diffusion):
    def after(self, step):
        time.sleep(0.02)
Slow.__name__ = "Diffusion"
method = Slow(fs.Denoiser(Toy(dropout=0.1), fs.VP.scaled_linear(), "v"))
distill.train(method, distill.Batches(points, size=32), steps=200, out=sys.argv[2], save_every=1, keep=2)
"""


def test_a_run_that_is_killed_goes_on_to_the_same_weights(toy, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(HERE), str(out)], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(out.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # into the middle of it: with a checkpoint at every step, often while one is written
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = max(int(path.name[5:]) for path in out.glob("step-*"))
    assert 0 < done < 200
    points = torch.linspace(-1, 1, 256).view(128, 2)

    def finish(folder):
        method = distill.Diffusion(toy("v", dropout=0.1))
        return distill.train(
            method, distill.Batches(points, size=32), steps=200, out=folder, save_every=1 if folder else 500, keep=2
        )

    assert same(finish(out), finish(None))
    assert list(out.glob(".step-*")) == []
    assert sorted(path.name for path in out.glob("step-*")) == ["step-000199", "step-000200"]


@pytest.mark.parametrize("moment", ["before the rename", "after it", "before an old one goes", "while it goes"])
def test_a_run_that_is_killed_while_it_saves_goes_on_to_the_same_weights(moment, toy, loader, tmp_path, monkeypatch):
    def dies(path, target):
        if moment == "before the rename" and Path(target).name == "step-000015":
            raise KeyboardInterrupt
        if moment == "before an old one goes" and path.name == "step-000005" and path.parent == tmp_path:
            raise KeyboardInterrupt
        rename(path, target)
        if moment == "after it" and Path(target).name == "step-000015":
            raise KeyboardInterrupt
        if moment == "while it goes" and path.name == "step-000005" and path.parent == tmp_path:
            (Path(target) / "manifest.json").unlink()
            raise KeyboardInterrupt

    rename = Path.rename
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dies)
        patched.setattr(shutil, "rmtree", lambda *path, **options: None)  # who is killed cleans up nothing
        with pytest.raises(KeyboardInterrupt):
            run(toy, loader, tmp_path)
    assert list(tmp_path.glob(".step-*"))
    (tmp_path / ".log.jsonl.abc.jsonl").touch()  # of one that was killed as it began
    done = [path.name for path in sorted(tmp_path.glob("step-*"))]
    whole = ["step-000005", "step-000010", "step-000015"]
    assert done == {"before the rename": whole[:2], "while it goes": whole[1:]}.get(moment, whole)
    assert same(run(toy, loader, tmp_path), run(toy, loader))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["log.jsonl", "step-000020", "step-000024"]


def test_a_full_disk_stops_a_run_and_leaves_the_checkpoints_before(toy, loader, tmp_path, monkeypatch):
    def full(tensors, path, *more):
        if "step-000015" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, *more)

    save_file = checkpoint.save_file
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space left") as told:
            run(toy, loader, tmp_path)
    assert told.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "step-000005", "step-000010"]
    assert same(run(toy, loader, tmp_path), run(toy, loader))


def test_a_disk_that_is_full_for_safetensors_is_named_with_the_remedy(tmp_path, monkeypatch):
    """Its error is none of the operating system's."""

    def full(tensors, path):
        raise checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    now = checkpoint.Checkpoint(5, (0, 5), {}, None, {}, {})
    with pytest.raises(OSError, match=r"cannot write .*step-000005: .*No space left .*Make room, and run again"):
        checkpoint.save(tmp_path, now, {}, keep=2)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_share_memory_are_kept_each_by_itself(tmp_path):
    """A network may hold views of one table as its buffers."""
    table = torch.arange(12.0)
    tensors = {"model.buffer.sin": table[:6], "model.buffer.cos": table[6:], "model.buffer.all": table}
    folder = checkpoint.save(tmp_path, checkpoint.Checkpoint(5, (0, 5), {}, None, tensors, {}), {}, keep=2)
    torch.testing.assert_close(checkpoint.tensors(folder), tensors, rtol=0, atol=0)


def test_another_number_of_threads_is_noted_where_a_run_goes_on(toy, loader, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(toy, loader, tmp_path, at=7)
    torch.set_num_threads(2)
    with pytest.warns(UserWarning, match=r'step-000005 was made elsewhere: threads was "1", now "2"\. The run goes on'):
        run(toy, loader, tmp_path)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(toy, loader, tmp_path)  # nothing is left to do


def test_every_step_draws_anew_and_the_same_after_a_stop(toy, loader, tmp_path):
    class Watched(distill.Diffusion):
        def loss(self, role, batch, step):
            drawn[step] = (torch.rand(2).tolist(), batch["x0"][0].tolist())
            return super().loss(role, batch, step)

        def after(self, step):
            told.append(step)
            if step == stop:
                raise KeyboardInterrupt

    drawn, told, stop = {}, [], -1
    distill.train(Watched(toy()), loader, steps=20)
    whole = dict(drawn)
    assert len({str(value) for value, _ in whole.values()}) == len({str(x0) for _, x0 in whole.values()}) == 20
    stop = 11
    with pytest.raises(KeyboardInterrupt):
        distill.train(Watched(toy()), loader, steps=20, out=tmp_path, save_every=10)
    stop = -1
    drawn.clear()
    told.clear()
    distill.train(Watched(toy()), loader, steps=20, out=tmp_path, save_every=10)
    assert told == list(range(10, 20))
    assert drawn == {step: whole[step] for step in range(10, 20)}


def test_gradients_are_clipped_to_their_norm(toy, loader):
    class Watched(distill.Diffusion):
        def after(self, step):
            grads = [value.grad for value in self.model.network.parameters()]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))

    norms = []
    for clip in (1e-3, math.inf):
        distill.train(Watched(toy()), loader, steps=2, clip=clip)
    assert norms[:2] == pytest.approx([1e-3] * 2, rel=1e-3)
    assert min(norms[2:]) > 1e-2


def test_buffers_go_on_where_they_were(toy, loader, tmp_path):
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = torch.nn.BatchNorm1d(2), toy().network

        def forward(self, x, t, class_labels):
            return self.inner(self.norm(x), t, class_labels)

    def train(at, out=None):
        method = Stopping(fs.Denoiser(Normed(), fs.VP.scaled_linear(), "v"))
        object.__setattr__(method, "at", at)
        return distill.train(method, loader, steps=12, out=out, save_every=5)

    with pytest.raises(KeyboardInterrupt):
        train(7, tmp_path)
    one, other = train(0, tmp_path), train(0)
    assert same(one, other)
    assert int(one.network.norm.num_batches_tracked) == 12
    torch.testing.assert_close(one.network.state_dict(), other.network.state_dict(), rtol=0, atol=0)


def test_a_teacher_is_asked_in_eval_mode_and_stays_as_it_was(toy, loader, weights):
    class Watched(distill.Conversion):
        def loss(self, role, batch, step):
            modes.append((self.student.network.training, self.teacher.network.training))
            return super().loss(role, batch, step)

    modes, student, teacher = [], toy(), toy(seed=1, dropout=0.5)
    teacher.network.train()
    before = weights(teacher)
    distill.train(Watched(student, teacher), loader, steps=2)
    assert modes == [(True, False)] * 2
    torch.testing.assert_close(weights(teacher), before, rtol=0, atol=0)


def test_every_run_has_the_precision_it_asks_for(toy, loader):
    from accelerate import Accelerator

    class Watched(distill.Diffusion):
        def loss(self, role, batch, step):
            hook = self.model.network.layers[0].register_forward_hook(lambda *given: seen.append(given[-1].dtype))
            loss = super().loss(role, batch, step)
            hook.remove()
            assert loss.dtype == torch.float32
            return loss

    seen, own = [], Accelerator(mixed_precision="no")
    for precision in ("bf16", None, "no", "bf16"):
        model = distill.train(Watched(toy()), loader, steps=1, precision=precision)
        assert {value.dtype for value in model.network.parameters()} == {torch.float32}
    assert seen == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    assert own.mixed_precision == "no"


def test_a_run_in_half_precision_goes_on_to_the_same_weights(toy, loader, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(toy, loader, tmp_path, at=7, precision="bf16")
    assert same(run(toy, loader, tmp_path, precision="bf16"), run(toy, loader, precision="bf16"))
    with pytest.raises(ValueError, match=r'training\.precision was "bf16", now "no"'):
        run(toy, loader, tmp_path)


def test_a_finished_run_returns_its_average_without_work(toy, loader, tmp_path):
    first = run(toy, loader, tmp_path)
    begin = (tmp_path / "log.jsonl").read_text()
    assert same(first, run(toy, loader, tmp_path))
    assert (tmp_path / "log.jsonl").read_text() == begin


@pytest.mark.parametrize("ema", [0.3, 0.99])  # reached at the fourth step, or not at all
def test_the_average_is_the_mean_that_its_decays_say(ema, toy, loader, weights):
    seen = []

    class Watched(distill.Diffusion):
        def after(self, step):
            seen.append(weights(self.model))

    model = toy()
    average = weights(model)
    distill.train(Watched(model), loader, steps=6, ema=ema)
    for step, now in enumerate(seen):
        decay = min(ema, (1 + step) / (10 + step))
        average = {key: decay * average[key] + (1 - decay) * now[key] for key in now}
    torch.testing.assert_close(weights(model), average)  # the moving average in float32, the other way round
    assert not model.network.training


def test_the_rate_warms_up_and_falls(toy, loader, tmp_path):
    run(toy, loader, tmp_path, steps=20, lr=1e-3, warmup=4, log_every=1, schedule="linear")
    rates = [json.loads(line)["lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rates[:5] == pytest.approx([1e-3 * min(1, (k + 1) / 4) * (1 - k / 20) for k in range(5)])
    assert rates[-1] == pytest.approx(1e-3 / 20)


def test_the_log_has_means_and_drops_what_is_done_again(tmp_path):
    def means():
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]["model"]) for line in lines]

    with Log(tmp_path, 0, 2) as log:
        for step, loss in enumerate([1.0, 3.0, 5.0, 9.0]):
            log.add(step, {"model": loss}, 0.1)
    assert means() == [(2, 2.0), (4, 7.0)]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # by a run that was killed
    with Log(tmp_path, 4, 2):
        assert means() == [(2, 2.0), (4, 7.0)]
    with Log(tmp_path, 2, 2):
        assert means() == [(2, 2.0)]


class Pair(distill.Method):
    """Two roles; the critic learns at every step, the student at every third."""

    def __init__(self, student, critic):
        self.student, self.critic, self.seen = student, critic, []

    @property
    def roles(self):
        return {"student": self.student, "critic": self.critic}

    def turns(self, step):
        return ["critic", "student"] if step % 3 == 2 else ["critic"]

    def loss(self, role, batch, step):
        self.seen.append((step, role))
        node = fs.node(self.student.schedule, 500.0)
        output = self.roles[role].output(batch["x0"], node)
        other = self.roles["critic"].output(output, node)  # its gradient to the critic is not the critic's loss
        return (other if role == "student" else output).square().mean()


def test_roles_take_turns_and_do_not_touch_each_other(toy, ring, weights, tmp_path):
    loader = distill.Batches(ring[0], size=64)
    method = Pair(toy(seed=1), toy(seed=2))
    before = weights(method.student)
    assert distill.train(method, loader, steps=2, ema=0.0) is method.student
    torch.testing.assert_close(weights(method.student), before, rtol=0, atol=0)
    assert method.seen == [(0, "critic"), (1, "critic")]
    whole = distill.train(Pair(toy(seed=1), toy(seed=2)), loader, steps=9)
    stopped = Pair(toy(seed=1), toy(seed=2))
    stopped.after = lambda step: 1 / 0 if step == 6 else None
    with pytest.raises(ZeroDivisionError):
        distill.train(stopped, loader, steps=9, out=tmp_path, save_every=4)
    assert same(distill.train(Pair(toy(seed=3), toy(seed=4)), loader, steps=9, out=tmp_path, save_every=4), whole)


def test_a_checkpoint_holds_no_pickle_and_only_the_last_are_kept(toy, loader, tmp_path):
    run(toy, loader, tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "step-000020", "step-000024"]
    folder = tmp_path / "step-000024"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "state.safetensors"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["version"] == 2
    assert manifest["configuration"]["method"]["name"] == "Diffusion"
    assert str(tmp_path) not in json.dumps(manifest)


def test_a_checkpoint_may_be_read_by_whom_the_umask_lets(toy, loader, tmp_path):
    before = os.umask(0o077)
    try:
        run(toy, loader, tmp_path / "mine")
        os.umask(0o022)
        run(toy, loader, tmp_path / "ours")
    finally:
        os.umask(before)
    modes = {
        name: {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / name).rglob("*")} for name in ("mine", "ours")
    }
    assert modes == {"mine": {0o700, 0o600}, "ours": {0o755, 0o644}}


def test_infinite_settings_are_written_as_json_has_them_and_go_on(toy, loader, tmp_path):
    def convert():
        method = distill.Conversion(toy(seed=2), toy(seed=1), limit=math.inf)
        return distill.train(method, loader, steps=2, out=tmp_path, clip=math.inf)

    first = convert()
    text = (tmp_path / "step-000002" / "manifest.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert same(convert(), first)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lr": 1e-3}, r"training\.lr\.model was 0\.0005, now 0\.001"),
        ({"seed": 3}, r"training\.seed was 0, now 3"),
        ({"steps": 25}, r"steps was 24, now 25"),
        ({"ema": 0.9, "clip": math.inf}, r'ema was \[0\.995\], now \[0\.9\]; training\.clip was 1\.0, now "inf"'),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_by_name(change, says, toy, loader, tmp_path):
    run(toy, loader, tmp_path)
    with pytest.raises(ValueError, match=says):
        run(toy, loader, tmp_path, **change)


def test_a_checkpoint_of_another_method_or_network_or_batch_is_refused(toy, loader, ring, tmp_path):
    run(toy, loader, tmp_path)
    with pytest.raises(ValueError, match=r'method\.name was "Diffusion", now "Conversion"'):
        distill.train(distill.Conversion(toy(), toy(seed=1)), loader, steps=24, out=tmp_path)
    with pytest.raises(ValueError, match=r"parameters\.layers\.0\.weight was \[64, 26\], now \[32, 26\]"):
        distill.train(distill.Diffusion(toy(width=32)), loader, steps=24, out=tmp_path)
    buffered = distill.Diffusion(toy())
    buffered.model.network.register_buffer("shift", torch.zeros(3))
    with pytest.raises(ValueError, match=r'buffers\.shift was "absent", now \[3\]'):
        distill.train(buffered, loader, steps=24, out=tmp_path)
    with pytest.raises(ValueError, match=r"batch\.x0 was \[64, 2\], now \[16, 2\]"):
        run(toy, distill.Batches(ring[0], {"class_labels": ring[1]}, size=16), tmp_path)


def test_a_checkpoint_of_another_teacher_is_refused(toy, loader, tmp_path):
    distill.train(distill.Conversion(toy(), toy(seed=1)), loader, steps=2, out=tmp_path)
    with pytest.raises(ValueError, match=r'frozen\.0 was "Toy \w+", now "Toy \w+"'):
        distill.train(distill.Conversion(toy(), toy(seed=2)), loader, steps=2, out=tmp_path)


def test_weights_that_are_not_trained_must_be_those_of_the_run(toy, loader, weights, tmp_path):
    def partly(seed):
        model = toy(seed=seed)
        model.network.embedding.requires_grad_(False)
        return distill.Diffusion(model)

    first = distill.train(partly(1), loader, steps=2, out=tmp_path)
    torch.testing.assert_close(first.network.embedding.weight, toy(seed=1).network.embedding.weight, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r'frozen\.model was "Toy \w+", now "Toy \w+"'):
        distill.train(partly(2), loader, steps=2, out=tmp_path)


def test_a_damaged_checkpoint_is_refused_and_says_what_to_do(toy, loader, tmp_path):
    run(toy, loader, tmp_path)
    state = tmp_path / "step-000024" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"is damaged .*SHA-256 of state\.safetensors is not.*remove that folder"):
        run(toy, loader, tmp_path)
    manifest = tmp_path / "step-000024" / "manifest.json"
    whole = manifest.read_text()
    for text in ("{", "[]", whole.replace('"scaler"', '"scale"'), whole.replace('"place": [', '"place": [1,')):
        manifest.write_text(text)
        with pytest.raises(ValueError, match=r"step-000024 is damaged"):
            run(toy, loader, tmp_path)
    manifest.write_text(whole.replace('"version": 2', '"version": 3'))
    with pytest.raises(ValueError, match=r"fastsample\.checkpoint of version 3; expected fastsample\.checkpoint 2"):
        run(toy, loader, tmp_path)
    shutil.rmtree(manifest.parent)  # the remedy that it names
    assert same(run(toy, loader, tmp_path), run(toy, loader))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_teacher_or_student_of_broken_weights_is_refused_before_work_starts(bad, toy, loader, tmp_path):
    for k in range(2):
        models = [toy(), toy(seed=1)]
        with torch.no_grad():
            models[k].network.layers[3].bias[5] = bad
        with pytest.raises(ValueError, match=r"layers\.3\.bias of Toy holds NaN or infinity before training"):
            distill.train(distill.Conversion(*models), loader, steps=2, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_resume_false_does_not_overwrite_a_run(toy, loader, tmp_path):
    run(toy, loader, tmp_path)
    with pytest.raises(FileExistsError, match="step-000024 of an earlier run"):
        run(toy, loader, tmp_path, resume=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(bad, toy, loader, tmp_path):
    class Bursting(distill.Diffusion):
        def loss(self, role, batch, step):
            return super().loss(role, batch, step) * (bad if step == 7 else 1.0)

    with pytest.raises(FloatingPointError, match=rf"role 'model' is {bad} at step 8 of 20.*step-000005"):
        distill.train(Bursting(toy()), loader, steps=20, out=tmp_path, save_every=5)
    assert (tmp_path / "step-000005").is_dir()


def test_a_gradient_that_is_not_finite_stops_the_run(toy, loader):
    class Rooted(distill.Diffusion):
        def loss(self, role, batch, step):
            return (0 * super().loss(role, batch, step)).sqrt()

    with pytest.raises(FloatingPointError, match="gradient of role 'model' is nan at step 1"):
        distill.train(Rooted(toy()), loader, steps=3)


def test_wrong_data_are_refused_before_work_starts(toy, ring, tmp_path):
    method, points = distill.Diffusion(toy()), ring[0]
    with pytest.raises(ValueError, match="gives no batch"):
        distill.train(method, [], steps=3)
    with pytest.raises(ValueError, match=r"lie in \[-1, 1\], .* in \[0, 255\]; scale it: x / 127.5 - 1"):
        distill.train(method, [{"x0": torch.tensor([[0.0, 255.0]])}], steps=3)
    with pytest.raises(ValueError, match=r"lies in \[-3, 2\]; scale it: x / 3$"):
        distill.train(method, [{"x0": torch.tensor([[-3.0, 2.0]])}], steps=3)
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        distill.train(method, [{"x0": torch.tensor([[math.nan, 0.0]])}], steps=3)
    with pytest.raises(TypeError, match=r"gives \{'pixels': 'Tensor'\}, not a dictionary of tensors"):
        distill.train(method, [{"pixels": points}], steps=3)
    with pytest.raises(TypeError, match=r"gives \{'x0': 'Tensor', 'class_labels': 'list'\}, not"):
        distill.train(method, [{"x0": points[:2], "class_labels": [0, 1]}], steps=3)
    with pytest.raises(ValueError, match="size of a batch must be at least 1, got 0"):
        distill.Batches(points, size=0)
    with pytest.raises(TypeError, match="gives list, not a dictionary"):
        distill.train(method, [[points, points]], steps=3)
    with pytest.raises(TypeError, match="iterated once only"):
        distill.train(method, iter([{"x0": points}]), steps=3)
    with pytest.raises(TypeError, match="must be float32"):
        distill.train(method, [{"x0": points.half()}], steps=3)
    with pytest.raises(ValueError, match="9 rows for 10 images"):
        distill.Batches(points[:10], {"class_labels": ring[1][:9]})


def test_wrong_arguments_are_refused_before_work_starts(toy, loader, tmp_path):
    method = distill.Diffusion(toy())
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        distill.train(method, loader, steps=0)
    with pytest.raises(ValueError, match="ema = 1"):
        distill.train(method, loader, steps=1, ema=1.0)
    with pytest.raises(ValueError, match="warmup must be at least 0, got -1"):
        distill.train(method, loader, steps=1, warmup=-1)
    with pytest.raises(ValueError, match=r"updates is a share above 0.*got 0"):
        distill.distill_digits(toy(), tmp_path, updates=0)
    with pytest.raises(TypeError, match="of type function; only a torch"):
        distill.train(distill.Diffusion(fs.Denoiser(lambda x, t: x, fs.VP.linear())), loader, steps=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write into"):
        distill.train(method, loader, steps=1, out=tmp_path / "file" / "run")
    frozen = toy()
    frozen.network.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that needs a gradient"):
        distill.train(distill.Diffusion(frozen), loader, steps=1)


def test_without_accelerate_the_error_says_what_to_install(toy, loader, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'fastsample\[train\]'"):
        distill.train(distill.Diffusion(toy()), loader, steps=1)


def test_a_forced_bar_is_shown_with_the_loss(toy, loader, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(toy, loader, progress=True)
    assert "training" in capsys.readouterr().err
