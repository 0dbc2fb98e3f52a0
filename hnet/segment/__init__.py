"""Looking at learned chunks."""

from .render import boundaries, render_plain, render_rich

__all__ = ["boundaries", "render_plain", "render_rich"]
