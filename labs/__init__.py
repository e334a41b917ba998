"""A small network of namespaces on one machine: nodes, a router, pods, and the programs of each.

Reading order: topology (who is where, pure), then network, supervisor, router and pods (one kind
of thing each), lab (puts them together and takes them down), observe and checks (what is so, and
whether it should be), summary and commands (what a person sees and types).
"""
