"""Pictures of what the model does; needs Pillow only."""
