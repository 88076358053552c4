"""Conditions on the columns of a row, evaluated in memory."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from infra.storage.operations import ColumnCondition, Operator, Row

_COMPARISONS: Mapping[Operator, Callable[[Any, Any], bool]] = {
    Operator.EQ: operator.eq,
    Operator.NE: operator.ne,
    Operator.LT: operator.lt,
    Operator.LE: operator.le,
    Operator.GT: operator.gt,
    Operator.GE: operator.ge,
}


def holds(condition: ColumnCondition, row: Row) -> bool:
    """Whether `row` meets `condition`. Every comparison with NULL is false, `!=` included."""
    value = row[condition.column]
    match condition.operator:
        case Operator.IS_NULL:
            return value is None
        case Operator.IS_NOT_NULL:
            return value is not None
        case comparison:
            # str compares by code points, which is the order of its UTF-8 bytes.
            return (
                value is not None and condition.value is not None and _COMPARISONS[comparison](value, condition.value)
            )


def all_hold(conditions: Iterable[ColumnCondition], row: Row) -> bool:
    """Whether `row` meets every one of `conditions`."""
    return all(holds(condition, row) for condition in conditions)
