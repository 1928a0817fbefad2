"""A Hugging Face model folder: config.json, the index, safetensors shards and their headers."""
