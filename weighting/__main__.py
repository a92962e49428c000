"""`python -m weighting`, for machines where scripts are not on the path."""

import sys

from weighting.cli import main

if not sys.flags.safe_path:
    # The working folder, where a file may be called like an installed module: searched last.
    sys.path.append(sys.path.pop(0))
main(prog_name="weighting")
