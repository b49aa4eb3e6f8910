"""``fuse``: runs of convolution, batch norm, addition and ReLU as single operations, chains."""

from .fusion import FusionReport, LayerReport, fuse, fusion_report

__all__ = ["FusionReport", "LayerReport", "fuse", "fusion_report"]
