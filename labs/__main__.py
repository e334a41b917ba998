"""`python -m labs`: the same as labs/lab."""

from labs.commands import main

main(prog_name="labs/lab")
