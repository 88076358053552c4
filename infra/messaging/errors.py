"""What talking to Kafka can raise.

MessagingError
├── BrokerUnavailableError   nobody answers at the address, or not in time: wait, or put it right
│   ├── UntrustedBrokerError      who answers has no certificate that we trust, or speaks no TLS: put that right
│   └── NotAuthenticatedError     the broker does not believe who we say we are: put the credentials right
├── UnknownTopicError        the topic does not exist: declare it
├── MessageTooLargeError     the message can never be sent: it was not, and others are not affected
├── DeliveryFailedError      the broker refused, or an earlier message failed; it may have been stored: send again
└── TopicError               a topic could not be created as declared
"""

from __future__ import annotations


class MessagingError(Exception):
    """Base of everything that this package raises."""


class BrokerUnavailableError(MessagingError):
    """No broker answered. Whether messages that were on their way have arrived is unknown."""

    def __init__(self, bootstrap_servers: str, detail: str = "") -> None:
        reason = f" ({detail})" if detail else ""
        super().__init__(
            f"Kafka does not answer at {bootstrap_servers}{reason}. "
            "Start the system with `concord up`, or check CONCORD_KAFKA__BOOTSTRAP_SERVERS."
        )
        self.bootstrap_servers = bootstrap_servers
        self.detail = detail


class UntrustedBrokerError(BrokerUnavailableError):
    """Somebody answers at the address, but not with a certificate that we trust. Nothing was told to them."""

    def __init__(self, bootstrap_servers: str, detail: str = "") -> None:
        MessagingError.__init__(
            self,
            f"Kafka at {bootstrap_servers} cannot be trusted ({detail}). Check CONCORD_KAFKA__SECURITY_PROTOCOL, "
            "CONCORD_KAFKA__TLS__CA_FILE and the name in CONCORD_KAFKA__BOOTSTRAP_SERVERS.",
        )
        self.bootstrap_servers = bootstrap_servers
        self.detail = detail


class NotAuthenticatedError(BrokerUnavailableError):
    """The broker does not accept who we say we are."""

    def __init__(self, bootstrap_servers: str, detail: str = "") -> None:
        MessagingError.__init__(
            self,
            f"Kafka at {bootstrap_servers} does not accept our credentials ({detail}). Check the settings "
            "CONCORD_KAFKA__SASL__…, first MECHANISM, USERNAME and PASSWORD_FILE.",
        )
        self.bootstrap_servers = bootstrap_servers
        self.detail = detail


class UnknownTopicError(MessagingError):
    """The broker does not know the topic."""

    def __init__(self, topic: str) -> None:
        super().__init__(f"Kafka has no topic {topic!r}. `concord topics` lists those that are declared.")
        self.topic = topic


class MessageTooLargeError(MessagingError):
    """The message with its key and headers exceeds the limit."""

    def __init__(self, topic: str, size_bytes: int, max_bytes: int | None = None) -> None:
        limit = f"the limit of {max_bytes:,} bytes" if max_bytes is not None else "the broker's limit for this topic"
        super().__init__(f"A message of {size_bytes:,} bytes for {topic} exceeds {limit}.")
        self.topic = topic
        self.size_bytes = size_bytes
        self.max_bytes = max_bytes


class DeliveryFailedError(MessagingError):
    """The message was given up. It may have been stored all the same, so sending it again may repeat it."""


class TopicError(MessagingError):
    """Kafka refused to create or describe a topic."""
