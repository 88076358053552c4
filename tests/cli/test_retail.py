"""Online Retail rows become commands by the replay's rules, messy ones included."""

from __future__ import annotations

import csv
import gzip
import io
import uuid
from pathlib import Path

import pytest

from schemas.registry import default_registry
from scripts.cli import generate, retail
from scripts.cli.retail import Invoice, Planned, Skipped

HEADER = ",".join(retail.COLUMNS)
WHEN = "2010-12-01 08:26:00"


def invoices(*rows: str) -> list[Invoice]:
    """The invoices of these rows, written as in the file; `@` stands for a date."""
    text = "\n".join((HEADER, *rows)).replace("@", WHEN)
    return retail.read_invoices(csv.reader(io.StringIO(text)))


def commands(*rows: str) -> list[Planned]:
    planned = []
    for invoice in invoices(*rows):
        found = retail.commands_of(invoice)
        assert not isinstance(found, Skipped), found
        planned += found
    return planned


def reason(*rows: str) -> str:
    [invoice] = invoices(*rows)
    found = retail.commands_of(invoice)
    assert isinstance(found, Skipped), found
    return found.reason


def test_an_ordinary_invoice_is_one_order_with_its_lines_in_order() -> None:
    [order] = commands(
        "536365,85123A,WHITE HANGING HEART,6,@,2.55,17850.0,United Kingdom",
        "536365,71053,WHITE METAL LANTERN,8,@,3.39,17850.0,United Kingdom",
    )

    assert order == Planned(
        type="PlaceOrder",
        id=str(uuid.uuid5(uuid.NAMESPACE_URL, "concord:place:536365")),
        body={
            "order_id": "536365",
            "customer_id": "17850",
            "lines": [
                {"category": "851", "product_id": "85123A", "quantity": 6, "unit_price": 255},
                {"category": "710", "product_id": "71053", "quantity": 8, "unit_price": 339},
            ],
            "currency": "GBP",
            "shipping_address": {"region": "United Kingdom"},
        },
        invoice="536365",
        lines=2,
    )


def test_one_code_on_several_lines_stays_several_lines_with_their_own_prices() -> None:
    [order] = commands("1,22001,MUG,2,@,2.55,1.0,UK", "1,22001,MUG,3,@,1.25,1.0,UK")

    assert [(line["quantity"], line["unit_price"]) for line in order.body["lines"]] == [(2, 255), (3, 125)]


def test_codes_that_differ_in_case_are_different_products() -> None:
    [order] = commands("1,85123A,HEART,1,@,2.55,1.0,UK", "1,85123a,heart,1,@,5.79,1.0,UK", "1,m,Manual,1,@,1,1.0,UK")

    assert [line["product_id"] for line in order.body["lines"]] == ["85123A", "85123a", "m"]
    assert [line["category"] for line in order.body["lines"]] == ["851", "851", "m"]


def test_a_cancellation_is_a_return_with_positive_quantities() -> None:
    [returned] = commands("C536379,D,Discount,-1,@,27.5,14527.0,UK", "C536379,22001,MUG,-3,@,2.5,14527.0,UK")

    assert returned.type == "ReturnGoods"
    assert returned.id == str(uuid.uuid5(uuid.NAMESPACE_URL, "concord:return:C536379"))
    assert returned.body["return_id"] == "C536379"
    assert "order_id" not in returned.body
    assert [line["quantity"] for line in returned.body["lines"]] == [1, 3]


def test_negative_lines_of_an_ordinary_invoice_are_write_offs_one_for_each_line() -> None:
    planned = commands("536589,21777,,-10,@,0.0,,UK", "536589,21778,damaged,-4,@,0.0,,UK")

    assert [(command.type, command.id) for command in planned] == [
        ("WriteOffStock", str(uuid.uuid5(uuid.NAMESPACE_URL, "concord:write-off:536589:1"))),
        ("WriteOffStock", str(uuid.uuid5(uuid.NAMESPACE_URL, "concord:write-off:536589:2"))),
    ]
    assert planned[0].body == {"category": "217", "product_id": "21777", "quantity": 10}
    assert planned[1].body == {"category": "217", "product_id": "21778", "quantity": 4, "reason": "damaged"}


def test_an_invoice_of_both_signs_is_an_order_and_write_offs_and_zero_is_neither() -> None:
    planned = commands("1,A1,a,0,@,1,1.0,UK", "1,A2,a,2,@,1,1.0,UK", "1,A3,a,-3,@,0,1.0,UK")

    assert [(command.type, command.lines) for command in planned] == [("PlaceOrder", 1), ("WriteOffStock", 1)]
    assert planned[1].id == retail.command_id("write-off", "1", "3")  # its place among all lines of the invoice


def test_rows_of_one_invoice_that_stand_apart_are_one_invoice_at_its_first_place_and_date() -> None:
    split = invoices(
        "542806,A1,a,1,2011-02-01 10:00:00,1,5.0,UK",
        "C542805,A1,a,-1,2011-02-01 10:01:00,1,5.0,UK",
        "542806,A2,a,2,2011-02-01 10:02:00,1,5.0,UK",
    )

    assert [(invoice.number, len(invoice.lines), invoice.invoiced_at) for invoice in split] == [
        ("542806", 2, "2011-02-01T10:00:00"),
        ("C542805", 1, "2011-02-01T10:01:00"),
    ]


@pytest.mark.parametrize(("text", "customer"), [("17850.0", "17850"), ("17850", "17850"), ("", "guest")])
def test_the_customer_is_the_integer_part_or_the_guest(text: str, customer: str) -> None:
    assert retail.customer_of(text) == customer


@pytest.mark.parametrize(
    ("pounds", "pence"),
    [
        ("2.55", 255),
        ("2.1", 210),
        ("0.0", 0),
        ("0.001", 0),
        ("0.005", 0),  # half of a penny goes to the even neighbour …
        ("0.015", 2),  # … which is above here
        ("0.025", 2),
        ("0.0251", 3),
        ("1.005", 100),
        ("11062.06", 1106206),
        ("-11062.06", -1106206),
    ],
)
def test_prices_are_pence_rounded_half_even(pounds: str, pence: int) -> None:
    assert retail.pence_of(pounds) == pence


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("A563185,B,Adjust bad debt,1,@,11062.06,,UK", "neither an ordinary invoice nor a cancellation"),
        ("1,A1,a,0,@,1,1.0,UK", "no line with a quantity"),
        ("C1,A1,a,0,@,1,1.0,UK", "no line with a quantity"),
        ("1,A1,a,1,@,-1,1.0,UK", "a negative price"),
        ("1,A1,a,one,@,1,1.0,UK", "unreadable: line 1: Quantity 'one' is not an integer of a sensible size"),
        ("1,A1,a,1.5,@,1,1.0,UK", "unreadable: line 1: Quantity '1.5' is not an integer of a sensible size"),
        (
            "1,A1,a,99999999999,@,1,1,UK",
            "unreadable: line 1: Quantity '99999999999' is not an integer of a sensible size",
        ),
        ("1,A1,a,1,@,NaN,1.0,UK", "unreadable: line 1: UnitPrice 'NaN' is not a number of a sensible size"),
        ("1,A1,a,1,@,cheap,1.0,UK", "unreadable: line 1: UnitPrice 'cheap' is not a number"),
        ("1,A1,a,1,@,1,Bob,UK", "unreadable: line 1: CustomerID 'Bob' is not a number"),
        ("1,A1,a,1,yesterday,1,1.0,UK", "unreadable: line 1: InvoiceDate 'yesterday' is not a date"),
        ("1,,a,1,@,1,1.0,UK", "unreadable: line 1: no StockCode"),
        ("1,A1,a,1,@,1,1.0", "unreadable: line 1: 7 fields instead of 8"),
        ("1,A1,a,1,@,1,1.0,UK,more", "unreadable: line 1: 9 fields instead of 8"),
        (",A1,a,1,@,1,1.0,UK", "unreadable: line 1: no InvoiceNo"),
    ],
)
def test_what_is_skipped_says_why(row: str, why: str) -> None:
    assert reason(row) == why


def test_one_unreadable_row_makes_its_whole_invoice_skipped_and_no_other() -> None:
    found = invoices("1,A1,a,1,@,1,1.0,UK", "2,A1,a,1,@,1,1.0,UK", "1,A2,a,x,@,1,1.0,UK")

    assert [bool(invoice.unreadable) for invoice in found] == [True, False]
    assert isinstance(retail.commands_of(found[0]), Skipped)


def test_a_product_is_named_by_its_first_description_that_is_not_empty_else_by_its_code() -> None:
    catalogue = retail.catalogue_of(
        invoices(
            "1,A1,,-1,@,0.0,,UK",
            "2,A1, FIRST ,1,@,2.5,1.0,UK",
            "3,A1,SECOND,1,@,3.5,1.0,UK",
            "3,A2,,1,@,1,1.0,UK",
        )
    )

    assert catalogue.names == {"A1": " FIRST ", "A2": "A2"}
    assert catalogue.prices == {"A1": 250, "A2": 100}
    assert list(catalogue.customers) == ["guest", "1"]


def test_only_what_is_not_there_yet_is_registered_and_opened() -> None:
    catalogue = retail.catalogue_of(invoices("1,A1,a,1,@,2.5,1.0,UK", "1,B1,b,1,@,1,1.0,UK", "2,A1,a,1,@,1,,UK"))

    [product] = retail.register_products(catalogue, existing={("A1", "A1")}, initial_stock=7)
    [wallet] = retail.open_wallets(catalogue, existing={"1"}, initial_balance=9)

    assert product.id == str(uuid.uuid5(uuid.NAMESPACE_URL, "concord:product:B1"))
    assert product.body["quantity"] == 7
    assert wallet.id == str(uuid.uuid5(uuid.NAMESPACE_URL, "concord:wallet:guest"))
    assert wallet.body == {"customer_id": "guest", "initial_balance": 9, "currency": "GBP"}


def test_a_byte_that_is_no_utf8_spoils_its_invoice_alone(tmp_path: Path) -> None:
    path = tmp_path / "latin1.csv"
    rows = f"{HEADER}\n1,A1,\xa3 SIGN,1,{WHEN},1,1.0,UK\n2,A1,fine,1,{WHEN},1,1.0,UK\n"
    path.write_bytes(rows.encode("latin-1"))

    found = retail.read_file(path)

    assert [invoice.unreadable for invoice in found] == ["line 1: not UTF-8", ""]


def test_descriptions_may_hold_quotes_commas_and_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "quoted.csv.gz"
    with gzip.open(path, "wt", newline="") as file:
        file.write(f'{HEADER}\r\n1,A1,"RECORD 7"" SIZE, ""A\nB""",1,{WHEN},1,1.0,UK\r\n\r\n')

    [invoice] = retail.read_file(path)

    assert invoice.lines[0].description == 'RECORD 7" SIZE, "A\nB"'
    assert retail.catalogue_of([invoice]).names == {"A1": 'RECORD 7" SIZE, "A B"'}


def test_another_kind_of_file_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "other.csv.gz").write_text("no gzip")

    with pytest.raises(retail.UnreadableFileError, match="does not name the column InvoiceNo"):
        retail.read_file(tmp_path / "other.csv")
    with pytest.raises(retail.UnreadableFileError, match="not a whole gzip file"):
        retail.read_file(tmp_path / "other.csv.gz")


def test_generated_invoices_are_the_same_for_a_seed_and_have_every_mess_of_the_real_ones() -> None:
    rows = list(generate.generate(invoices=300, seed=1))
    assert rows == list(generate.generate(invoices=300, seed=1))
    assert rows != list(generate.generate(invoices=300, seed=2))

    found = retail.read_invoices(rows)
    planned = [command for invoice in found for command in _planned(invoice)]
    orders = [command for command in planned if command.type == "PlaceOrder"]
    totals = [sum(line["quantity"] * line["unit_price"] for line in order.body["lines"]) for order in orders]
    codes = [line["product_id"] for order in orders for line in order.body["lines"]]
    by_number = [row[0] for row in rows[1:]]

    assert not any(invoice.unreadable for invoice in found)
    assert {command.type for command in planned} == {"PlaceOrder", "ReturnGoods", "WriteOffStock"}
    assert any(invoice.number.startswith("A") for invoice in found)
    assert any(order.body["customer_id"] == "guest" for order in orders)
    assert any(total == 0 for total in totals)
    assert any(len({line["product_id"] for line in order.body["lines"]}) < order.lines for order in orders)
    assert sum(order.lines > 10 for order in orders) > len(orders) / 3
    assert max(map(codes.count, set(codes))) > len(codes) / 20  # hot
    assert any(row[5] == "0.001" for row in rows)
    assert any(not row[2] for row in rows)
    assert any('"' in row[2] and "," not in row[2] for row in rows)
    assert {"85123A", "85123a"} <= {row[1] for row in rows}
    assert len([n for n, before in zip(by_number, ["", *by_number], strict=False) if n != before]) > len(found)


def test_every_command_of_generated_invoices_is_taken_by_its_model() -> None:
    found = retail.read_invoices(generate.generate(invoices=200, seed=3))
    catalogue = retail.catalogue_of(found)
    planned = [command for invoice in found for command in _planned(invoice)]
    planned += retail.register_products(catalogue, existing=set(), initial_stock=5)
    planned += retail.open_wallets(catalogue, existing=set(), initial_balance=5)

    for command in planned:
        model = default_registry().command(command.type)
        produced = model.model_validate_json(_json(command.body), extra="forbid")
        assert produced.routing_key
    assert len({command.id for command in planned}) == len(planned)


def _planned(invoice: Invoice) -> list[Planned]:
    found = retail.commands_of(invoice)
    return [] if isinstance(found, Skipped) else found


def _json(body: object) -> str:
    import json

    return json.dumps(body)
