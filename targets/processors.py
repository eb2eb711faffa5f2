"""Load a model's processor, also where the part of it that reads videos cannot be had.

Processors of several families bring a video processor, which transformers makes with torchvision
only. redteam shows models pictures, and torchvision is not needed for those, so without it the
processor is put together from its image processor and its tokenizer.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from targets.errors import TargetError


def load_processor(where: str, **common: Any) -> Any:  # noqa: ANN401 - transformers is untyped
    """The processor at a folder or hub id.

    Args:
        where: folder or hub id.
        common: revision, trust_remote_code.

    Raises:
        OSError, ValueError, ImportError: of transformers, if it cannot be loaded.
        TargetError: if what is there is no processor of pictures.
    """
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(where, **common)  # nosec B615
    except (ImportError, ValueError) as error:
        if "torchvision" not in str(error).lower():
            raise
        found = stills_only(where, **common)
    if not hasattr(found, "image_processor"):
        found = stills_only(where, **common)
    return found


def stills_only(where: str, **common: Any) -> Any:  # noqa: ANN401 - transformers is untyped
    """The model's own processor class, without what it needs for videos.

    Raises:
        TargetError: if there is no image processor.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    kind = AutoConfig.from_pretrained(where, **common).model_type  # nosec B615
    name = dict(PROCESSOR_MAPPING_NAMES).get(kind)
    try:
        images = _images(where, **common)
    except (OSError, ValueError) as error:
        raise TargetError(
            f"model {where} has no image processor (preprocessor_config.json or "
            f"processor_config.json): {error}"
        ) from error
    if name is None:
        raise TargetError(f"transformers knows no processor for models of type {kind!r}")
    words = AutoTokenizer.from_pretrained(where, **common)  # nosec B615
    return _assembled(name, images, words, _settings(where, **common))


def _images(where: str, **common: Any) -> Any:  # noqa: ANN401 - transformers is untyped
    """The image processor; its PIL form where the default one needs torchvision."""
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(where, **common)  # nosec B615
    except ImportError:
        files = ("preprocessor_config.json", "processor_config.json")
        found = [_read(where, name, **common) for name in files]
        settings = {**found[1].get("image_processor", {}), **found[0]}
        name = str(settings.get("image_processor_type", ""))
        slow = getattr(transformers, name.removesuffix("Fast").removesuffix("Pil") + "Pil", None)
        if slow is None:
            raise
        return slow.from_pretrained(where, **common)


def _assembled(
    name: str,
    images: Any,  # noqa: ANN401
    words: Any,  # noqa: ANN401
    settings: dict[str, Any],
) -> Any:  # noqa: ANN401
    """A processor of the class `name` without the check for a video processor."""
    import transformers

    base = getattr(transformers, name)

    class StillsOnly(base):  # type: ignore[misc, valid-type]
        """Pictures only."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:  # noqa: ANN401
            """Accept that there is no video processor."""
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    accepted = inspect.signature(base.__init__).parameters
    options = {key: value for key, value in settings.items() if key in accepted}
    options.setdefault("chat_template", getattr(words, "chat_template", None))
    # Some read the sampling of videos from it when they are made.
    video = SimpleNamespace(num_frames=1, fps=1) if "video_processor" in accepted else None
    module = importlib.import_module(base.__module__)
    if getattr(module, "num2words", "") is None:
        # A package for time stamps of video frames, asked for when the class is made.
        with mock.patch.object(module, "num2words", str):
            return StillsOnly(images, words, video, **options)
    return StillsOnly(images, words, video, **options)


def _settings(where: str, **common: str | bool | None) -> dict[str, Any]:
    """Plain values of processor_config.json; {} if there is none."""
    found = _read(where, "processor_config.json", **common)
    return {key: value for key, value in found.items() if isinstance(value, str | int | float)}


def _read(where: str, name: str, **common: str | bool | None) -> dict[str, Any]:
    """A JSON file of the checkpoint; {} if there is none."""
    from transformers.utils import cached_file

    path = cached_file(
        where,
        name,
        revision=common.get("revision"),
        _raise_exceptions_for_missing_entries=False,
    )
    if path is None:
        return {}
    found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return found
