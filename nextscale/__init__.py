"""Next-scale autoregressive vision models: one core, every system."""

__version__ = "0.1.0"
