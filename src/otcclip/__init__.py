"""otcclip: train CLIP on image-caption pairs you do not trust."""

__version__ = "0.1.0.dev0"
