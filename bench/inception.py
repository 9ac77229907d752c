"""InceptionV3 as it was published for TensorFlow 1 in December 2015, which the FID and the Inception Score are made of.

Szegedy et al. 2015, arXiv:1512.00567, whose figures are named here; the names of the layers are those of the file of
weights. It differs from the InceptionV3 of torchvision in its averages, which leave the padding out, in the last pool,
which takes the greatest, and in 1008 classes in place of 1000: an FID of the other network is another number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kernel = int | tuple[int, int]


def load_inception(path: Path) -> Inception:
    """The network with the weights of a checked file."""
    with torch.device("meta"):  # nothing is drawn, so the global random state stays as it is
        network = Inception()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    return network.eval().requires_grad_(False)


class Inception(nn.Module):
    """Images [B, 3, 299, 299] in [-1, 1) -> features [B, 2048]; `logits` takes those to the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = block_a(192, pooled=32)
        self.Mixed_5c = block_a(256, pooled=64)
        self.Mixed_5d = block_a(288, pooled=64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(768, inner=128)
        self.Mixed_6c = block_c(768, inner=160)
        self.Mixed_6d = block_c(768, inner=160)
        self.Mixed_6e = block_c(768, inner=192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280, average)
        self.Mixed_7c = block_e(2048, greatest)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halved(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halved(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))

    def logits(self, features: Tensor, *, bias: bool = True) -> Tensor:
        """Features [B, 2048] -> [B, 1008]; so both come of one pass. The Inception Score takes bias=False."""
        return F.linear(features, self.fc.weight, self.fc.bias if bias else None)


class Conv(nn.Module):
    """A convolution without bias, batch normalisation, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Kernel, *, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu_()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Row:
    """One convolution of a block: its name in the file of weights, and the row that it reads.

    source: "" for the input of the block, "pool" for what its pool makes of that.
    With stride 1 it keeps height and width; with stride 2 there is no padding.
    """

    name: str
    source: str
    out: int
    kernel: Kernel
    stride: int = 1

    def conv(self, channels: int) -> Conv:
        height, width = (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel
        padding = (height // 2, width // 2) if self.stride == 1 else 0
        return Conv(channels, self.out, (height, width), stride=self.stride, padding=padding)


class Mixed(nn.Module):
    """A block: what no row reads is its output, the channels joined in the order of the rows, the pool's last."""

    def __init__(self, channels: int, pool: Callable[[Tensor], Tensor], *rows: Row) -> None:
        super().__init__()
        self.pool, self.rows = pool, rows
        read = {row.source for row in rows}
        self.joined = [name for name in (*(row.name for row in rows), "pool") if name not in read]
        widths = {"": channels, "pool": channels}
        for row in rows:
            self.add_module(row.name, row.conv(widths[row.source]))
            widths[row.name] = row.out

    def forward(self, x: Tensor) -> Tensor:
        made = {"": x, "pool": self.pool(x)}
        for row in self.rows:
            made[row.name] = self.get_submodule(row.name)(made[row.source])
        return torch.cat([made[name] for name in self.joined], 1)


def average(x: Tensor) -> Tensor:
    """Of 3 x 3 pixels, at the border of those that there are."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def greatest(x: Tensor) -> Tensor:
    """Of 3 x 3 pixels: what the last block of the published graph does in place of the average."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halved(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


def block_a(channels: int, *, pooled: int) -> Mixed:
    """35 x 35 pixels: Fig. 5, with one 5 x 5 left as it is."""
    return Mixed(
        channels,
        average,
        Row("branch1x1", "", 64, 1),
        Row("branch5x5_1", "", 48, 1),
        Row("branch5x5_2", "branch5x5_1", 64, 5),
        Row("branch3x3dbl_1", "", 64, 1),
        Row("branch3x3dbl_2", "branch3x3dbl_1", 96, 3),
        Row("branch3x3dbl_3", "branch3x3dbl_2", 96, 3),
        Row("branch_pool", "pool", pooled, 1),
    )


def block_b(channels: int) -> Mixed:
    """From 35 x 35 to 17 x 17 pixels: Fig. 10."""
    return Mixed(
        channels,
        halved,
        Row("branch3x3", "", 384, 3, stride=2),
        Row("branch3x3dbl_1", "", 64, 1),
        Row("branch3x3dbl_2", "branch3x3dbl_1", 96, 3),
        Row("branch3x3dbl_3", "branch3x3dbl_2", 96, 3, stride=2),
    )


def block_c(channels: int, *, inner: int) -> Mixed:
    """17 x 17 pixels: Fig. 6 with n = 7."""
    return Mixed(
        channels,
        average,
        Row("branch1x1", "", 192, 1),
        Row("branch7x7_1", "", inner, 1),
        Row("branch7x7_2", "branch7x7_1", inner, (1, 7)),
        Row("branch7x7_3", "branch7x7_2", 192, (7, 1)),
        Row("branch7x7dbl_1", "", inner, 1),
        Row("branch7x7dbl_2", "branch7x7dbl_1", inner, (7, 1)),
        Row("branch7x7dbl_3", "branch7x7dbl_2", inner, (1, 7)),
        Row("branch7x7dbl_4", "branch7x7dbl_3", inner, (7, 1)),
        Row("branch7x7dbl_5", "branch7x7dbl_4", 192, (1, 7)),
        Row("branch_pool", "pool", 192, 1),
    )


def block_d(channels: int) -> Mixed:
    """From 17 x 17 to 8 x 8 pixels."""
    return Mixed(
        channels,
        halved,
        Row("branch3x3_1", "", 192, 1),
        Row("branch3x3_2", "branch3x3_1", 320, 3, stride=2),
        Row("branch7x7x3_1", "", 192, 1),
        Row("branch7x7x3_2", "branch7x7x3_1", 192, (1, 7)),
        Row("branch7x7x3_3", "branch7x7x3_2", 192, (7, 1)),
        Row("branch7x7x3_4", "branch7x7x3_3", 192, 3, stride=2),
    )


def block_e(channels: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    """8 x 8 pixels: Fig. 7."""
    return Mixed(
        channels,
        pool,
        Row("branch1x1", "", 320, 1),
        Row("branch3x3_1", "", 384, 1),
        Row("branch3x3_2a", "branch3x3_1", 384, (1, 3)),
        Row("branch3x3_2b", "branch3x3_1", 384, (3, 1)),
        Row("branch3x3dbl_1", "", 448, 1),
        Row("branch3x3dbl_2", "branch3x3dbl_1", 384, 3),
        Row("branch3x3dbl_3a", "branch3x3dbl_2", 384, (1, 3)),
        Row("branch3x3dbl_3b", "branch3x3dbl_2", 384, (3, 1)),
        Row("branch_pool", "pool", 192, 1),
    )
