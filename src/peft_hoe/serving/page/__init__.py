"""A page on which a preference is dragged and texts change; `make_page` makes it."""

from .page import make_page

__all__ = ["make_page"]
