"""What every Cymric program shares, and the command line.

`model` holds values and pure rules, `runtime` what a long-running program needs, `datastore`
where values live, `kernel` what Linux is told, `cli` the `cymric` command.
"""

__version__ = "0.1.0"
