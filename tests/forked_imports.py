"""What processes of a run import, imported once; see `tests.forked`."""

import torch

from lora_scripts import collector

with collector.importing():
    import torch.distributed.tensor  # noqa: F401

    from lora_scripts import memory, pipeline, telling  # noqa: F401
    from lora_scripts.export import card, image, text  # noqa: F401
    from lora_scripts.models import causal_lm, sd, sdxl, sharding  # noqa: F401
    from lora_scripts.tasks import diffusion, language  # noqa: F401
    from lora_scripts.training import loop  # noqa: F401

torch.set_num_threads(1)
