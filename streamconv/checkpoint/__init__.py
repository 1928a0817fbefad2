"""A Hugging Face folder: safetensors shards and their headers, index, config.json."""
