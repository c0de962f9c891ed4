"""otcclip: train CLIP on image-caption pairs you do not trust."""

__version__ = "0.2.0.dev12"
