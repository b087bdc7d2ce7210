"""Columns of a table, checked: what is wrong is said in one line that names the key, the row (from 1) and the file."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from federa.data import Texts
from federa.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Rows:
    """A split as it was read: labels are ids or strings, `names` is what the file itself says the ids mean. `split_by`
    decides where a row of a single file goes: rows that share it are all train or all test."""

    where: str
    texts: list[str]
    labels: list[Any] | None = None
    clients: list[str] | None = None
    names: list[str] | None = None
    split_by: list[str] | None = None
    fields: Mapping[str, list[Any]] = field(default_factory=dict)

    def take(self, indices: Sequence[int]) -> "Rows":
        def taken(column: list[Any] | None) -> list[Any] | None:
            return None if column is None else [column[i] for i in indices]

        columns = {name: taken(getattr(self, name)) for name in ("texts", "labels", "clients", "split_by")}
        return replace(self, **columns, fields={name: taken(column) for name, column in self.fields.items()})


@dataclass(frozen=True)
class Table:
    """A split whose columns a task asks for by key and name."""

    data: "Dataset"
    where: str

    def column(self, key: str, name: str) -> list[Any]:
        """The values of a column."""
        if name not in self.data.column_names:
            near = difflib.get_close_matches(name, self.data.column_names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            columns = ", ".join(self.data.column_names)
            raise InputError(f"{key} must be a column of {self.where} ({columns}), got {name!r}{hint}")
        try:
            values = self.data[name][:]
        except UnicodeDecodeError as error:
            raise InputError(f"{key}: {self.where} is not UTF-8: {' '.join(str(error).split())}") from error
        if not values:
            raise InputError(f"data: {self.where} holds no examples")
        return values

    def checked(self, key: str, name: str, expected: str, check: Callable[[Any], bool]) -> list[Any]:
        """A column whose every value passes `check`; `expected` is what it "must hold"."""
        values = self.column(key, name)
        for row, value in enumerate(values):
            if not check(value):
                self.refuse(key, expected, value, row)
        return values

    def strings(self, key: str, name: str) -> list[str]:
        return self.checked(key, name, "hold strings", lambda value: isinstance(value, str))

    def clients(self, name: str | None) -> list[str] | None:
        if name is None:
            return None
        values = self.checked("data.client", name, "name a client", lambda value: value is not None and value != "")
        return [str(value) for value in values]

    def names(self, name: str) -> list[str] | None:
        """What a column's own type says its ids mean, if it does; of lists of ids, too."""
        kind = self.data.features[name]
        return getattr(kind, "names", None) or getattr(getattr(kind, "feature", None), "names", None)

    def refuse(self, key: str, expected: str, value: Any, row: int) -> NoReturn:
        raise InputError(f"{key} must {expected}, got {shown(value)} in row {row + 1} of {self.where}")


def read_labels(table: Table, name: str) -> list[int] | list[str]:
    """A column of one label a row: all ids or all strings."""
    labels = table.column("data.label", name)
    kind = type(labels[0])
    for row, label in enumerate(labels):
        if label == "" or type(label) is not kind or kind not in (int, bool, str):
            table.refuse("data.label", "hold ids or strings", label, row)
    return labels


def encode_labels(train: Rows, test: Rows, names: list[str] | None) -> tuple[Texts, Texts, list[str]]:
    """Labels as ids into `names`: those given, else the file's own, else the distinct labels of the training split."""
    names = names or train.names or _label_names(train)
    train_texts, test_texts = _with_ids(train, names), _with_ids(test, names)
    unseen = np.setdiff1d(test_texts.labels, train_texts.labels)
    if len(unseen):
        missing = ", ".join(names[label] for label in unseen[:5])
        raise InputError(
            f"data.label must occur in {train.where} for every label of {test.where}, got none of {missing}"
        )
    return train_texts, test_texts, names


def _label_names(train: Rows) -> list[str]:
    distinct = sorted(set(train.labels))
    if isinstance(distinct[0], str):
        return distinct
    if distinct != list(range(len(distinct))):
        raise InputError(f"data.label must hold every id from 0 to L-1, got {shown(distinct)} in {train.where}")
    return [str(int(label)) for label in distinct]


def _with_ids(rows: Rows, names: list[str]) -> Texts:
    ids = {name: label for label, name in enumerate(names)}
    labels = [ids.get(label, -1) if isinstance(label, str) else int(label) for label in rows.labels]
    for row, label in enumerate(labels, 1):
        if not 0 <= label < len(names):
            raise InputError(
                f"data.label must be one of {len(names)} labels ({shown(names)}), "
                f"got {shown(rows.labels[row - 1])} in row {row} of {rows.where}"
            )
    return Texts(rows.texts, np.array(labels, dtype=np.int64), rows.clients, rows.fields)


def without_labels(rows: Rows) -> Texts:
    """Rows that have no one label each."""
    return Texts(rows.texts, np.zeros(len(rows.texts), dtype=np.int64), rows.clients, rows.fields)


def shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
