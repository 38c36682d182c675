"""The schema of a run: every key, its type, its bounds, its default and one sentence.

Keys that both kinds of task have stand once, in `CommonConfig`; where a default differs, the task's
class states its own. The command line, the JSON Schema for editors and the docs follow from here.
"""

from __future__ import annotations

from lora_scripts.schema.common import CommonConfig, Dataset
from lora_scripts.schema.fields import Section
from lora_scripts.schema.image import ImageConfig
from lora_scripts.schema.image_parts import ImageDataset, SamplePrompt
from lora_scripts.schema.misfits import misfits_of
from lora_scripts.schema.text import TextConfig
from lora_scripts.schema.text_parts import TextDataset, TextPrompt

Config = ImageConfig | TextConfig
SCHEMAS: dict[str, type[ImageConfig] | type[TextConfig]] = {
    "image-generation": ImageConfig,
    "text-generation": TextConfig,
}

__all__ = [
    "SCHEMAS",
    "CommonConfig",
    "Config",
    "Dataset",
    "ImageConfig",
    "ImageDataset",
    "SamplePrompt",
    "Section",
    "TextConfig",
    "TextDataset",
    "TextPrompt",
    "misfits_of",
]
