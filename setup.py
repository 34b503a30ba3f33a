"""Map the folders at the root onto the import package `agentvoicebox`; everything else is in setup.cfg."""

from setuptools import find_packages, setup

FOLDERS = ("admin_api", "bus_bridge", "config", "plugins", "skills", "tenancy")
setup(
    packages=[f"agentvoicebox.{p}" for f in FOLDERS for p in (f, *(f"{f}.{s}" for s in find_packages(f)))],
    package_dir={f"agentvoicebox.{f}": f for f in FOLDERS},
)
