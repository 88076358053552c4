"""Are money and versions exact, and is there one order of all transactions that also agrees with the clock on the wall?

Pure functions over what an independent consumer saw and what the tables hold at rest; standard library only, nothing
of the system's. `judge` says what must hold of messages; here it is held against the tables and against time.

    wallets    every movement is an event that tells the balance it led to: from one version to the next they must lead
               from the balance before to the balance after, and the last one to the balance in the table
    versions   of a wallet and of an order every version from 1 on was made, by one transaction each, and the last one
               is that of the record in the table: a lost or a doubled write would leave a gap or be one too many
    time       transactions are ordered by the versions that they made of the same records, and one whose answer was
               seen before another one's commands were published comes before it. Serial and in time means: no cycle.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from scripts.proof.judge import DOMAINS, History

WALLET = "payment.wallets/"
ORDER = "orders.orders/"

SIGN: Mapping[str, int] = {
    "WalletOpened": +1,
    "WalletToppedUp": +1,
    "PaymentTaken": -1,
    "PaymentRefunded": +1,
}

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Made:
    """An event: which version of which record a transaction made."""

    subject: str
    version: int
    transaction: str
    type: str
    body: Mapping[str, Any]


def made(history: History) -> list[Made]:
    """Every event once, in the order in which the topics first had them."""
    found: dict[str, Made] = {}
    for domain in DOMAINS:
        for seen in history.events(domain):
            event = Made(
                seen.header("ce_subject") or "",
                int(seen.header("ce_recordversion") or 0),
                seen.header("ce_txid") or "",
                seen.header("ce_type") or "",
                seen.body,
            )
            found.setdefault(seen.header("ce_id") or "", event)
    return list(found.values())


# --- money -------------------------------------------------------------------------------------------------------


def check_wallets(events: Iterable[Made], wallets: Rows) -> Iterator[str]:
    """A sentence for each wallet whose movements do not lead to its balance."""
    by_wallet: dict[str, dict[int, list[Made]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        if event.subject.startswith(WALLET):
            by_wallet[event.subject.removeprefix(WALLET)][event.version].append(event)
    stored = {str(row["customer_id"]): int(row["balance"]) for row in wallets}
    for customer in sorted(stored.keys() | by_wallet.keys()):
        balance = 0
        for version in sorted(by_wallet[customer]):
            movements = by_wallet[customer][version]
            before = Counter(_balance(each) - _amount(each) for each in movements)
            after = Counter(map(_balance, movements))
            reached = balance + sum(map(_amount, movements))
            # A chain, in whatever order the movements of one transaction were published.
            if before + Counter([reached]) != after + Counter([balance]):
                yield f"wallet {customer}: version {version} does not lead from {balance} to {reached}"
            balance = reached
        if stored.get(customer) != balance:
            yield f"wallet {customer}: its movements come to {balance}, the table has {stored.get(customer)}"


def _amount(event: Made) -> int:
    return SIGN[event.type] * int(event.body["payment"]["amount"])


def _balance(event: Made) -> int:
    return int(event.body["wallet"]["balance"])


# --- versions ----------------------------------------------------------------------------------------------------


def check_versions(events: Iterable[Made], wallets: Rows, orders: Rows) -> Iterator[str]:
    """A sentence for each wallet and order of which a version is missing or one too many."""
    versions: dict[str, set[int]] = defaultdict(set)
    for event in events:
        if event.subject.startswith((WALLET, ORDER)):
            versions[event.subject].add(event.version)
    stored = {f"{WALLET}{row['customer_id']}": int(row["tx_version"]) for row in wallets}
    stored |= {f"{ORDER}{row['customer_id']}/{row['order_id']}": int(row["tx_version"]) for row in orders}
    for subject in sorted(stored.keys() | versions.keys()):
        if subject not in stored:
            yield f"{subject} has events and is not in the table"
        elif versions[subject] != set(range(1, stored[subject] + 1)):
            missing = sorted(set(range(1, stored[subject] + 1)) ^ versions[subject])[:5]
            yield f"{subject} is at version {stored[subject]}; missing or too many: {missing}"


# --- time --------------------------------------------------------------------------------------------------------


def check_time(
    history: History, events: Iterable[Made], *, sent_at_s: Mapping[str, float], answered_at_s: Mapping[str, float]
) -> list[str]:
    """Sentences that name transactions on a cycle; none if all could have happened one by one, each in its time.

    `sent_at_s` is when a command was about to be published for the first time, `answered_at_s` when its first answer
    was seen, by id, both by one clock. A transaction with several commands began after the last of them was sent and
    was over before the first of them was answered.
    """
    began, ended = _in_time(history, sent_at_s, answered_at_s)
    after: dict[str, set[str]] = defaultdict(set)
    by_record: dict[str, dict[int, str]] = defaultdict(dict)
    for event in events:
        by_record[event.subject].setdefault(event.version, event.transaction)
        after.setdefault(event.transaction, set())
    for versions in by_record.values():
        makers = [versions[version] for version in sorted(versions)]
        for one, next_one in pairwise(makers):
            if one != next_one:
                after[one].add(next_one)
    # Moments in a row stand for all pairs of before and after: what has ended leads to the moments that follow, and
    # these lead to what begins later.
    moments = sorted({*began.values(), *ended.values()})
    number = {moment: index for index, moment in enumerate(moments)}
    for index in range(1, len(moments)):
        after[_moment(index - 1)].add(_moment(index))
    for transaction in [name for name in after if name in began]:
        after[_moment(number[began[transaction]])].add(transaction)
        if number[ended[transaction]] + 1 < len(moments):
            after[transaction].add(_moment(number[ended[transaction]] + 1))
    left = sorted(name for name in _left_by_sorting(after) if not name.startswith("@"))
    return [f"no serial order in time: {name}, with {len(left)} transactions on or behind a cycle" for name in left[:5]]


def _in_time(
    history: History, sent_at_s: Mapping[str, float], answered_at_s: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """When each committed transaction had not begun yet, and when it was surely over."""
    began: dict[str, float] = {}
    ended: dict[str, float] = {}
    for domain in DOMAINS:
        for result in history.results(domain):
            answer = result.body
            id, transaction = answer["id"], answer.get("tx_id") or ""
            if answer["status"] != "committed" or id not in sent_at_s or id not in answered_at_s:
                continue
            began[transaction] = max(began.get(transaction, 0.0), sent_at_s[id])
            ended[transaction] = min(ended.get(transaction, float("inf")), answered_at_s[id])
    return began, ended


def _moment(index: int) -> str:
    return f"@{index}"


def _left_by_sorting(after: Mapping[str, set[str]]) -> list[str]:
    """What a topological sort cannot place: all that lies on a cycle or behind one."""
    waiting: Counter[str] = Counter()
    for targets in after.values():
        waiting.update(targets)
    names = after.keys() | waiting.keys()
    free = deque(name for name in names if not waiting[name])
    placed: set[str] = set()
    while free:
        name = free.popleft()
        placed.add(name)
        for target in after.get(name, ()):
            waiting[target] -= 1
            if not waiting[target]:
                free.append(target)
    return [name for name in names if name not in placed]
