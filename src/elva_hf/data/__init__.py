"""Data: the procedural toy world, its tokenizer and its hand-made teacher."""
