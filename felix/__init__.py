"""Policy enforcement on one node: from the datastore to routes, chains and sets of the kernel."""
