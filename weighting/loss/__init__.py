"""Signals and the weighted cross entropy, from logits or straight from hidden states."""
