"""Whether two SQL queries say the same, clause by clause: Spider's exact set match.

The Spider questions come without their databases, so nothing can be run. As in Spider's own metric
(Yu et al. 2018, https://doi.org/10.18653/v1/d18-1425), a query is taken apart into clauses, and a
clause is compared as a set where its order means nothing: selected columns, tables, conditions,
groups. Unlike there, values count. sqlglot parses, and resolves aliases and unqualified columns by
the schema that stands in the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.qualify import qualify

from lrmc_ray.errors import DataError
from lrmc_ray.tasks.nl2sql import extract_sql

Schema = dict[str, dict[str, str]]
"""Of each table, its columns and their types."""

_TABLE = re.compile(r"^Table: (?P<table>.+?)\. Columns: (?P<columns>.*)$", re.MULTILINE)
_COLUMN = re.compile(r"\s*(?P<name>.+?) \((?P<type>\w+)\)\s*(?:,|$)")


def schema_of(prompt: str) -> Schema:
    """Tables and columns that a Spider prompt lists, in lower case."""
    return {
        table["table"].lower(): {
            column["name"].lower(): column["type"] for column in _COLUMN.finditer(table["columns"])
        }
        for table in _TABLE.finditer(prompt)
    }


def exact_set_match(predicted_sql: str, gold_sql: str, schema: Schema) -> bool:
    """Whether both queries have the same clauses.

    Raises:
        DataError: the gold query cannot be read.
    """
    try:
        gold = _canonical(_resolved(gold_sql, schema))
    except (SqlglotError, RecursionError) as error:
        raise DataError(f"a gold query must be SQLite's SQL, got {gold_sql}: {error}") from None
    try:
        return bool(_canonical(_resolved(predicted_sql, schema)) == gold)
    except (SqlglotError, RecursionError):
        return False


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's ``process_results`` of one generated query; see :func:`exact_set_match`."""
    predicted = extract_sql(results[0])
    return {
        "exact_set_match": float(exact_set_match(predicted, doc["sql"], schema_of(doc["question"])))
    }


def _resolved(sql: str, schema: Schema) -> exp.Expr:
    """The query with every column under its table's name, aliases of tables gone."""
    tree = sqlglot.parse_one(sql, dialect="sqlite")
    if not isinstance(tree, exp.Query):
        raise SqlglotError("not a query")
    known = {*schema, *(column for columns in schema.values() for column in dict(columns))}
    known |= {alias.alias_or_name.lower() for alias in tree.find_all(exp.Alias, exp.TableAlias)}
    for column in list(tree.find_all(exp.Column)):
        name = column.this
        # SQLite takes a quoted name that it does not know for a text.
        if (
            isinstance(name, exp.Identifier)
            and name.quoted
            and not column.table
            and name.name.lower() not in known
        ):
            column.replace(exp.Literal.string(name.name))
    return qualify(
        tree,
        schema={**schema},
        dialect="sqlite",
        quote_identifiers=False,
        validate_qualify_columns=False,
        expand_stars=False,
    )


def _canonical(query: exp.Expr) -> object:
    """A value that is equal for queries with the same clauses."""
    if isinstance(query, exp.Subquery):
        return _canonical(query.this)
    if isinstance(query, exp.SetOperation):
        sides = [_canonical(query.this), _canonical(query.expression)]
        ordered = isinstance(query, exp.Except)
        return (
            type(query).__name__,
            bool(query.args.get("distinct")),
            tuple(sides) if ordered else frozenset(map(repr, sides)),
        )
    names = {
        source.alias_or_name: f"{source.name}#{number}" if number else source.name
        for source, number in _numbered(query)
    }

    selected = {
        item.alias: item.unalias()
        for item in query.expressions
        # An unknown column under its own name would lead to itself.
        if item.alias and not (isinstance(item.this, exp.Column) and not item.this.table)
    }

    def render(node: Any) -> object:
        if isinstance(node, exp.Query):
            return _canonical(node)
        if isinstance(node, exp.Paren):
            return render(node.this)
        if isinstance(node, exp.Column) and not node.table and node.name in selected:
            return render(selected[node.name])
        if isinstance(node, exp.Column):
            return ("Column", names.get(node.table, node.table), node.name)
        if isinstance(node, exp.Literal):
            return ("Literal", _number(node) if not node.is_string else node.name)
        if isinstance(node, exp.LT | exp.LTE):  # x < 3 is 3 > x
            kind = "GT" if isinstance(node, exp.LT) else "GTE"
            return (kind, render(node.expression), render(node.this))
        if isinstance(node, exp.GT | exp.GTE):
            return (type(node).__name__, render(node.this), render(node.expression))
        if isinstance(node, exp.And | exp.Or | exp.EQ | exp.NEQ | exp.Add | exp.Mul):
            flat = node.flatten() if isinstance(node, exp.Connector) else node.iter_expressions()
            return (type(node).__name__, tuple(sorted(repr(render(part)) for part in flat)))
        if isinstance(node, exp.Expr):
            parts = [
                (
                    key,
                    [render(part) for part in value] if isinstance(value, list) else render(value),
                )
                for key, value in sorted(node.args.items())
                if value not in (None, False, [])
            ]
            return (type(node).__name__, repr(parts))
        return node

    def as_set(nodes: Sequence[exp.Expr]) -> tuple[str, ...]:
        return tuple(sorted(repr(render(node)) for node in nodes))

    def conditions(clause: Any) -> tuple[str, ...]:
        if clause is None:
            return ()
        condition = clause.this if isinstance(clause, exp.Where | exp.Having) else clause
        condition = condition.unnest()
        return as_set(list(condition.flatten()) if isinstance(condition, exp.And) else [condition])

    joins = query.args.get("joins") or []
    group, order, limit = (query.args.get(key) for key in ("group", "order", "limit"))
    where = conditions(query.args.get("where"))
    for join in joins:
        where += conditions(join.args.get("on"))  # an inner join's condition may stand in either
    return (
        query.args.get("distinct") is not None,
        as_set([item.unalias() for item in query.expressions]),
        tuple(sorted(_sources(query, names))),
        tuple(sorted(join.side for join in joins if join.side)),
        tuple(sorted(where)),
        as_set(group.expressions if group else []),
        conditions(query.args.get("having")),
        tuple(repr(render(item)) for item in order.expressions) if order else (),
        repr(render(limit.expression)) if limit else "",
    )


def _tables(query: exp.Expr) -> Iterator[exp.Expr]:
    """What the query selects from: tables and subqueries."""
    source = query.args.get("from_") or query.args.get("from")
    if source is not None:
        yield source.this
    for join in query.args.get("joins") or []:
        yield join.this


def _numbered(query: exp.Expr) -> Iterator[tuple[exp.Expr, int]]:
    """Each source, and how many of the same name came before it."""
    seen: dict[str, int] = {}
    for source in _tables(query):
        yield source, seen.get(source.name, 0)
        seen[source.name] = seen.get(source.name, 0) + 1


def _sources(query: exp.Expr, names: Mapping[str, str]) -> Iterator[str]:
    for source in _tables(query):
        if isinstance(source, exp.Subquery):
            yield repr(_canonical(source))
        else:
            yield names[source.alias_or_name]


def _number(literal: exp.Literal) -> object:
    try:
        return float(literal.name)
    except ValueError:
        return literal.name
