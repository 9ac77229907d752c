"""Wrap a plain PyTorch network: here one that predicts v with a time in [0, 1], guided by class labels."""

import torch
from torch import nn

import fastsample as fs
from fastsample import solvers


class Network(nn.Module):
    """Any module works that takes (x, t, **condition) and returns a tensor like x."""

    def __init__(self, classes: int):
        super().__init__()
        self.embed = nn.Embedding(classes + 1, 16)  # one more than the classes: the label that means "none"
        self.body = nn.Sequential(nn.Linear(2 + 1 + 16, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.body(torch.cat([x, t[:, None], self.embed(label)], dim=1))


def main(count: int = 8, steps: int = 6) -> torch.Tensor:
    torch.manual_seed(0)
    model = fs.Denoiser(Network(classes=3), fs.VPContinuous(), predicts="v", time="unit")
    labels = torch.arange(count) % 3
    guided = fs.Guided(model, cond={"label": labels}, uncond={"label": torch.full_like(labels, 3)}, scale=2.0)
    plan = fs.trace(solvers.unipc_3, fs.grid(model.schedule, steps, spacing=fs.quadratic_t))
    print(plan)
    points = fs.sample(guided, plan, fs.noise((2,), seeds=range(count)))
    print(f"{model.count.calls} calls of the network, {model.count.rows} rows: guidance doubles them")
    return points


if __name__ == "__main__":
    main()
