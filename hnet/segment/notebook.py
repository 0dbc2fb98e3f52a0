"""`hnet.segment.show`: chunks in a notebook."""

from __future__ import annotations

import html
import io
from dataclasses import dataclass

from hnet.errors import UserError
from hnet.model.causal_lm import HNetForCausalLM

from .boundaries import Segmentation, segment
from .page import write_page
from .render import render_plain


@dataclass(frozen=True)
class Shown:
    """A notebook shows the page of `hnet segment --format html` in a frame of its own; elsewhere: bars."""

    segmentation: Segmentation
    title: str = "Chunks"
    height: int = 480

    @property
    def page(self) -> str:
        """The whole page."""
        out = io.StringIO()
        write_page(out, [self.segmentation], title=self.title, stages=len(self.segmentation.stages))
        return out.getvalue()

    def _repr_html_(self) -> str:
        return (
            f'<iframe sandbox="allow-scripts" title="{html.escape(self.title)}" srcdoc="{html.escape(self.page)}" '
            f'style="width: 100%; height: {self.height}px; border: 1px solid #8884; border-radius: 6px"></iframe>'
        )

    def __repr__(self) -> str:
        return render_plain(self.segmentation)


def show(model: HNetForCausalLM, text: str | bytes, *, title: str = "Chunks", height: int = 480) -> Shown:
    """The chunks `model` makes of `text`, to be looked at. height: of the frame in a notebook, pixels.

    Raises:
        UserError: the model has no stage that begins chunks.
    """
    found = segment(model, text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text)
    if not found.stages:
        raise UserError("the model makes no chunks: its architecture has one stage")
    return Shown(found, title, height)
