"""What makes a model's inputs of pictures and text: transformers' processors without torchvision.

The stock way to open a processor asks for torchvision, for faster resizing or for videos. Here it
is put together of its parts, each opened in the way that needs Pillow only; so pictures look the
same to a model whether or not torchvision is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_scripts.errors import UserError, user_error
from lora_scripts.models import foreign


def open_processor(cls: Any, path: Path) -> Any:
    """The processor of the class `cls` with the settings of a folder. No network.

    Raises:
        UserError: A file of it is missing or broken, or it needs more than Pillow.
    """
    try:
        parts = [_part(attribute, path) for attribute in cls.get_attributes()]
        settings, _ = cls.get_processor_dict(path, local_files_only=True)
        return _for_pictures(cls).from_args_and_dict(parts, settings)
    except UserError:
        raise
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise user_error(str(path), f"its {cls.__name__} needs another package: {reason}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise user_error(str(path), f"its {cls.__name__} cannot be opened: {error}") from None


def _part(attribute: str, path: Path) -> Any:
    from transformers import AutoImageProcessor, AutoTokenizer

    match attribute:
        case "image_processor":
            with foreign.reading(path, "how its pictures are prepared"):
                return AutoImageProcessor.from_pretrained(
                    path, backend="pil", local_files_only=True
                )
        case "tokenizer":
            with foreign.reading(path, "its tokenizer"):
                return AutoTokenizer.from_pretrained(path, local_files_only=True)
        case "video_processor":
            return None  # opening one needs torchvision, and no video will come
        case _:
            raise ValueError(f"it has a {attribute}, and only pictures and text can be given to it")


def _for_pictures(cls: Any) -> Any:
    """The class, but content without a video processor: its check cannot be switched off."""

    class ForPictures(cls):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            if name != "video_processor":
                return super().check_argument_for_proper_class(name, argument)
            return None

    return ForPictures
