"""The weighted loss in the host's trainer, and further losses that it may read."""
