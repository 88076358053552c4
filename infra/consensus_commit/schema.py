"""The schema manager: from what is declared and what is stored to the steps that lead from the one to the other.

    declared (a schema file) ─┐
                              ├─► differences ─► plan(command) ─► steps ─► carry_out(storage)
    stored (tables as are) ───┘                        └─► what this command must not or cannot mend

A transactional table is stored with its transaction columns, the before-image of every column outside the key, and an
index on the before-image of every indexed column (`metadata.transactional`). All of these count as declared.

Which command mends which difference is one table, `MENDS`. Nothing here ever loses data: keys and types are never
changed and columns never dropped; a command that meets what it may not mend refuses before its first step. Only
`drop_plan` removes rows, and that is all it is for. Steps are ordered so that one that was interrupted leaves what the
same command, or `repair`, completes; repeating a step does nothing.

Programs that use the tables must rest meanwhile: each keeps the columns that it met at its start.
Never touches rows. Source: ScalarDB's ConsensusCommitAdmin and Schema Loader (TableMetadataAlterationProcessor).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeAlias

from infra.consensus_commit.coordinator import OPTIONAL_COLUMNS
from infra.consensus_commit.metadata import BEFORE, BEFORE_TX_ID, TRANSACTION_COLUMNS, transactional
from infra.storage.operations import DataType, StorageInfo, TableSchema
from infra.storage.port import AdministrableStorage
from infra.storage.schema_file import ImportDeclaration, TableDeclaration, clustering_order

BEFORE_METADATA_COLUMNS: Mapping[str, DataType] = {BEFORE + name: kind for name, kind in TRANSACTION_COLUMNS.items()}
METADATA_COLUMNS: Mapping[str, DataType] = {**TRANSACTION_COLUMNS, **BEFORE_METADATA_COLUMNS}


# -- steps


@dataclass(frozen=True, slots=True)
class CreateNamespace:
    namespace: str

    def __str__(self) -> str:
        return f"create namespace {self.namespace}"


@dataclass(frozen=True, slots=True)
class CreateTable:
    """`table` as it is stored."""

    table: TableSchema

    def __str__(self) -> str:
        return f"create table {self.table.full_name}"


@dataclass(frozen=True, slots=True)
class AddColumn:
    table: TableSchema
    column: str
    data_type: DataType

    def __str__(self) -> str:
        return f"add column {self.table.full_name}.{self.column} {self.data_type}"


@dataclass(frozen=True, slots=True)
class CreateIndex:
    table: TableSchema
    column: str

    def __str__(self) -> str:
        return f"create index on {self.table.full_name}.{self.column}"


@dataclass(frozen=True, slots=True)
class DropIndex:
    table: TableSchema
    column: str

    def __str__(self) -> str:
        return f"drop index on {self.table.full_name}.{self.column}"


@dataclass(frozen=True, slots=True)
class DropTable:
    table: TableSchema

    def __str__(self) -> str:
        return f"drop table {self.table.full_name}"


@dataclass(frozen=True, slots=True)
class DropNamespace:
    namespace: str

    def __str__(self) -> str:
        return f"drop namespace {self.namespace}"


Step: TypeAlias = CreateNamespace | CreateTable | AddColumn | CreateIndex | DropIndex | DropTable | DropNamespace


async def carry_out(storage: AdministrableStorage, steps: Iterable[Step]) -> AsyncIterator[Step]:
    """Do `steps` in order; each is yielded once it is done. Storage errors pass through, and end it."""
    for step in steps:
        match step:
            case CreateNamespace(namespace):
                await storage.create_namespace(namespace)
            case CreateTable(table):
                await storage.create_table(table)
            case AddColumn(table, column, data_type):
                await storage.add_column(table, column, data_type)
            case CreateIndex(table, column):
                await storage.create_index(table, column)
            case DropIndex(table, column):
                await storage.drop_index(table, column)
            case DropTable(table):
                await storage.drop_table(table)
            case DropNamespace(namespace):
                await storage.drop_namespace(namespace)
        yield step


# -- what is there


@dataclass(frozen=True)
class Stock:
    """What a storage holds: its namespaces, its tables as stored, and the types that each namespace can hold."""

    namespaces: frozenset[str]
    tables: Mapping[str, TableSchema]
    data_types: Mapping[str, frozenset[DataType]]

    def types_of(self, namespace: str) -> frozenset[DataType]:
        return self.data_types.get(namespace, frozenset(DataType))


async def take_stock(storage: AdministrableStorage, namespaces: Iterable[str] = ()) -> Stock:
    """What `storage` holds now; types also of the `namespaces` that may not exist yet. Storage errors pass through."""
    existing = await storage.namespaces()
    infos: dict[str, StorageInfo] = {name: storage.info_of(name) for name in {*existing, *namespaces}}
    return Stock(
        namespaces=frozenset(existing),
        tables={table.full_name: table for table in await storage.tables()},
        data_types={name: info.data_types for name, info in infos.items()},
    )


class TableKind(StrEnum):
    """What a stored table is to transactions."""

    TRANSACTIONAL = "transactional"
    INCOMPLETE = "incomplete"  # some of what a transactional table has: an interrupted command, or an older program
    PLAIN = "plain"


def kind_of(stored: TableSchema) -> TableKind:
    """What a stored table is."""
    if not _has_begun(stored):
        return TableKind.PLAIN
    complete = transactional(_user_part(stored))
    if complete.columns.items() <= stored.columns.items() and complete.indexes <= stored.indexes:
        return TableKind.TRANSACTIONAL
    return TableKind.INCOMPLETE


def as_declared(stored: TableSchema) -> TableDeclaration:
    """The declaration that a stored table comes from, as far as the table tells."""
    if _has_begun(stored):
        return TableDeclaration(_user_part(stored), transaction=True)
    return TableDeclaration(stored, transaction=False)


def _has_begun(stored: TableSchema) -> bool:
    """Whether a table is transactional or on the way to it.

    An import begins with `before_tx_id` and ends with `tx_id`. A column that its user calls `tx_id` is so never taken
    for a transaction's.
    """
    values = {name: kind for name, kind in stored.columns.items() if name not in stored.key_columns}
    return values.get(BEFORE_TX_ID) is DataType.TEXT or values.items() >= TRANSACTION_COLUMNS.items()


def _user_part(stored: TableSchema) -> TableSchema:
    """The user's view of a table that is transactional or on the way to it."""
    mine = {
        name
        for name in stored.columns
        if name in stored.key_columns or not (name in METADATA_COLUMNS or _is_before_image(name, stored))
    }
    columns = {name: data_type for name, data_type in stored.columns.items() if name in mine}
    return replace(stored, columns=columns, indexes=stored.indexes & mine)


def _is_before_image(name: str, table: TableSchema) -> bool:
    of = name.removeprefix(BEFORE)
    return of != name and of in table.columns and of not in table.key_columns


# -- what differs


class DifferenceKind(StrEnum):
    MISSING_NAMESPACE = "missing namespace"
    MISSING_TABLE = "missing table"
    MISSING_COLUMN = "missing column"
    MISSING_INDEX = "missing index"
    MISSING_TRANSACTION_COLUMN = "missing transaction column"
    MISSING_BEFORE_INDEX = "missing index of a before-image"
    NOT_TRANSACTIONAL = "no transaction columns"
    UNDECLARED_INDEX = "undeclared index"
    UNDECLARED_COLUMN = "undeclared column"
    UNDECLARED_TRANSACTION = "transaction columns that were not declared"
    OTHER_TYPE = "another type"
    OTHER_PARTITION_KEY = "another partition key"
    OTHER_CLUSTERING_KEY = "another clustering key"
    UNSUPPORTED_TYPE = "a type that the storage cannot hold"
    OTHER_SPELLING = "a name that differs only by case"
    NOT_THERE = "no such table"


@dataclass(frozen=True)
class Difference:
    """One way in which storage is not what was declared. `subject` is the namespace, table or column it is about."""

    kind: DifferenceKind
    subject: str
    declared: str | None = None
    stored: str | None = None
    steps: tuple[Step, ...] = ()
    """What would mend it; empty where nothing does that keeps the data."""

    @property
    def remedy(self) -> str:
        return REMEDIES[self.kind]

    def __str__(self) -> str:
        images = [f"{name} {image}" for name, image in (("declared", self.declared), ("stored", self.stored)) if image]
        return f"{self.subject}: {self.kind}" + (f" ({', '.join(images)})" if images else "")


REMEDIES: Mapping[DifferenceKind, str] = {
    DifferenceKind.MISSING_NAMESPACE: "apply creates it",
    DifferenceKind.MISSING_TABLE: "apply creates it",
    DifferenceKind.MISSING_COLUMN: "alter adds it, NULL in every row",
    DifferenceKind.MISSING_INDEX: "apply or alter creates it",
    DifferenceKind.MISSING_TRANSACTION_COLUMN: "repair adds it",
    DifferenceKind.MISSING_BEFORE_INDEX: "repair creates it",
    DifferenceKind.NOT_TRANSACTIONAL: "import adds them, and deems the rows committed; or declare transaction false",
    DifferenceKind.UNDECLARED_INDEX: "alter drops it; or declare it",
    DifferenceKind.UNDECLARED_COLUMN: "columns are never dropped, their values would be lost: declare it",
    DifferenceKind.UNDECLARED_TRANSACTION: "declare transaction true",
    DifferenceKind.OTHER_TYPE: "types are never changed: declare the stored one, or copy the rows to a new table",
    DifferenceKind.OTHER_PARTITION_KEY: "keys are never changed: declare the stored one, or copy to a new table",
    DifferenceKind.OTHER_CLUSTERING_KEY: "keys are never changed: declare the stored one, or copy to a new table",
    DifferenceKind.UNSUPPORTED_TYPE: "declare another type, or keep the namespace in another storage",
    DifferenceKind.OTHER_SPELLING: "spell it as it is stored, or choose another name",
    DifferenceKind.NOT_THERE: "only a table that exists can be imported; apply creates tables",
}


class Command(StrEnum):
    """What a schema file can be used for."""

    APPLY = "apply"
    ALTER = "alter"
    REPAIR = "repair"
    IMPORT = "import"


_K = DifferenceKind

MENDS: Mapping[Command, frozenset[DifferenceKind]] = {
    Command.APPLY: frozenset(
        {_K.MISSING_NAMESPACE, _K.MISSING_TABLE, _K.MISSING_INDEX, _K.MISSING_BEFORE_INDEX},
    ),
    # Besides what it is for, what an interrupted run of itself leaves: a column without its before-image.
    Command.ALTER: frozenset(
        {
            _K.MISSING_COLUMN,
            _K.MISSING_INDEX,
            _K.UNDECLARED_INDEX,
            _K.MISSING_TRANSACTION_COLUMN,
            _K.MISSING_BEFORE_INDEX,
        },
    ),
    Command.REPAIR: frozenset(
        {
            _K.MISSING_NAMESPACE,
            _K.MISSING_TABLE,
            _K.MISSING_INDEX,
            _K.MISSING_TRANSACTION_COLUMN,
            _K.MISSING_BEFORE_INDEX,
        },
    ),
    Command.IMPORT: frozenset({_K.NOT_TRANSACTIONAL, _K.MISSING_TRANSACTION_COLUMN, _K.MISSING_BEFORE_INDEX}),
}
"""Which command mends what."""

TOLERATES: Mapping[Command, frozenset[DifferenceKind]] = {
    # A table with more indexes than were declared is still the table that was declared.
    Command.APPLY: frozenset({_K.UNDECLARED_INDEX}),
    Command.ALTER: frozenset(),
    # Repair puts right what is broken; that a file says more, or less, is a question for another command.
    Command.REPAIR: frozenset({_K.MISSING_COLUMN, _K.UNDECLARED_COLUMN, _K.UNDECLARED_INDEX, _K.NOT_TRANSACTIONAL}),
    Command.IMPORT: frozenset(),
}
"""What a command leaves as it is without refusing."""


@dataclass(frozen=True)
class Plan:
    """What a command is going to do, or why it refuses. `left` is tolerated: neither mended nor in the way."""

    command: Command
    steps: tuple[Step, ...]
    refused: tuple[Difference, ...] = ()
    left: tuple[Difference, ...] = ()


class SchemaRefusedError(Exception):
    """A command met differences that it does not mend; nothing was done. `differences` names them."""

    def __init__(self, command: Command, differences: Sequence[Difference]) -> None:
        found = "; ".join(f"{difference}: {difference.remedy}" for difference in differences)
        super().__init__(f"{command} did nothing. {found}")
        self.command = command
        self.differences = tuple(differences)

    def __reduce__(self) -> tuple[type[SchemaRefusedError], tuple[Command, tuple[Difference, ...]]]:
        return type(self), (self.command, self.differences)


def differences(declared: Iterable[TableDeclaration], stock: Stock) -> list[Difference]:
    """How `stock` differs from what is declared, table by table in the declaration's order.

    Raises IllegalOperationError if a transactional table's columns take names that belong to transactions.
    """
    found: list[Difference] = []
    asked: set[str] = set()
    for declaration in declared:
        table = declaration.table
        if table.namespace not in asked:
            asked.add(table.namespace)
            found += _of_namespace(table.namespace, stock)
        found += _of_table(declaration, stock)
    return found


def import_differences(declared: Iterable[ImportDeclaration], stock: Stock) -> list[Difference]:
    """How tables that are to be imported differ from transactional ones, or why they cannot be imported.

    Raises IllegalOperationError if a table has columns of its own by names that belong to transactions.
    """
    found: list[Difference] = []
    for declaration in declared:
        stored = stock.tables.get(declaration.full_name)
        if stored is None:
            found.append(Difference(_K.NOT_THERE, declaration.full_name))
            continue
        for column, data_type in declaration.override_types.items():
            there = stored.columns.get(column)
            if there is not data_type:
                found.append(
                    Difference(_K.OTHER_TYPE, f"{stored.full_name}.{column}", data_type, there or "no such column")
                )
        user = _user_part(stored) if _has_begun(stored) else stored
        if declaration.transaction:
            found += _of_table(TableDeclaration(user), stock)
        elif user is not stored:
            found.append(Difference(_K.UNDECLARED_TRANSACTION, stored.full_name))
    return found


def _of_namespace(namespace: str, stock: Stock) -> list[Difference]:
    if namespace in stock.namespaces:
        return []
    for other in stock.namespaces:
        if other.lower() == namespace.lower():
            return [Difference(_K.OTHER_SPELLING, namespace, stored=other)]
    return [Difference(_K.MISSING_NAMESPACE, namespace, steps=(CreateNamespace(namespace),))]


def _of_table(declaration: TableDeclaration, stock: Stock) -> list[Difference]:
    table = declaration.table
    wanted = transactional(table) if declaration.transaction else table
    held = stock.types_of(table.namespace)
    found = [
        Difference(_K.UNSUPPORTED_TYPE, f"{table.full_name}.{column}", data_type)
        for column, data_type in table.columns.items()
        if data_type not in held
    ]
    stored = stock.tables.get(table.full_name)
    if stored is None:
        for other in stock.tables:
            if other.lower() == table.full_name.lower():
                return [*found, Difference(_K.OTHER_SPELLING, table.full_name, stored=other)]
        return [*found, Difference(_K.MISSING_TABLE, table.full_name, steps=(CreateTable(wanted),))]
    if not declaration.transaction and kind_of(stored) is TableKind.TRANSACTIONAL:
        found.append(Difference(_K.UNDECLARED_TRANSACTION, table.full_name))
        stored = _user_part(stored)
    keys = _of_key(wanted, stored)
    if keys:  # Which columns have a before-image depends on the key: only the user's can be compared.
        user = _user_part(stored) if _has_begun(stored) else stored
        return [*found, *keys, *_of_columns(replace(declaration, transaction=False), table, user)]
    return [*found, *_of_columns(declaration, wanted, stored)]


def _of_key(wanted: TableSchema, stored: TableSchema) -> list[Difference]:
    found = []
    if wanted.partition_key != stored.partition_key:
        found.append(
            Difference(
                _K.OTHER_PARTITION_KEY, wanted.full_name, _listed(wanted.partition_key), _listed(stored.partition_key)
            )
        )
    if clustering_order(wanted) != clustering_order(stored):
        found.append(
            Difference(
                _K.OTHER_CLUSTERING_KEY,
                wanted.full_name,
                _listed(clustering_order(wanted)),
                _listed(clustering_order(stored)),
            )
        )
    return found


def _of_columns(declaration: TableDeclaration, wanted: TableSchema, stored: TableSchema) -> list[Difference]:
    """Columns, then indexes: an index may be of a column that is added."""
    table = declaration.table
    found: list[Difference] = []
    missing = {name: kind for name, kind in wanted.columns.items() if name not in stored.columns}

    def add(*names: str) -> tuple[Step, ...]:
        # A column of the key cannot be added; that the key differs has been found already.
        return tuple(AddColumn(stored, name, missing.pop(name)) for name in names if name in missing)

    unindexed = _in_order(wanted.indexes - stored.indexes, wanted)
    for column in [name for name in table.columns if name in missing]:
        # The column before its before-image: from what an interruption leaves, repair can tell what is lacking.
        added = () if column in table.key_columns else add(column, BEFORE + column)
        indexed = tuple(CreateIndex(stored, name) for name in unindexed if name in (column, BEFORE + column))
        unindexed = [name for name in unindexed if name not in (column, BEFORE + column)]
        found.append(
            Difference(
                _K.MISSING_COLUMN, f"{table.full_name}.{column}", table.columns[column], steps=(*added, *indexed)
            )
        )
    if declaration.transaction and not _has_begun(stored):
        befores = [BEFORE + name for name in table.columns]
        steps = add(BEFORE_TX_ID, *BEFORE_METADATA_COLUMNS, *befores, *reversed(TRANSACTION_COLUMNS))
        indexes = tuple(CreateIndex(stored, name) for name in unindexed if name not in table.indexes)
        unindexed = [name for name in unindexed if name in table.indexes]
        found.append(Difference(_K.NOT_TRANSACTIONAL, table.full_name, steps=(*steps, *indexes)))
    for column in [name for name in wanted.columns if name in missing and name not in table.columns]:
        found.append(
            Difference(
                _K.MISSING_TRANSACTION_COLUMN,
                f"{table.full_name}.{column}",
                wanted.columns[column],
                steps=add(column),
            )
        )
    for column, data_type in stored.columns.items():
        declared = wanted.columns.get(column)
        if declared is None and not (declaration.transaction and _is_before_image(column, stored)):
            found.append(Difference(_K.UNDECLARED_COLUMN, f"{table.full_name}.{column}", stored=data_type))
        elif declared is not None and declared is not data_type:
            found.append(Difference(_K.OTHER_TYPE, f"{table.full_name}.{column}", declared, data_type))
    for column in unindexed:
        kind = _K.MISSING_INDEX if column in table.indexes else _K.MISSING_BEFORE_INDEX
        found.append(Difference(kind, f"{table.full_name}.{column}", steps=(CreateIndex(stored, column),)))
    for column in _in_order(stored.indexes - wanted.indexes, stored):
        found.append(Difference(_K.UNDECLARED_INDEX, f"{table.full_name}.{column}", steps=(DropIndex(stored, column),)))
    return found


def _in_order(columns: frozenset[str], table: TableSchema) -> list[str]:
    return [column for column in table.columns if column in columns]


def _listed(names: Iterable[str]) -> str:
    return f"[{', '.join(names)}]"


# -- what to do about it


def plan(command: Command, found: Iterable[Difference]) -> Plan:
    """The steps by which `command` mends what it found, and what it refuses for."""
    steps: list[Step] = []
    refused: list[Difference] = []
    left: list[Difference] = []
    for difference in found:
        if difference.kind in MENDS[command] and difference.steps:
            steps += difference.steps
        elif difference.kind in TOLERATES[command]:
            left.append(difference)
        else:
            refused.append(difference)
    return Plan(command, tuple(steps), tuple(refused), tuple(left))


def repair_plan(declared: Sequence[TableDeclaration], stock: Stock) -> Plan:
    """What makes the declared tables whole again, as ScalarDB's repairTable does.

    Namespaces are created again even if they are there: that restores what a storage notes about them elsewhere.
    """
    found = plan(Command.REPAIR, differences(declared, stock))
    namespaces = dict.fromkeys(declaration.table.namespace for declaration in declared)
    noted = [CreateNamespace(namespace) for namespace in namespaces]
    return replace(found, steps=(*noted, *(step for step in found.steps if step not in noted)))


def drop_plan(names: Iterable[str], stock: Stock, *, coordinator: str = "coordinator") -> tuple[Step, ...]:
    """The steps that drop the tables `names` as far as they are there, and the namespaces that this leaves empty.

    Tables in the namespace `coordinator` go last: its decisions hold for records of all the others.
    """
    wanted = [stock.tables[name] for name in dict.fromkeys(names) if name in stock.tables]
    wanted.sort(key=lambda table: table.namespace == coordinator)
    kept = {table.namespace for name, table in stock.tables.items() if table not in wanted}
    emptied = [name for name in dict.fromkeys(table.namespace for table in wanted) if name not in kept]
    return (*(DropTable(table) for table in wanted), *(DropNamespace(name) for name in emptied))


def bookkeeping(table: TableSchema, stock: Stock) -> TableDeclaration:
    """The declaration of a coordinator's table, with those of ScalarDB's optional columns that the stored one has."""
    stored = stock.tables.get(table.full_name)
    optional = {name: kind for name, kind in OPTIONAL_COLUMNS.items() if stored and stored.columns.get(name) is kind}
    return TableDeclaration(replace(table, columns={**table.columns, **optional}), transaction=False)
