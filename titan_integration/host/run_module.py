"""Run a module as `python -P -m` does, with the working folder searched last for imports.

    torchrun ... -m titan_integration.host.run_module torchtitan.train --module ... --config ...

A plugin or config module of the user's may be in the working folder; a file there that is called
like a module of Python's or of an installed package must not be taken for it.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the module that is the first argument; the others are its own.

    On a rank, a ValueError that reaches this point is one of the user's, as of a config function.
    """
    module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    if module == "torchtitan.train":
        from titan_integration.host.flags import explain_mistyped  # noqa: PLC0415 - takes seconds
        from titan_integration.host.quiet import hide_noise  # noqa: PLC0415

        explain_mistyped()
        hide_noise()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ValueError:
        if "RANK" not in os.environ:
            raise
        from titan_integration.host.user_errors import exit_on_user_error  # noqa: PLC0415 - takes seconds

        with exit_on_user_error():
            raise


if __name__ == "__main__":
    main()
