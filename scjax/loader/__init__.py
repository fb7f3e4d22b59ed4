"""From a corpus or an AnnData to batches of cells, on the host."""

from scjax.loader.anndata import cells
from scjax.loader.loader import Loader
from scjax.loader.order import Order

__all__ = ["Loader", "Order", "cells"]
