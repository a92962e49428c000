"""`python -m weighting`, for machines where scripts are not on the path."""

from weighting.cli import main

main(prog_name="weighting")
