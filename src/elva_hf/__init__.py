"""elva-hf: encoder-free video-language models for transformers. `import elva_hf` registers everything."""

__version__ = "0.1.0"
