"""What each model computes: one file a family, each forward pass readable from top to bottom."""
