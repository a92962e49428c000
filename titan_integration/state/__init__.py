"""What a run keeps between steps, and saves."""
