"""Model training: the optimizer, losses and training step, evaluation, and checkpoints."""
