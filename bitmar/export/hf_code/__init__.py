"""Code that exported Hugging Face directories hold: it knows torch, numpy and transformers, and not this project."""
