"""Hugging Face models behind the pipeline's three protocols: decoding, scoring, learning."""
