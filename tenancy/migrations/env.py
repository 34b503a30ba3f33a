"""Alembic's entry: migrate on the connection we are given, in its transaction."""

from __future__ import annotations

from alembic import context

from agentvoicebox.tenancy.models import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
