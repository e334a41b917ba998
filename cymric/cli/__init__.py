"""The `cymric` command line: one file per noun. See docs/cli.md."""
