"""ScalarDB's own archives, which the Java program runs on."""

from __future__ import annotations

from pathlib import Path

from infra.servers.artifacts import Server, class_path, write_lock

SCALARDB = Server(
    name="scalardb",
    version="3.19.0",
    # ScalarDB logs through SLF4J 1.7 and leaves the binding to its user.
    coordinates=("com.scalar-labs:scalardb:3.19.0", "org.slf4j:slf4j-simple:1.7.36"),
    lock_dir=Path(__file__).parent,
    # The peer talks to Cassandra and, through JDBC, to SQLite; ScalarDB loads the drivers of its other storages only
    # when they are configured. This is three quarters of what it would bring.
    excluded=(
        "com.azure:*",
        "com.google.cloud:*",
        "com.ibm.db2:*",
        "com.microsoft.sqlserver:*",
        "com.mysql:*",
        "com.oracle.database.jdbc:*",
        "com.yugabyte:*",
        "org.mariadb.jdbc:*",
        "org.postgresql:*",
        "software.amazon.awssdk:*",
    ),
)


def scalardb_class_path() -> str:
    """What to give `java` and `javac` as class path; downloads the archives once. Raises ArtifactError."""
    return ":".join(map(str, class_path(SCALARDB)))


if __name__ == "__main__":
    write_lock(SCALARDB)
