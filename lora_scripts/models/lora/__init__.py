"""LoRA by peft: layers on modules (`layers.py`), and PEFT's directories (`peft_folder.py`).

The only package that imports peft.
"""

from lora_scripts.models.lora.layers import (
    ADAPTER,
    AdaptedLayer,
    Kind,
    attach,
    describe,
    initialise,
    kind_of,
    layers,
    merge_into,
    names_on,
    put,
    remove,
    round_to,
    set_strengths,
    share,
    trainable,
)
from lora_scripts.models.lora.peft_folder import (
    PREFIX,
    merge,
    name_base,
    patterned,
    peft_tensors,
    read_peft,
    same,
    with_adapters,
    write_peft,
    write_peft_config,
)

__all__ = [
    "ADAPTER",
    "PREFIX",
    "AdaptedLayer",
    "Kind",
    "attach",
    "describe",
    "initialise",
    "kind_of",
    "layers",
    "merge",
    "merge_into",
    "name_base",
    "names_on",
    "patterned",
    "peft_tensors",
    "put",
    "read_peft",
    "remove",
    "round_to",
    "same",
    "set_strengths",
    "share",
    "trainable",
    "with_adapters",
    "write_peft",
    "write_peft_config",
]
