"""Training: losses, recipes and the HF Trainer around them."""
