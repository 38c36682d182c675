"""What a LoRA file says of the pictures that it was made from, under the names of kohya's scripts.

WebUI shows some of these: the resolution, the folders, the buckets, the tags.
"""

from __future__ import annotations

import json
import os
from collections import Counter

from lora_scripts.data.pictures import Picture, Pictures
from lora_scripts.data.views import PictureSet
from lora_scripts.schema import ImageConfig


def describe(config: ImageConfig, pictures: PictureSet) -> dict[str, str]:
    """Header fields, all of them texts."""
    side = config.resolution
    return {
        "ss_sd_model_name": config.base_model,
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": str(len(pictures)),
        "ss_num_reg_images": str(len(pictures.regularisation)),
        "ss_dataset_dirs": json.dumps(_folders(pictures)),
        "ss_bucket_info": json.dumps({"buckets": _buckets(pictures)}),
        "ss_tag_frequency": json.dumps(_tags(pictures.pictures), ensure_ascii=False),
        "ss_prior_loss_weight": str(config.prior_loss_weight),
        "ss_clip_skip": str(config.clip_skip),
        "ss_max_token_length": str(config.max_caption_tokens),
        "ss_noise_offset": str(config.noise_offset),
        "ss_shuffle_caption": str(config.shuffle_tags),
        "ss_keep_tokens": str(config.keep_tokens),
        "ss_caption_tag_dropout_rate": str(config.tag_dropout),
        "ss_caption_dropout_rate": str(config.caption_dropout),
        "ss_random_crop": str(config.random_crop),
        "ss_flip_aug": str(config.random_flip),
    }


def _folder(picture: Picture) -> str:
    return os.path.basename(os.path.dirname(picture.record.file))


def _folders(pictures: PictureSet) -> dict[str, dict[str, int]]:
    """Each folder's pictures, and how often an epoch shows them (a whole number to WebUI)."""
    counts = Counter(map(_folder, pictures.pictures))
    weights = {_folder(picture): picture.weight for picture in pictures.pictures}
    return {
        name: {"n_repeats": max(1, round(weights[name])), "img_count": count}
        for name, count in counts.items()
    }


def _buckets(pictures: PictureSet) -> dict[str, dict[str, object]]:
    views = Counter(pictures.at(view).bucket for view in range(len(pictures)))
    return {
        str(number): {"resolution": list(size), "count": count}
        for number, (size, count) in enumerate(sorted(views.items()))
    }


def _tags(pictures: Pictures) -> dict[str, dict[str, int]]:
    """How often each tag stands in the captions of a folder."""
    tags: dict[str, Counter[str]] = {}
    for picture in pictures:
        of_folder = tags.setdefault(_folder(picture), Counter())
        for caption in picture.captions:
            of_folder.update(tag.strip() for tag in caption.split(",") if tag.strip())
    return {folder: dict(counts) for folder, counts in tags.items()}
