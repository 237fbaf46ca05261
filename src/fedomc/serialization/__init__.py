"""Compressed variables and models as bytes: frames, entropy coding, model files, checkpoints of a run."""
