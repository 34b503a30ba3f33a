"""`avb secrets rotate`: a new master key for what tenants have entrusted to us."""

from __future__ import annotations

import argparse

from agentvoicebox.admin_api.cli import console, store
from agentvoicebox.tenancy import secrets
from agentvoicebox.tenancy.masterkeys import EnvironmentKeys, FileKeys, MasterKeys


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `avb secrets`."""
    actions = parser.add_subparsers(dest="action", required=True)
    rotate = actions.add_parser("rotate", help="make a new master key and wrap all tenants' keys by it")
    console.add_data(rotate)
    console.add_json(rotate)
    rotate.set_defaults(run=run)


def run(found: argparse.Namespace) -> int:
    """Rotate, and print how many keys were wrapped anew. Given keys are not made here: the first of them is the new."""
    settings = console.settings(found)
    keys: MasterKeys
    if settings.secrets_keys is not None:
        keys = EnvironmentKeys(settings.secrets_keys)
    else:
        keys = file = FileKeys(settings.data / "master.keys")
        file.renew()
    current, _ = keys.current()
    wrapped = store.use(settings, lambda database: secrets.rotate_master(database, keys))
    if found.json:
        console.emit({"master_key": current, "wrapped": wrapped})
    else:
        console.stdout.print(f"Master key {current} is in use; {wrapped} keys of tenants were wrapped by it.")
        if settings.secrets_keys is None:
            console.stdout.print("Keep a copy of master.keys in the data directory elsewhere than the store's backups.")
    return 0
