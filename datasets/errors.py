"""What can be wrong with a dataset. An error lists all problems of its kind and says what to do."""

from collections.abc import Sequence


class DatasetError(ValueError):
    """Something about a dataset has to be put right by its owner."""


class SourceError(DatasetError):
    """The source does not exist, or is not of one recognisable kind."""


class NoImagesError(SourceError):
    """The source exists and holds no image."""


class EmptyClassError(DatasetError):
    """Class folders without a single image."""


class LabelError(DatasetError):
    """Labels are missing for some samples, or are no class numbers."""


class ShardError(DatasetError):
    """A shard is truncated or otherwise damaged."""


class ImageError(DatasetError):
    """One image cannot be used: damaged, or of a kind that cannot be converted without loss of meaning."""


class UnreadableImagesError(ImageError):
    """So many samples in a row are unreadable that the dataset itself must be in trouble."""


class ImageSizeError(DatasetError):
    """Images are smaller than the crop, and resizing is off."""


class CacheError(DatasetError):
    """The unpacked copy of a shard cannot be written."""


class TokenShardError(ShardError):
    """A folder of token shards is incomplete, damaged, or was written with other settings."""


def listed(items: Sequence[object], limit: int = 12) -> str:
    """`a, b, c and 7 more`: a list that stays readable whatever its length."""
    shown = ", ".join(str(item) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
