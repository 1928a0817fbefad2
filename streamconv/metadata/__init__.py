"""The keys of a GGUF file that come from the model card and the tokenizer."""
