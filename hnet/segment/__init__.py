"""Looking at learned chunks."""

from .boundaries import Segmentation, Stage, segment, segment_file
from .notebook import show
from .render import render_plain, render_rich

__all__ = ["Segmentation", "Stage", "render_plain", "render_rich", "segment", "segment_file", "show"]
