"""The `avb` command: one file per verb, imported only when that verb is called, since a Pi has no server packages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from agentvoicebox.config.errors import AvbError

VERBS = {
    "up": "run everything embedded: store, cells, bridge and REST service",
    "demo": "two tenants each say a sentence and each hear their own answer",
    "tenant": "make, list, change, suspend, export and erase tenants",
    "key": "make, list, rotate and revoke API keys of a tenant",
    "audit": "check, anchor, export and archive the audit log",
    "secrets": "give tenants' secrets a new master key",
    "device": "make this machine a device of a platform, pair it, and say what is live on it",
    "say": "say or write something to a running node and hear the answer",
    "worker": "speech engines for nodes that share a Redis, on this or another machine",
    "models": "which speech models are here, and fetching them",
    "doctor": "what is installed, reachable and missing, with the remedy",
}

Run = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one `avb` command; returns its exit code (2: wrong input, 1: something did not work)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="avb", description="Make one OpenVoiceOS installation serve many organisations."
    )
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == asked:
            try:
                import_module(f"agentvoicebox.admin_api.cli.{name}").configure(verb)
            except ImportError as error:
                return _lacks(name, error)
    found = parser.parse_args(arguments)
    try:
        run: Run = found.run
        return run(found)
    except AvbError as error:
        print(f"avb {found.verb}: {error.message}", file=sys.stderr)
        return 2 if error.status < 500 else 1
    except ModuleNotFoundError as error:
        if (error.name or "agentvoicebox").startswith("agentvoicebox"):
            raise
        return _lacks(found.verb, error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1


def _lacks(verb: str, error: ImportError) -> int:
    remedy = "pip install 'agentvoicebox[server]'"
    print(f"avb {verb} needs {error.name}, which is not installed: {remedy}", file=sys.stderr)
    return 1
