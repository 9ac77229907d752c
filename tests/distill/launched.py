"""What `accelerate launch` starts: python launched.py OUT METHOD STEPS SAVE_EVERY PRECISE; writes losses and weights.

The batch of an update is 32, however many processes share it, in float64 unless PRECISE is 0.
"""

import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Toy
from methods import METHODS, loader, maker

from fastsample import distill

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="the student predicts eps")


def main(out, name, steps, save_every, precise):
    dtype = torch.float64 if precise else torch.float32
    method = METHODS[name](maker(Toy, dtype))
    batches = loader(name, dtype=dtype)
    options = {"save_every": save_every, "log_every": 1, "ema": (0.9, 0.99), "seed": 5}
    model = distill.train(method, batches, steps=steps, out=out, **options)
    from accelerate import PartialState

    tensors = {key: value.detach().cpu().contiguous() for key, value in model.network.named_parameters()}
    assert not any(hasattr(value, "to_local") for value in tensors.values())
    save_file(tensors, Path(out) / f"weights-{PartialState().process_index}.safetensors")


if __name__ == "__main__":
    out, name, steps, save_every, precise = sys.argv[1:]
    main(out, name, int(steps), int(save_every), precise != "0")
