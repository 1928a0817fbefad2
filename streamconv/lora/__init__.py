"""LoRA adapters: read (config, file), met with their base (base_model, resolve), and either written as a GGUF adapter
(fold; ollama for the legacy dialect) or merged into the base's weights (specs, merge)."""
