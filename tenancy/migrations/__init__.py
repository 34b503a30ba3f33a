"""The history of the tables; `upgrade` brings a database to its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from agentvoicebox.config.errors import Unavailable

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Connection

HEAD = "0010"

INDEXES = {
    "usage_events_seq_idx": (
        "CREATE INDEX CONCURRENTLY usage_events_seq_idx ON usage_events USING brin (seq) WITH (autosummarize = on)"
    ),
    "usage_minutes_minute_idx": (
        "CREATE INDEX CONCURRENTLY usage_minutes_minute_idx ON usage_minutes "
        "USING brin (minute) WITH (autosummarize = on)"
    ),
}
"""Indexes on tables that hold many rows already when they come: `database.prepare` makes them after the migrations,
while nodes go on writing, which no transaction can. A migration may make one itself where the table is small."""


def upgrade(connection: Connection) -> None:
    """Run what is missing, inside the connection's transaction."""
    if connection.exec_driver_sql("SELECT to_regclass('public.alembic_version')").scalar() is not None:
        found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        if found == HEAD:
            return  # without loading Alembic: most starts end here
    from alembic import command
    from alembic.util import CommandError

    try:
        command.upgrade(config(connection), HEAD)
    except CommandError as error:
        raise Unavailable(
            f"The store cannot be brought to version {HEAD} ({error}): was it made by a newer AgentVoiceBox?",
            code="store_unavailable",
        ) from error


def config(connection: Connection) -> Config:
    """What Alembic's commands want, on a connection whose transaction the caller ends."""
    from alembic.config import Config

    found = Config()
    found.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    found.attributes["connection"] = connection
    return found
