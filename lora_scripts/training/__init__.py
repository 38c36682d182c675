"""The only training loop, and what it needs: optimizers, evaluation, checkpoints, logs."""
