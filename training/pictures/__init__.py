"""Pictures to train on and to measure against: data sets, and the batches made of them."""

from .decoding import Reading, to_8_bits
from .feed import Feed, Order, Share, in_memory
from .files import as_dataset, choose_split, origin, split_names
from .frames import Frame, find_frame, held_out, load_images, to_model
from .sources import Pictures, Stream, load, open_pictures, open_stream

__all__ = [
    "Feed",
    "Frame",
    "Order",
    "Pictures",
    "Reading",
    "Share",
    "Stream",
    "as_dataset",
    "choose_split",
    "find_frame",
    "held_out",
    "in_memory",
    "load",
    "load_images",
    "open_pictures",
    "open_stream",
    "origin",
    "split_names",
    "to_8_bits",
    "to_model",
]
