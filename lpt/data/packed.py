"""Folders whose images lie in parquet files or WebDataset shards: which of the files there are the dataset."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lpt.data.data_files import are_beside
from lpt.data.parquet import holding_images, read_parquet
from lpt.data.shards import file_of_names, is_shard, number_of_samples, read_shards
from lpt.data.tables import Columns, EncodedPart
from lpt.data.walk import RelativePath, Walk, joined
from lpt.errors import DataError, quoted


@dataclass
class Packed:
    """What was read, and what was not."""

    parts: dict[str, EncodedPart]
    files: Sequence[RelativePath]
    """The files that were read."""
    not_read: list[str] = field(default_factory=list)
    """Parts and files inside them that are in no part."""


def read_packed(root: Path, walked: Walk, columns: Columns) -> Packed | None:
    """The parts of the parquet files or shards below `root`; None where there are none, or where its images are loose
    files. Raises DataError where both could be meant."""
    others = walked.left_out.get("other_files", [])
    parquet = [path for path in others if path[-1].lower().endswith(".parquet")]
    tars = [path for path in others if path[-1].lower().endswith(".tar")]
    with_images, num_rows = holding_images(root, parquet, columns)
    if not walked.images and parquet and not tars:
        with_images = parquet  # without a column of images, reading says which columns there are
    shards = [path for path in tars if is_shard(root.joinpath(*path))]
    if shards:  # then others may be of images without classes
        shards = [path for path in tars if path in shards or is_shard(root.joinpath(*path), with_classes=False)]
    if with_images and shards:
        raise DataError(
            f"data.root {quoted(root)} has images in {quoted(joined(with_images[0]))} and in "
            f"{quoted(joined(shards[0]))}: move one of the two elsewhere"
        )
    files = with_images or shards
    if not files:
        return None
    if walked.images:
        num_rows = num_rows if with_images else number_of_samples([root.joinpath(*path) for path in shards])
        if are_beside(walked.images, num_rows) is None:
            raise DataError(
                f"data.root {quoted(root)} has {len(walked.images)} images in folders, such as "
                f"{quoted(joined(walked.images[0]))}, and {num_rows} in files such as {quoted(joined(files[0]))}: move "
                "one of the two elsewhere, or set data.root to where only one is"
            )
    if shards and len(shards) < len(tars):
        other = next(path for path in tars if path not in shards)
        raise DataError(
            f"data.root {quoted(root)} has shards, and {quoted(joined(other))}, which is none (KEY.jpg beside KEY.cls "
            "or KEY.json): move it elsewhere"
        )
    return _read(root, files, columns)


def read_packed_file(path: Path, columns: Columns) -> Packed | None:
    """The images in one parquet file or shard; None where `path` is neither. Raises DataError."""
    kind = path.suffix.lower()
    file = (path.name,)
    if kind == ".tar" or (kind == ".parquet" and holding_images(path.parent, [file], columns)[0]):
        return _read(path.parent, [file], columns)
    return None


def _read(root: Path, files: Sequence[RelativePath], columns: Columns) -> Packed:
    reads = read_shards if files[0][-1].lower().endswith(".tar") else read_parquet
    parts, not_read = reads(root, files, columns)
    names = file_of_names(root) if reads is read_shards else None
    return Packed(parts, [*files, (names.name,)] if names else files, not_read)
