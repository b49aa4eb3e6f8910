"""Wide residual networks (Zagoruyko & Komodakis 2016): a residual network of few and wide layers, for small images."""

from __future__ import annotations

from torch import Tensor, nn

_WIDTHS = (16, 32, 64)  # of the three groups, before they are widened


class Block(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), both convolutions 3×3: norm and activation come first.

    Where the size or width changes, a 1×1 convolution of relu(norm(x)) takes the place of x.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        changes = stride != 1 or channels != width
        self.shortcut = nn.Conv2d(channels, width, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, width, H / stride, W / stride)."""
        activated = self.relu1(self.bn1(x))
        residual = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


def wide_resnet(channels: int, classes: int, *, depth: int, widening: int) -> nn.Sequential:
    """WRN-depth-widening, without dropout.

    Args:
        channels: of the images.
        classes: the number of logits.
        depth: the number of convolutions, 6 n + 4: the first, n blocks in each of three groups, and three shortcuts.
        widening: what the widths 16, 32, 64 of the groups are multiplied by.
    """
    blocks: list[nn.Module] = []
    narrow = _WIDTHS[0]
    for group, base in enumerate(_WIDTHS):
        for position in range((depth - 4) // 6):
            stride = 2 if group > 0 and position == 0 else 1
            blocks.append(Block(narrow, widening * base, stride))
            narrow = widening * base
    stem = nn.Conv2d(channels, _WIDTHS[0], 3, padding=1, bias=False)
    head = (nn.BatchNorm2d(narrow), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(narrow, classes))
    model = nn.Sequential(stem, *blocks, *head)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(head[-1].bias)
    return model
