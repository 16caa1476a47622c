"""Data sets as cached tables of checked rows, read from local files or from the hub.

Local files are read by this package's readers and hub data sets by `datasets`. Both give a
memory-mapped `datasets.Dataset` whose columns are the fields of the schema plus `where`, the file
and line of a row.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from moe_jax.config.data import Schema, SourceConfig
from moe_jax.data.files import DataFiles, find_files
from moe_jax.data.hub import HubAddress, download_files, hub_address
from moe_jax.data.readers import read_rows
from moe_jax.data.schema import FIELDS, check_row, column_names, row_columns
from moe_jax.data.schema_choice import COLUMN_SCHEMAS, choose_schema
from moe_jax.data.table_cache import cache_key, cached_table, progress_bars
from moe_jax.data.tokenizer import first_line
from moe_jax.data.values import without_filled_keys
from moe_jax.errors import DataError
from moe_jax.files.hub_log import quiet_retries


class RowTable(NamedTuple):
    """Checked rows, and their cache key; equal rows may have different keys.

    Attributes:
      rows: checked rows.
      key: key of the rows in the cache; None for rows in memory, whose tokens are not kept either.
      files: number of data files, where a path may stand for several; None otherwise.
      skipped: files of the folders that are not read, as in `DataFiles`.
      origin: what the report says in place of the numbers of rows and files; None for those.
    """

    rows: datasets.Dataset
    key: str | None
    files: int | None = None
    skipped: Mapping[str, Sequence[str]] = {}
    origin: str | None = None


ReadSource = Callable[[SourceConfig, str | None], RowTable]
"""A reader of data sets: `read_source`, or `read_source_or_task` of `moe_jax.tasks`."""


def read_source(source: SourceConfig, cache_dir: str | None) -> RowTable:
    """Reads all rows of a source's split and checks them against its schema.

    Args:
      source: data set to read.
      cache_dir: cache folder of the table; None takes that of `datasets`.

    Raises:
      DataError: the data set is missing or unreadable, a row does not fit, or the split is empty.
    """
    if source.task is not None:
        raise ValueError(f"{source.title}: tasks are read by moe_jax.tasks.training_rows")
    source = with_schema(source, cache_dir)
    column_names(source)
    address = hub_data_set(source)
    if address is None:
        table = _read_files(local_files(source), source, cache_dir)
        table = select_part(table, source, _whole_split(source))
    else:
        table = _read_hub(address, source, cache_dir)
    if not len(table.rows):
        raise no_rows(source)
    return table


def with_schema(
    source: SourceConfig,
    cache_dir: str | None,
    schemas: Collection[Schema] = COLUMN_SCHEMAS,
) -> SourceConfig:
    """The source with its schema, which is chosen by the columns of its first row if left out.

    Args:
      source: data set.
      cache_dir: see `read_source`.
      schemas: schemas to choose from.

    Raises:
      DataError: the first row cannot be read, or the columns do not tell the schema.
    """
    if source.schema is not None:
        return source
    where, columns = first_columns(source, cache_dir)
    return choose_schema(source, columns, where, schemas)


def first_columns(source: SourceConfig, cache_dir: str | None) -> tuple[str, list[str]]:
    """Place and columns of the first row of a source.

    Raises:
      DataError: the row cannot be read, or there is none.
    """
    address = hub_data_set(source)
    if address is not None:
        columns = _load_hub(address, source, cache_dir).column_names
        return f"{source.title}, {source.split}", columns
    for file in local_files(source).files:
        for where, row in read_rows(file):
            return where, list(row_columns(row, where))
    raise no_rows(source)


def iterate_rows(source: SourceConfig, cache_dir: str | None) -> Iterator[dict[str, str]]:
    """Yields the checked rows of a split, of local files without reading them as a whole.

    Raises:
      DataError: see `read_source`.
    """
    address = hub_data_set(source)
    if address is not None:
        rows: Any = _read_hub(address, source, cache_dir).rows
        yield from rows
    else:
        yield from _checked_rows(local_files(source).files, source)


def no_rows(source: SourceConfig) -> DataError:
    """Error of a split without rows."""
    if source.split == "train":
        return DataError(f"{source.title}: holds no rows; give data with rows")
    return DataError(f"{source.title}: the split {source.split!r} holds no rows; give another one")


def hub_data_set(source: SourceConfig) -> HubAddress | None:
    """Address of a whole data set on the hub; None for files, of a hub repository too.

    Raises:
      DataError: a whole data set is one of several paths, or has two revisions.
    """
    for path in source.paths:
        address = hub_address(path)
        if address is not None and not address.files:
            if len(source.paths) > 1:
                raise DataError(
                    f"{path}: is no file, folder or pattern, as several paths must be; give a data "
                    "set of the hub alone, or files of it (hf://datasets/OWNER/NAME/FILES)"
                )
            return _pinned(path, address, source)
    return None


def _pinned(path: str, address: HubAddress, source: SourceConfig) -> HubAddress:
    """Address with the source's revision."""
    if address.revision is None or source.revision in (None, address.revision):
        return address._replace(revision=address.revision or source.revision)
    raise DataError(f"{path}: has a revision, and `revision` is {source.revision!r}; give one")


def _whole_split(source: SourceConfig) -> str:
    """Split without a part such as `[:90%]`."""
    return source.split.partition("[")[0]


def local_files(source: SourceConfig) -> DataFiles:
    """Files of a source's split; those of a hub repository are downloaded.

    Raises:
      DataError: there are none, or a setting does not go with them.
    """
    return find_files(_local_paths(source), _whole_split(source))


def _local_paths(source: SourceConfig) -> list[str]:
    """Local files, folders and patterns of a source; files of the hub are downloaded.

    Raises:
      DataError: files on the hub cannot be read, or a local path has a revision or no such subset.
    """
    paths = []
    for path in source.paths:
        address = hub_address(path)
        local = path
        if address is not None:
            local = download_files(path, _pinned(path, address, source))
        elif source.revision is not None:
            raise DataError(f"{path}: is local, so it has no revision; leave `revision` out")
        if source.name is not None:
            local = f"{local}/{source.name}"
            if not Path(local).expanduser().is_dir():
                raise DataError(
                    f"{path}: has no subfolder {source.name!r}, which `name` selects; leave it out"
                )
        paths.append(local)
    return paths


def _read_files(found: DataFiles, source: SourceConfig, cache_dir: str | None) -> RowTable:
    parts = []
    for file in found.files:
        try:
            with file.open("rb") as content:
                parts.append((str(file), hashlib.file_digest(content, "sha256").hexdigest()))
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    key = cache_key(parts, source.schema, column_names(source))

    def make(folder: Path) -> Any:
        return datasets.Dataset.from_generator(
            _checked_rows,
            features=_features(source),
            cache_dir=str(folder),
            # A tuple, because `datasets` takes lists for shards.
            gen_kwargs={"files": found.files, "source": source},
            fingerprint=key,
        )

    with progress_bars():
        rows = cached_table(cache_dir, key, make)
    is_file = len(source.paths) == len(found.files) == 1 and not found.skipped
    return RowTable(rows, key, None if is_file else len(found.files), found.skipped)


def _checked_rows(files: tuple[Path, ...], source: SourceConfig) -> Iterator[dict[str, str]]:
    is_empty = True
    for file in files:
        for where, row in read_rows(file):
            is_empty = False
            yield {**check_row(row, source, where), "where": where}
    if is_empty:  # the cache builder refuses a generator without rows
        raise no_rows(source)


def _load_hub(address: HubAddress, source: SourceConfig, cache_dir: str | None) -> datasets.Dataset:
    # The hub's libraries raise many types, for no network, no such id, no such split and no access.
    try:
        with progress_bars(), quiet_retries():
            return datasets.load_dataset(
                address.dataset,
                name=source.name,
                split=source.split,
                revision=address.revision,
                cache_dir=cache_dir,
            )
    except Exception as error:
        is_id = address.dataset == source.path
        raise DataError(
            f"{source.path}: {'no such file or folder, and ' if is_id else ''}not readable as a "
            f"hub data set ({first_line(error)}); check the id and the network, or give a local "
            "file"
        ) from error


def _read_hub(address: HubAddress, source: SourceConfig, cache_dir: str | None) -> RowTable:
    raw = _load_hub(address, source, cache_dir)
    # `datasets` keeps downloads in folders named after the content's version.
    files = [file["filename"] for file in raw.cache_files]
    key = cache_key(files, address.dataset, source.split, source.schema, column_names(source))

    def make(folder: Path) -> datasets.Dataset:
        return raw.map(
            check_hub_row,
            with_indices=True,
            fn_kwargs={"source": source},
            remove_columns=raw.column_names,
            features=_features(source),
            cache_file_name=str(folder / "rows.arrow"),
            new_fingerprint=key,
        )

    with progress_bars():
        return RowTable(cached_table(cache_dir, key, make), key)


def check_hub_row(row: Any, index: int, source: SourceConfig) -> dict[str, str]:
    """Fields of a row of a hub data set, and `where`.

    Args:
      row: raw row.
      index: number of the row in its split, from 0.
      source: data set, with its schema.

    Raises:
      DataError: the row does not fit the schema.
    """
    where = f"{source.path}, {source.split}: row {index + 1}"
    return {**check_row(without_filled_keys(row), source, where), "where": where}


def select_part(table: RowTable, source: SourceConfig, split: str) -> RowTable:
    """Selects the rows of a part of a split, such as `train[:90%]`, from the split's table.

    Args:
      table: rows of the full split.
      source: data set, whose `split` names the part.
      split: name of the full split.

    Raises:
      DataError: there is no such part.
    """
    if source.split == split:
        return table
    try:
        instruction = datasets.ReadInstruction.from_spec(source.split)
        parts = instruction.to_absolute({split: len(table.rows)})
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{source.title}: cannot take the split {source.split!r} of {len(table.rows)} rows "
            f"({first_line(error)})"
        ) from None
    kept = [row for part in parts for row in range(part.from_ or 0, part.to or 0)]
    key = cache_key(table.key, source.split)
    return table._replace(rows=table.rows.select(kept), key=key)


def _features(source: SourceConfig) -> datasets.Features:
    assert source.schema is not None
    text = datasets.Value("string")
    return datasets.Features(dict.fromkeys((*FIELDS[source.schema], "where"), text))
