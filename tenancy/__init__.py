"""Tenants, keys, sessions and the usage ledger, isolated by the database itself."""
