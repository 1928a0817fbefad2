"""LoRA adapters: read them (config, files), match them with a base (base, resolve), then either write a GGUF adapter
(fold; ollama for the legacy dialect) or merge them into the base's weights (specs, merge)."""
