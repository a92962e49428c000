"""Text <-> spec: YAML, arrow text, and how specs show elsewhere."""
