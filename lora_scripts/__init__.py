"""lora-scripts: one YAML file describes a LoRA, one command makes it."""

__version__ = "0.1.0"
