"""Where values live: the datastore port, its etcd and memory adapters, and the syncer."""
