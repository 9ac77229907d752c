"""What `accelerate launch` starts with two processes that begin apart: python apart.py OUT.

Each has other first weights, of the network, its helper and what is kept; after training they must be one again. Then
two runs that cannot go well: a weight that no loss uses, and another seed in each process.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Toy

import fastsample as fs
from fastsample import distill

torch.set_num_threads(1)


class Headed(distill.Diffusion):
    helpers = property(lambda self: {"model": self.head})
    kept = property(lambda self: {"past": self.past})

    def loss(self, role, batch, step):
        return super().loss(role, batch, step) + self.head(batch["x0"]).square().mean()

    def settings(self):
        return {}


def method(rank, used=True):
    model = fs.Denoiser(Toy(seed=rank), fs.VP.scaled_linear(), "v")
    model.network.layers.append(nn.BatchNorm1d(2))
    if not used:
        model.network.unused = nn.Linear(1, 1)
    found = Headed(model)
    torch.manual_seed(rank)
    object.__setattr__(found, "head", nn.Linear(2, 1))
    object.__setattr__(found, "past", nn.Linear(2, 1))
    return found


def main(out):
    rank = int(os.environ["RANK"])
    points = torch.linspace(-1, 1, 64).view(32, 2)
    batches = distill.Batches(points, size=16)
    first = method(rank)
    distill.train(first, batches, steps=3, accumulate=2)
    modules = {"network": first.model.network, "head": first.head, "past": first.past}
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    save_file(tensors, out / f"apart-{rank}.safetensors")
    try:
        distill.train(method(rank, used=False), batches, steps=3)
    except ValueError as error:
        (out / f"unused-{rank}.txt").write_text(str(error))
    distill.train(method(rank), batches, steps=3, seed=rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
