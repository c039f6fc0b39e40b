"""What to install when a package is missing: said so that it works, from a checkout and from a wheel."""

from __future__ import annotations

import importlib.metadata
import re
import shlex

from etude import catalog


def how(*extras: str) -> str:
    """The command that installs these extras: the checkout's own path, or the packages by their names.

    Never etude by its bare name: it is nobody's in the package index until etude is published there.
    """
    checkout = catalog.checkout_folder()
    if checkout is not None:
        wanted = f"{checkout}[{','.join(extras)}]"
        return f"pip install -e {shlex.quote(wanted)}"
    return "pip install " + " ".join(shlex.quote(package) for package in packages(*extras))


def packages(*extras: str) -> list[str]:
    """The packages of these extras with their lower bounds, as the installed etude declares them."""
    try:
        required = importlib.metadata.requires("etude") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    found = []
    for line in required:  # gymnasium[classic-control]>=1.0; extra == 'rl'
        package, _, marker = line.partition(";")
        named = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if named and named[1] in extras:
            found.append(package.strip())
    return found or [name for extra in extras for name in catalog.EXTRAS.get(extra, ())]
