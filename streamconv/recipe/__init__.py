"""The language that architectures/ is written in, and how a recipe is bound to a checkpoint."""
