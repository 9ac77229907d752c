"""Run folders written by hand, so that what a report must say of them is known."""

from dataclasses import replace

import torch

from fastsample.bench.latency import Ratio, Times, Timing
from fastsample.bench.measure import Score
from fastsample.bench.record import Record, write_record, write_run, write_samples

ENVIRONMENT = {"date": "2026-01-02T03:04:05+00:00", "cpu": "Some CPU", "threads": "1", "torch": "2.13.0"}
CONFIGURATION = {"shape": [1, 8, 8], "n": 500, "batch": 100, "latency": {"rounds": 3}, "converged": {}, "keep": 16}


def blank(**changes):
    given = {"key": "k", "name": "m/s/4", "model": "m", "solver": "s", "steps": 4, "spacing": "default"}
    return Record(**{**given, "options": {}, "n": 500, "nfe": 4, **changes})


def timing(ms_per_image, *, batch=4, spread=0.02, **changes):
    """Whose median is that, and whose six times lie within `spread` of it."""
    times = [ms_per_image * batch / 1e3 * (1 + spread * (k - 2.5) / 2.5) for k in range(6)]
    return Timing(batch, Times(tuple(times)), first_s=0.5, memory={"rss": 100 * 2**20}, **changes)


def case(model, solver, steps, *, ms, fd, se=0.05, recall=0.5, rms=None, **changes):
    key = f"{model}-{solver}-{steps}".encode().hex()[:40]
    scores = {"fd_digits": Score(fd + 0.1, se, fd, 500), "recall": Score(recall, 0.01, None, 500, "more")}
    scores |= {} if rms is None else {"endpoint_rms": Score(rms)}
    given = {"key": key, "name": f"{model}/{solver}/{steps}", "model": model, "solver": solver, "steps": steps}
    given |= {"nfe": steps, "calls": steps, "rows": float(steps), "quality": key, "samples": 16}
    given |= {"scores": scores, "timing": timing(ms)}
    return blank(**{**given, **changes})


def floor(value=0.2):
    scores = {"fd_digits": Score(value, 0.02, None, 250), "recall": Score(0.98, 0.01, None, 250, "more")}
    return blank(
        key="floor", name="floor", model="", solver="", steps=0, spacing="", kind="floor", nfe=None, scores=scores
    )


def failed(record, error, traceback="Traceback (most recent call last):\n  it broke"):
    return replace(record, scores={}, timing=None, nfe=None, samples=0, error=error, traceback=traceback)


def two_models():
    """A floor and 12 cases of 2 models and 2 solvers, of which one failed; the student's are the faster.

    One more, student/ddim/8, is so unsure in both numbers that nothing beats it beyond its intervals.
    """
    records = [floor()]
    for model, slow, bias in (("teacher", 1.0, 0.3), ("student", 0.4, 0.5)):
        for solver, order in (("ddim", 1), ("heun", 2)):
            for steps in (2, 4, 8):
                error = 4 / steps**order
                records.append(
                    case(model, solver, steps, ms=slow * steps, fd=bias + error, recall=0.9 - error / 8, rms=error / 2)
                )
    records[1] = failed(records[1], "teacher/ddim/2: ValueError: 3 of 500 samples hold NaN")
    unsure = replace(records[9].scores["fd_digits"], se=0.4)
    records[9] = replace(records[9], timing=timing(3.2, spread=0.6), scores=records[9].scores | {"fd_digits": unsure})
    ratio = Ratio(0.4, 0.39, 0.41, (0.4,))
    records[7] = replace(records[7], timing=timing(0.8, ratio=ratio, baseline="teacher/ddim/2"))
    return records


def write(folder, records, *, environments=(ENVIRONMENT,), finished=True, shape=(8, 8), channels=1, **configuration):
    """As `run` writes it, with random samples."""
    generator = torch.Generator().manual_seed(0)
    for record in records:
        write_record(folder, record)
        if record.samples:
            samples = torch.rand(record.samples, channels, *shape, generator=generator) * 2 - 1
            write_samples(folder, record.quality, samples)
    body = {"cases": [record.key for record in records], "configuration": CONFIGURATION | configuration}
    body |= {"hash": "0123abcd", "environments": list(environments), "finished": finished}
    write_run(folder, body)
    return folder
