"""``fuse``: batch norm, the addition and the ReLU that follow it, as single operations."""

from .fusion import FusionReport, LayerReport, fuse, fusion_report

__all__ = ["FusionReport", "LayerReport", "fuse", "fusion_report"]
