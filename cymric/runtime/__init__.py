"""What any long-running program needs; knows nothing of networking."""
