"""How tokens are chosen: plain generation now, speculation and early exit as they land."""
