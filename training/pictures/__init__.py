"""Pictures to train on and to measure against: data sets, and the batches made of them."""

from .feed import Feed, Order, Share, in_memory
from .files import SPLITS, as_dataset, has_splits, origin
from .frames import Frame, find_frame, held_out, load_images, to_model
from .sources import Pictures, Stream, load, open_pictures, open_stream, to_8_bits

__all__ = [
    "SPLITS",
    "Feed",
    "Frame",
    "Order",
    "Pictures",
    "Share",
    "Stream",
    "as_dataset",
    "find_frame",
    "has_splits",
    "held_out",
    "in_memory",
    "load",
    "load_images",
    "open_pictures",
    "open_stream",
    "origin",
    "to_8_bits",
    "to_model",
]
