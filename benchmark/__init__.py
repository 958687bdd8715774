"""Programs that measure the training scripts, and what they measured, in results/."""
